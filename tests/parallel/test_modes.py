"""Ways to train on several ranks, in pairs: outputs and gradients are those of one process."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, seed, settings
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import hamblocks as hb
from hamblocks.parallel import ContextShard
from hamblocks.parallelize import parallelize, split_heads

VOCAB, HIDDEN, HEADS, LAYERS = 17, 16, 4, 2
ASKED = 0.05
"""Threshold of a query gate: about one query in ten reads."""

LAYOUTS: dict[str, tuple[int, ...]] = {
    "fsdp": (2,),
    "ddp": (2,),
    "context": (2,),
    "tensor": (2,),
    "fsdp of four": (4,),
    "context of four": (4,),
    "tensor of four": (4,),
    "replicate fsdp": (2, 2),
    "fsdp context": (2, 2),
    "ddp context": (2, 2),
    "fsdp tensor": (2, 2),
    "context tensor": (2, 2),
}
"""Sizes of the mesh of each layout. Its dimensions are the words of the name, without a number."""


class Case(NamedTuple):
    """What is trained, and how.

    Attributes:
        lengths: of the sequences; all equal where they are not packed.
        packed: whether the sequences of a rank are one packed row, or the rows of a batch.
        order: of the slices of context parallel.
        recompute: whether blocks are computed again in the backward pass.
        parts: into how many passes, whose gradients add up, a rank cuts its sequences.
        keep: the fraction of tokens that a threshold keeps; None: there is no threshold.
        window: width of a window; None: there is none.
        count: tokens of a `TopK`; None: there is none.
        asks: whether a query gate lets only some queries read, on some ranks perhaps none.
        own_dtype: whether `parallelize` gathers parameters in a dtype that it is given, which
            takes apart those that keep their own.
    """

    lengths: list[int]
    packed: bool = False
    order: str = "head-tail"
    recompute: bool = False
    parts: int = 1
    keep: float | None = None
    window: int | None = None
    count: int | None = None
    asks: bool = False
    own_dtype: bool = False


@st.composite
def cases(draw: Any) -> Case:
    packed = draw(st.booleans())
    length = st.integers(0, 13)
    several = st.lists(length, min_size=1, max_size=6)
    lengths = draw(several if packed else st.integers(1, 5).map(lambda n: [draw(length)] * n))
    rules = draw(st.sets(st.sampled_from(["keep", "window", "count"]), min_size=1))
    return Case(
        lengths,
        packed,
        draw(st.sampled_from(["head-tail", "contiguous"])),
        draw(st.booleans()),
        draw(st.integers(1, 2)),
        draw(st.sampled_from([0, 0.1, 1])) if "keep" in rules else None,
        draw(st.integers(1, 5)) if "window" in rules else None,
        draw(st.integers(1, 4)) if "count" in rules else None,
        draw(st.booleans()),
        draw(st.booleans()),
    )


def model_of(case: Case, taus: list[float]) -> hb.Decoder:
    def layer(index: int) -> hb.HAMLayer:
        rules: list[Any] = []
        if case.keep is not None:
            rules.append(hb.Threshold(hb.FixedThreshold(taus[index])))
        if case.window is not None:
            rules.append(hb.Window(case.window))
        if case.count is not None:
            rules.append(hb.TopK(case.count))
        selector = functools.reduce(lambda a, b: a | b, rules)
        asks = hb.ThresholdQueries(hb.PredictionError("l2"), hb.FixedThreshold(ASKED))
        return hb.HAMLayer(HIDDEN, HEADS, selector=selector, query_gate=asks if case.asks else None)

    torch.manual_seed(0)
    return hb.Decoder(VOCAB, LAYERS, layer).double()


def thresholds(case: Case, batch: list[torch.Tensor]) -> list[float]:
    """Thresholds that keep the fraction in every layer, halfway between two scores."""
    taus = [torch.inf if case.keep == 0 else -torch.inf] * LAYERS
    if case.keep is None or not 0 < case.keep < 1:
        return taus
    for index in range(LAYERS):  # the scores of a layer depend on the thresholds before it
        with torch.no_grad():
            stats = called(model_of(case, taus), batch, case.packed).stats[index]
        score = stats.score.flatten().sort().values
        if len(score) > 1:
            kept = max(1, round(case.keep * len(score)))
            taus[index] = score[-kept - 1 : len(score) - kept + 1].mean().item()
    return taus


def called(model: Any, batch: list[torch.Tensor], packed: bool, shard: Any = None) -> Any:
    """The model on sequences; with a shard on the tokens of this rank."""
    tokens = torch.cat(batch)[None] if packed else torch.stack(batch)
    if shard is not None:
        return model(shard.take(tokens), shard=shard)
    return model(tokens, cu_seqlens=borders_of(batch) if packed else None)


def borders_of(batch: list[torch.Tensor]) -> torch.Tensor:
    ends = torch.tensor([len(tokens) for tokens in batch]).cumsum(0)
    return torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32)


def dealt(batch: list[Any], number: int, of: int) -> list[Any]:
    """The share of one of some ranks; the first ones have more where it does not divide."""
    each, more = divmod(len(batch), of)
    begin = number * each + min(number, more)
    return batch[begin : begin + each + (number < more)]


@functools.cache
def mesh_of(layout: str, group: Any) -> DeviceMesh:
    names = tuple(layout.removesuffix(" of four").split())
    if len(names) == 1:
        return DeviceMesh.from_group(group or dist.group.WORLD, "cpu", mesh_dim_names=names)
    return init_device_mesh("cpu", LAYOUTS[layout], mesh_dim_names=names)


def distributed(model: hb.Decoder, case: Case, mesh: DeviceMesh, group: Any) -> Any:
    """The model on the ranks of a mesh, with recomputation."""
    names = mesh.mesh_dim_names or ()
    tensor = "tensor" if "tensor" in names else None
    if "fsdp" in names or "replicate" in names or (tensor and len(names) > 1):
        options = {
            "replicate": "replicate" if "replicate" in names else None,
            "recompute": case.recompute,
            "param_dtype": torch.float64 if case.own_dtype else None,
        }
        return parallelize(model, mesh, tensor=tensor, **options)
    if case.recompute:
        for block in model.blocks:
            again = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
            block.forward = functools.partial(again, block.forward)
    if tensor:
        return split_heads(model, mesh, src_data_rank=None)
    if "ddp" in names:
        return DistributedDataParallel(model, process_group=group)
    return model


def is_as_one_process(group: Any, layout: str, case: Case) -> None:
    generator = torch.Generator().manual_seed(1)
    batch = [torch.randint(VOCAB, (length,), generator=generator) for length in case.lengths]
    targets = [torch.randint(VOCAB, (length,), generator=generator) for length in case.lengths]
    taus = thresholds(case, batch)
    whole = model_of(case, taus)
    output = called(whole, batch, case.packed)
    logits = output.logits.flatten(0, 1)
    cross_entropy(logits, torch.cat(targets), reduction="sum").backward()
    wanted = list(logits.detach().split(case.lengths))

    mesh = mesh_of(layout, group)
    names: Any = mesh.mesh_dim_names
    model = distributed(model_of(case, taus), case, mesh, group)
    copies = [name for name in names if name not in ("context", "tensor")]
    ranks, rank = 1, 0
    for name in copies:
        size = mesh.size(names.index(name))
        ranks, rank = ranks * size, rank * size + mesh.get_local_rank(name)
    averaged = ranks * (mesh.size(names.index("context")) if "context" in names else 1)
    sharded = hasattr(model, "set_requires_gradient_sync")
    averages = sharded or isinstance(model, DistributedDataParallel)

    own = dealt(list(zip(batch, targets, wanted, strict=True)), rank, ranks)
    for part in range(case.parts):
        last = part == case.parts - 1
        if sharded:
            model.set_requires_gradient_sync(last)
        sequences = dealt(own, part, case.parts)
        empty = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), logits[:0]
        tokens, target, expected = zip(*(sequences or [empty]), strict=True)
        row = (1, -1) if case.packed else (len(tokens), -1)
        shard = None
        if "context" in names:
            borders = borders_of(tokens) if case.packed else None
            length = sum(map(len, tokens)) if case.packed else len(tokens[0])
            given = {"group": mesh.get_group("context"), "order": case.order}
            shard = ContextShard(length, cu_seqlens=borders, **given)
        found = called(model, list(tokens), case.packed, shard).logits
        target = torch.cat(target).view(row)
        expected = torch.cat(expected).view(*row, VOCAB)
        if shard is not None:
            target, expected = shard.take(target), shard.take(expected)
        torch.testing.assert_close(found.detach(), expected, rtol=1e-9, atol=1e-11)
        loss = cross_entropy(found.flatten(0, 1), target.flatten(), reduction="sum")
        (loss * averaged if averages else loss).backward()

    for weight, (name, other) in zip(model.parameters(), whole.named_parameters(), strict=True):
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        if not averages and averaged > 1:
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=mesh.get_group("context"))
        right = torch.zeros_like(other) if other.grad is None else other.grad
        scale = float(right.abs().max())
        near = {"rtol": 1e-9, "atol": 1e-9 * scale + 1e-12}
        torch.testing.assert_close(gradient, right, **near, msg=f"the gradient of {name}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_way_to_train_is_as_one_process(keeper, layout):
    @seed(list(LAYOUTS).index(layout))  # other cases for every layout
    @settings(
        max_examples=4,
        deadline=None,
        phases=[Phase.generate],  # a failure ends the processes: no shrinking
    )
    @given(case=cases())
    def check(case: Case) -> None:
        keeper.get().run(is_as_one_process, math.prod(LAYOUTS[layout]), layout, case)

    check()


@pytest.mark.parametrize("attends", [True, False])
@pytest.mark.parametrize(("rows", "tokens"), [(2, 0), (0, 3), (2, 3)])
def test_which_weights_have_a_gradient_does_not_depend_on_the_input(attends, rows, tokens):
    """Ranks reduce their gradients together. In the last of these inputs no query reads."""
    parts: dict[str, Any] = {"attention": None}
    if attends:
        parts = {
            "attention": hb.SelectedAttention(conv_size=2, null_sink=True),
            "gate": hb.LearnedRouter(),
            "selector": hb.TopK(2),
            "query_gate": hb.ThresholdQueries(hb.LearnedRouter(), torch.inf),
        }
    layer = hb.HAMLayer(HIDDEN, HEADS, **parts)
    x = torch.randn(rows, tokens, HIDDEN, requires_grad=True)
    layer(x).y.sum().backward()
    for name, weight in layer.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
    assert x.grad.shape == x.shape
