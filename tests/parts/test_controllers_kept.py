"""What others do to a model leaves its thresholds right: averages, copies, ranks, wrappers."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hamblocks as hb
from hamblocks.controllers.tau import HasTau, sum_and_weight

MAKERS = {
    "target": lambda: hb.TargetFraction(0.3),
    "everything": lambda: hb.TargetFraction(1.0),
    "annealed": lambda: hb.AnnealedFraction(0.3, 6, begin=2),
    "elastic": lambda: hb.ElasticFraction(0.1, begin=2),
}


def scores(seed, *shape, mean=0.0, spread=1.0):
    return mean + spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def train(controller, steps=8, first=0):
    taus = []
    for seed in range(first, first + steps):
        controller(scores(seed, 2, 100, 2))
        controller.step()
        taus.append(controller.tau.item())
    return taus


class Holder(nn.Module):
    def __init__(self, controller):
        super().__init__()
        self.selector = hb.Threshold(controller)
        self.weight = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("maker", MAKERS)
def test_buffers_are_numbers_that_others_may_average_and_counts_are_no_buffers(maker):
    controller = MAKERS[maker]()
    for _ in range(2):
        assert all(buffer.dtype == torch.float32 for buffer in controller.buffers())
        assert all(buffer.isfinite().all() for buffer in controller.buffers())
        assert not {"seen", "admitted", "asked", "batch_sample"} & {*controller.state_dict()}
        train(controller, 3)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    "averaging", [{"use_buffers": True}, {}, {"use_buffers": True, "ema": 0.9}]
)
def test_an_averaged_model_has_thresholds_between_those_it_averages(maker, averaging):
    model = Holder(MAKERS[maker]())
    ema = averaging.get("ema")
    more = {"multi_avg_fn": get_ema_multi_avg_fn(ema)} if ema else {}
    averaged = AveragedModel(model, use_buffers=averaging.get("use_buffers", False), **more)
    source, mean = model.selector.controller, averaged.module.selector.controller
    taus = []
    for step in range(12):  # the first average is taken while everything is stored
        averaged.update_parameters(model)
        taus.append(source.tau.item())
        train(source, 1, step)
    finite = [tau for tau in taus if math.isfinite(tau)]
    if not averaging:  # torch copies the buffers
        assert mean.tau.item() == taus[-1]
    elif finite:
        assert min(finite) <= mean.tau <= max(finite)
    else:
        assert mean.tau == -math.inf
    averaged.eval()
    score = scores(99, 4, 2000, 2)
    for fraction in (0.1, 0.5, 0.9):
        mean.set_fraction(fraction)
        share = (score >= mean(score)).float().mean().item()
        assert share == pytest.approx(fraction, abs=0.03)


@given(
    taus=st.lists(
        st.one_of(st.sampled_from([-math.inf]), st.floats(-1e6, 1e6, width=32)), min_size=1
    ),
    decay=st.floats(0.5, 0.999),
)
def test_the_average_of_thresholds_is_the_mean_of_the_finite_ones(taus, decay):
    mean = HasTau(taus[0])
    weights, total = [1.0], [taus[0]]
    for tau in taus[1:]:
        for buffer, new in zip(
            mean.buffers(), sum_and_weight(torch.tensor(tau, dtype=torch.float32)), strict=True
        ):
            buffer.lerp_(new, 1 - decay)
        weights = [weight * decay for weight in weights] + [1 - decay]
        total.append(tau)
    finite = [(w, tau) for w, tau in zip(weights, total, strict=True) if math.isfinite(tau)]
    if not finite:
        assert mean.tau == -math.inf
        return
    expected = sum(w * tau for w, tau in finite) / sum(w for w, _ in finite)
    largest = max(abs(tau) for _, tau in finite)
    assert mean.tau.item() == pytest.approx(expected, abs=1e-3 * largest + 1e-20)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("pending", [False, True])
def test_copies_go_on_as_the_original_and_apart_from_it(maker, pending):
    controller = MAKERS[maker]()
    train(controller, 4)
    if pending:  # a copy within a step has the counts too
        controller(scores(50, 1, 99, 2))
    copies = [copy.deepcopy(controller), pickle.loads(pickle.dumps(controller))]
    expected = train(controller, 4, 10)
    for other in copies:
        assert train(other, 4, 10) == expected


@pytest.mark.parametrize("maker", MAKERS)
def test_counts_follow_the_model_and_begin_anew_after_the_meta_device(maker):
    controller = MAKERS[maker]()
    controller(scores(0, 1, 20, 1))
    seen = controller.seen.clone()
    model = nn.Sequential(controller).to(torch.bfloat16).to("cpu")
    assert model[0].seen == seen
    assert model[0].batch_sample.dtype == torch.int64
    state = controller.state_dict()
    controller.to("meta")
    assert controller.seen.is_meta
    assert controller(torch.empty(1, 4, 1, device="meta")).is_meta
    controller.to_empty(device="cpu")
    controller.load_state_dict(state)
    assert controller.seen == 0
    assert train(controller, 1) == train(MAKERS[maker](), 1)


def test_a_model_made_on_the_meta_device_counts_where_its_scores_are():
    with torch.device("meta"):
        made = hb.TargetFraction(0.3)
    assert all(buffer.is_meta for buffer in made.buffers())
    made.to_empty(device="cpu").reset()
    assert train(made) == train(hb.TargetFraction(0.3))
    # a loader that puts the buffers in place one by one never calls `.to`
    with torch.device("meta"):
        other = hb.TargetFraction(0.3)
    other._count_anew(torch.device("meta"))
    for name, buffer in hb.TargetFraction(0.3).named_buffers():
        setattr(other, name, buffer)
    assert train(other) == train(hb.TargetFraction(0.3))


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_the_default_dtype_changes_nothing(default):
    taus = {name: train(make()) for name, make in MAKERS.items()}
    torch.set_default_dtype(default)
    try:
        for name, make in MAKERS.items():
            controller = make()
            got = []
            for seed in range(8):
                score = torch.randn(
                    2, 100, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
                )
                controller(score)
                controller.step()
                got.append(controller.tau.item())
            assert got == taus[name], name
            assert all(buffer.dtype == torch.float32 for buffer in controller.buffers())
    finally:
        torch.set_default_dtype(torch.float32)


class Wrapper:
    """An optimizer wrapper with no hooks, as accelerate's, DeepSpeed's and others' are."""

    def __init__(self, optimizer, name):
        setattr(self, name, optimizer)
        self.step = optimizer.step


