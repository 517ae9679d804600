"""Tensor parallel: outputs, decisions, gradients and thresholds are those of one process."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn.functional import cross_entropy

import hamblocks as hb
from hamblocks.parallelize import parallelize, split_heads

HIDDEN, HEADS, TOKENS, VOCAB = 16, 4, 21, 19


def layer(**parts: Any) -> hb.HAMLayer:
    torch.manual_seed(0)
    parts = {"selector": hb.Threshold(0.9) | hb.Window(3)} | parts
    made = hb.HAMLayer(HIDDEN, parts.pop("num_heads", HEADS), **parts).double()
    with torch.no_grad():  # biases and null logits start at 0
        for weight in made.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    return made


LAYERS: dict[str, Any] = {
    "default": lambda: layer(selector=hb.Threshold(hb.TargetFraction(0.3)) | hb.Window(3)),
    "grouped heads": lambda: layer(num_heads=8, num_kv_heads=4, head_dim=4, qkv_bias=True),
    "shared gate": lambda: layer(gate=hb.SharedGate(hb.PredictionError())),
    "shared router": lambda: layer(gate=hb.SharedGate(hb.LearnedRouter()), selector=hb.TopK(5)),
    "router": lambda: layer(gate=hb.LearnedRouter(), selector=hb.Threshold(0.0)),
    "top-k": lambda: layer(gate=hb.PredictionError("l2"), selector=hb.TopK(4, delay=2)),
    "head thresholds": lambda: layer(selector=hb.HeadThresholds([0.8, 0.9, 1.0, 1.1])),
    "convolved keys and values": lambda: layer(
        attention=hb.SelectedAttention(conv_size=3, conv_values=True, null_sink=True),
        memory=hb.DeltaMemory(conv_size=[4, 3, 2]),
    ),
    "sizes of its own": lambda: layer(
        memory=hb.GatedDeltaMemory(projections="own", num_heads=8, head_dim=4, expand_v=2)
    ),
    "own projections, output gate": lambda: layer(
        memory=hb.GatedDeltaMemory(projections="own"), combiner=hb.GatedSum(output_gate=True)
    ),
    "gated reads": lambda: layer(
        memory=hb.GatedDeltaMemory(projections="own", num_heads=8, num_k_heads=4, head_dim=4),
        attention=hb.SelectedAttention(partial_rotary_factor=0.5),
        combiner=hb.ScaledSum(bias=True, memory_gate="silu", attention_gate="sigmoid"),
    ),
    "weighted sum": lambda: layer(
        gate=hb.WeightedSum(
            [hb.RandomGate(heads="own"), hb.SharedGate(hb.LearnedRouter()), hb.KeyNorm()],
            [1.0, 1.0, 0.1],
        ),
        selector=hb.Threshold(0.5),
    ),
    "query gate": lambda: layer(
        query_gate=hb.ThresholdQueries(hb.LearnedRouter(), 0.0, window=2),
        combiner=hb.ScaledSum(bias=True),
    ),
    "unstored memory": lambda: layer(memory=hb.UnstoredMemory(hb.GatedDeltaMemory())),
    "only attention": lambda: layer(memory=None, selector=hb.Window(5)),
    "only a memory": lambda: layer(attention=None, selector=None),
}


def mesh_of(group: Any) -> DeviceMesh:
    return DeviceMesh.from_group(dist.group.WORLD if group is None else group, "cpu")


def close(found: Any, wanted: Any, name: str = "") -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10, msg=lambda m: f"{name}: {m}")


def same_gradients(model: Any, whole: Any, scale: float = 1) -> None:
    """Compares what this rank holds of weights and gradients; sends nothing."""
    for (name, weight), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        for found, wanted in ((weight, other.detach()), (weight.grad, other.grad)):
            if wanted is None:
                assert found is None
                continue
            own = distribute_tensor(
                wanted, weight.device_mesh, weight.placements, src_data_rank=None
            )
            assert found.placements == weight.placements
            close(found.to_local() * (scale if found is weight.grad else 1), own.to_local(), name)


def own_heads(x: torch.Tensor, group: Any) -> torch.Tensor:
    """The heads of this rank; of one score for all heads, that score."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    return x if x.shape[2] == 1 else x.chunk(ranks, 2)[rank]


def is_as_one_process(group: Any, names: list[str]) -> None:
    for name in names:
        whole, split = LAYERS[name](), LAYERS[name]()
        split_heads(split, mesh_of(group), src_data_rank=None)
        x = torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).double()
        cu_seqlens = torch.tensor([0, 6, TOKENS], dtype=torch.int32)
        one, other = (x.clone().requires_grad_() for _ in range(2))
        wanted, found = whole(one, cu_seqlens=cu_seqlens), split(other, cu_seqlens=cu_seqlens)
        close(found.y, wanted.y, name)
        if wanted.stats.evict_at is not None:
            assert torch.equal(found.stats.evict_at, own_heads(wanted.stats.evict_at, group))
        for result in (wanted, found):
            result.y.square().sum().backward()
        close(other.grad, one.grad, name)
        same_gradients(split, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "names"), [(2, ["default", "shared router"]), (4, list(LAYERS))])
def test_a_layer_is_that_of_one_process(workers, ranks, names):
    workers.run(is_as_one_process, ranks, names)


def compiled(group: Any) -> None:
    whole, split = (LAYERS["shared gate"]() for _ in range(2))
    split_heads(split, mesh_of(group), src_data_rank=None)
    x = torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).double()
    found = torch.compile(split, backend="eager")(x)
    close(found.y, whole(x).y)


def test_a_split_layer_runs_outside_of_compiled_code(workers):
    workers.run(compiled, 4)


# thresholds

GATES: dict[str, Any] = {
    "own": hb.PredictionError,
    "one": lambda: hb.SharedGate(hb.PredictionError()),
    "given, one": hb.GivenScore,
    "given, own": hb.GivenScore,
}


def steps(group: Any, name: str, ranks: int) -> list[Any]:
    """Samples and thresholds of three steps in training, and lifetimes under the last of them."""
    made = layer(
        gate=GATES[name](),
        selector=hb.Threshold(hb.TargetFraction(0.3)),
        query_gate=hb.ThresholdQueries(hb.PredictionError(), hb.TargetFraction(0.5)),
    )
    if ranks > 1:
        split_heads(made, mesh_of(group), src_data_rank=None)
    controllers = [made.selector.controller, made.query_gate.controller]
    generator = torch.Generator().manual_seed(1)
    seen = []
    for _ in range(3):
        x = torch.randn(2, TOKENS, HIDDEN, generator=generator).double()
        given = torch.rand(2, TOKENS, 1 if name.endswith("one") else HEADS, generator=generator)
        given = given.double() if "given" in name else None
        stats = made(x, given_score=given).stats
        hb.step_controllers(made)
        seen.append([(one.tau.item(), one.sample.clone()) for one in controllers])
    return [seen, stats.evict_at]


@pytest.mark.parametrize("name", GATES)
def test_thresholds_are_those_of_one_process(workers, name):
    wanted, evict_at = steps(None, name, 1)
    assert len({tau for ((tau, _), _) in wanted}) == 3
    own = [evict_at] * 4 if evict_at.shape[2] == 1 else evict_at.chunk(4, 2)
    for rank, (found, until) in enumerate(workers.run(steps, 4, name, 4)):
        for step, alone in zip(found, wanted, strict=True):
            for (tau, sample), (tau_alone, sample_alone) in zip(step, alone, strict=True):
                assert tau == tau_alone
                assert torch.equal(sample, sample_alone)
        assert torch.equal(until, own[rank])


# models


def decoder(**parts: Any) -> hb.Decoder:
    torch.manual_seed(0)
    made = hb.Decoder(VOCAB, 2, lambda _: layer(**{"selector": hb.TopK(6)} | copy.deepcopy(parts)))
    for block in made.blocks:
        torch.nn.init.normal_(block.mlp_norm.weight, 1, 0.1)
    return made.double()


def generates(group: Any, mesh: bool) -> torch.Tensor:
    model = decoder(num_kv_heads=4).eval()
    if mesh:
        split_heads(model, mesh_of(group))
    tokens = torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first = model(tokens[:, :9], state=model.init_state(2))
        logits, state = [first.logits], first.state
        for t in range(9, TOKENS):
            result = model(tokens[:, t : t + 1], state=state)
            logits.append(result.logits)
            state = result.state
        one_pass = model(tokens).logits
    close(torch.cat(logits, 1), one_pass)
    return one_pass


def test_a_decoder_generates_as_one_process(workers):
    wanted = generates(None, False)
    for found in workers.run(generates, 4, True):
        close(found, wanted)