class SkipsInit(torch.optim.Optimizer):
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


@pytest.mark.parametrize("name", ["optimizer", "_optimizer", "base_optimizer", "optim", "skips"])
def test_the_hook_is_registered_inside_a_wrapper(name):
    model = Holder(hb.TargetFraction(0.3))
    inner = torch.optim.SGD(model.parameters(), 0.1)
    outer = SkipsInit(inner) if name == "skips" else Wrapper(Wrapper(inner, name), "optimizer")
    handle = hb.hook_controllers(outer, model)
    controller = model.selector.controller
    controller(scores(0, 1, 50, 1))
    outer.step()
    assert controller.tau.isfinite()
    placed = controller.tau.clone()
    handle.remove()
    controller(scores(1, 1, 50, 1) + 5)
    outer.step()
    assert controller.tau == placed


def test_an_optimizer_without_hooks_is_refused():
    class Own:
        def step(self):
            pass

    for other in (Own(), None, SkipsInit(Own())):
        with pytest.raises(ValueError, match=r"^optimizer: expected a torch\.optim\.Optimizer"):
            hb.hook_controllers(other, Holder(hb.TargetFraction(0.3)))


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)  # with some weights tau stays where it is
    layer = hb.HAMLayer(16, 2, selector=hb.Threshold(hb.TargetFraction(0.25)))
    model, optimizer = accelerator.prepare(layer, torch.optim.AdamW(layer.parameters()))
    hb.hook_controllers(optimizer, model)
    controller, taus, seen = layer.selector.controller, [], []
    for seed in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(scores(seed, 2, 20, 16)).y.sum())
            seen.append(int(controller.seen))
            optimizer.step()
            optimizer.zero_grad()
            taus.append(controller.tau.item())
    # two heads score each of the 40 tokens; tau moves with every second batch alone
    assert seen == [80, 160] * 3
    assert taus[0] == -math.inf
    assert taus[1] == taus[2] != taus[3] == taus[4] != taus[5]


class ModulesToSave(nn.Module):
    """What peft puts in the place of a module that an adapter saves: it trains a copy."""

    def __init__(self, module, adapter):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({adapter: copy.deepcopy(module)})
        self.active = adapter

    def forward(self, *args):
        return self.modules_to_save[self.active](*args)


class Config:
    modules_to_save = None


def first_of(x):
    return x[..., :1].float()


class First:
    def __call__(self, x, trace):
        return hb.GateOutput(first_of(x))


def rank_data(rank, number):
    return scores(100 * rank + number, 2, 64, 8) + 2 * rank


def ddp_main(rank, store, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    selector = hb.Threshold(hb.TargetFraction(0.25)) | hb.Threshold(hb.ElasticFraction(0.1))
    layer = hb.HAMLayer(8, 2, gate=First(), selector=selector)
    model = nn.parallel.DistributedDataParallel(layer)
    controllers = [selector.left.controller, selector.right.controller]
    counts, taus = [], []
    for step in range(4):
        before = [controller.tau.item() for controller in controllers]
        for forward in range(3):  # gradient accumulation
            model(rank_data(rank, 3 * step + forward)).y.sum().backward()
        got = torch.stack([x for one in controllers for x in (one.admitted, one.seen)])
        torch.distributed.all_reduce(got)
        counts.append((before, got.tolist()))
        hb.step_controllers(model)
        taus.append([controller.tau.item() for controller in controllers])
    torch.save((counts, taus, layer.state_dict()), f"{out}{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_under_ddp_no_forward_of_a_step_is_lost(tmp_path):
    torch.multiprocessing.spawn(ddp_main, (tmp_path / "store", tmp_path / "rank"), nprocs=2)
    (counts, taus, held), (_, others, held_by_other) = (
        torch.load(tmp_path / f"rank{rank}") for rank in range(2)
    )
    assert taus == others
    for name, x in held.items():
        assert torch.equal(x, held_by_other[name]), name
    for step, (before, got) in enumerate(counts):
        for number, tau in enumerate(before):
            score = torch.cat(
                [first_of(rank_data(rank, 3 * step + n)) for rank in (0, 1) for n in range(3)]
            )
            # one score for both heads
            assert got[2 * number : 2 * number + 2] == [int((score >= tau).sum()), score.numel()]