def trains(_: Any, tensor: int, recompute: bool) -> None:
    rows = torch.randint(VOCAB, (4, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    # a gate with a head that is tied to the embedding; FSDP2 takes no weight of two blocks
    make = partial(decoder, **({"gate": hb.PredictionEntropy(VOCAB)} if tensor == 4 else {}))
    whole = make()
    logits = whole(rows[:, :-1]).logits
    cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in whole.parameters()])

    mesh = init_device_mesh("cpu", (4 // tensor, tensor), mesh_dim_names=("data", "tensor"))
    model: Any = make()
    if tensor < 4:
        parallelize(model, mesh, tensor="tensor", recompute=recompute)
    else:
        split_heads(model, mesh["tensor"], src_data_rank=None)
    own = rows.chunk(mesh.size(0))[mesh.get_local_rank("data")]
    logits = model(own[:, :-1]).logits
    loss = cross_entropy(logits.flatten(0, 1), own[:, 1:].flatten())
    loss.backward()
    same_gradients(model, whole)
    # one call for all parameters, as optimizers and clip_grad_norm_ make it
    grads = [weight.grad for weight in model.parameters()]
    close(torch.nn.utils.get_total_norm(grads).full_tensor(), norm)
    torch.optim.AdamW(model.parameters(), foreach=True).step()


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "recompute"), [(2, True), (4, False)])
def test_a_decoder_trains_as_one_process(workers, tensor, recompute):
    workers.run(trains, 4, tensor, recompute)


def gathers(_: Any, tensor: int) -> None:
    mesh = init_device_mesh("cpu", (4 // tensor, tensor), mesh_dim_names=("data", "tensor"))
    model = decoder()
    wanted = {name: weight.clone() for name, weight in model.state_dict().items()}
    if tensor < 4:
        parallelize(model, mesh, tensor="tensor")
    else:
        split_heads(model, mesh["tensor"], src_data_rank=None)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        assert saved.keys() == wanted.keys()
        for name, weight in wanted.items():
            assert torch.equal(saved[name], weight), name


@pytest.mark.parametrize("tensor", [2, 4])
def test_a_full_state_dict_holds_whole_weights(workers, tensor):
    workers.run(gathers, 4, tensor)


# errors


class PlainCombiner(torch.nn.Module):
    def forward(self, x, memory_read, attention_read):
        return x


class PlainGate:
    def __call__(self, x, trace):
        return hb.GateOutput(trace.v.norm(dim=-1))


class PlainSelector:
    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        return hb.Window(3)(score, position=position, cu_seqlens=cu_seqlens)


class PlainController:
    def __call__(self, score):
        return torch.zeros(())

    def step(self):
        pass


REFUSED: dict[str, tuple[Any, str]] = {
    "heads": (lambda: layer(num_heads=2), r"num_heads: expected a multiple of the 4 ranks.*got 2"),
    "key/value heads": (
        lambda: layer(num_kv_heads=2),
        r"num_kv_heads: expected a multiple of the 4 ranks.*got 2",
    ),
    "heads of the memory": (
        lambda: layer(memory=hb.GatedDeltaMemory(projections="own", num_heads=2)),
        r"num_heads of the memory: expected a multiple of the 4 ranks.*got 2",
    ),
    "key heads of the memory": (
        lambda: layer(memory=hb.GatedDeltaMemory(projections="own", num_heads=4, num_k_heads=2)),
        r"num_k_heads of the memory: expected a multiple of the 4 ranks.*got 2",
    ),
    "combiner": (
        lambda: layer(combiner=PlainCombiner()),
        "combiner: expected one with split_heads",
    ),
    "gate": (
        lambda: layer(gate=hb.SharedGate(PlainGate())),
        "gate: expected one with score_heads",
    ),
    "selector": (
        lambda: layer(selector=hb.Cooldown(hb.Window(2) | PlainSelector(), 2)),
        "selector: expected one with by_head",
    ),
    "controller": (
        lambda: layer(selector=hb.Threshold(PlainController())),
        "controller: expected one with by_head",
    ),
}


def refuses(group: Any) -> None:
    for make, message in REFUSED.values():
        with (
            pytest.warns(UserWarning, match="controllers")
            if "controller" in message
            else nullcontext()
        ):
            made = make()
        before = {name: id(weight) for name, weight in made.named_parameters()}
        with pytest.raises(ValueError, match=message):
            split_heads(made, mesh_of(group))
        assert {name: id(weight) for name, weight in made.named_parameters()} == before
        assert made.head_split is None
    made = layer()
    with pytest.raises(ValueError, match="model: expected a model with a HAMLayer"):
        split_heads(torch.nn.Linear(2, 2), mesh_of(group))
    split_heads(made, mesh_of(group), src_data_rank=None)
    with pytest.raises(ValueError, match="model: expected a model whose heads are not shared yet"):
        split_heads(made, mesh_of(group))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    with pytest.raises(ValueError, match="mesh: expected one dimension"):
        split_heads(layer(), mesh)
    with pytest.raises(ValueError, match="tensor: expected a dimension of the mesh, data, tensor"):
        parallelize(decoder(), mesh, tensor="heads")


def test_what_cannot_be_split_is_named_on_every_rank(workers):
    workers.run(refuses, 4)
