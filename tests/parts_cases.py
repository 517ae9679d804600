"""Layers that cover every part, a plain oracle of a layer, and what tests of parts draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import hamblocks as hb
from hamblocks.ops import NEVER, select_threshold


class Parity:
    """A user's gate: a plain class that uses hamblocks only for its result."""

    def __call__(self, x, trace):
        return hb.GateOutput((trace.position % 2).float()[..., None])


class Loudness:
    """A user's gate that reads the trace: the squared norm of the residual, per query head."""

    def __call__(self, x, trace):
        return hb.GateOutput(trace.residual.detach().float().square().sum(-1))


class AtLeast:
    """A user's selector: no ledger, no base class."""

    def __init__(self, tau):
        self.tau = tau

    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        return hb.Selection(
            select_threshold(score, self.tau, position=position, cu_seqlens=cu_seqlens)
        )


class Smallest:
    """A user's selector that revises lifetimes: it has a ledger, and no base class."""

    def __init__(self, k):
        self.inner = hb.TopK(k)

    def start(self, batch_size, heads, device=None):
        return self.inner.start(batch_size, heads, device)

    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        return self.inner(-score, ledger, position=position, cu_seqlens=cu_seqlens)


class Sum:
    """A user's combiner: the difference of the two reads."""

    def __call__(self, x, memory_read, attention_read):
        return (memory_read - attention_read).flatten(2)


class GlobalTopK:
    """A selector that needs the whole sequence, and declares that it is not causal."""

    causal = False

    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        kept = score >= score.topk(2, 1).values[:, -1:]
        return hb.Selection(torch.where(kept, NEVER, 0).to(torch.int32))


def _fixed_by_hand() -> hb.Threshold:
    controller = hb.TargetFraction(0.5)
    controller.set_threshold(0.9)
    return hb.Threshold(controller)


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "threshold": lambda: {"selector": hb.Threshold(0.95)},
    "target": lambda: {"selector": _fixed_by_hand() | hb.FirstTokens(1)},
    "delta-relative-topk": lambda: {
        "memory": hb.DeltaMemory(),
        "gate": hb.PredictionError("relative_l2"),
        "selector": hb.TopK(3),
        "combiner": hb.SoftmaxMix(),
    },
    "l2-or-window": lambda: {
        "memory": hb.GatedDeltaMemory(conv_size=1),
        "gate": hb.PredictionError("l2"),
        "selector": hb.Threshold(0.1) | hb.Window(3),
        "attention": hb.SelectedAttention(rope_theta=None, qk_norm=False),
    },
    "router-and": lambda: {
        "memory": hb.GatedDeltaMemory(allow_neg_eigval=True),
        "gate": hb.LearnedRouter(),
        "selector": hb.TopK(4) & hb.Threshold(0.0),
        "combiner": hb.SoftmaxMix(),
    },
    "shared-router-tree": lambda: {
        "memory": hb.DeltaMemory(conv_size=2, allow_neg_eigval=True),
        "gate": hb.SharedGate(hb.LearnedRouter(3)),
        "selector": (hb.TopK(4) | hb.TopK(2)) & (hb.Window(7) | hb.Threshold(0.0)),
    },
    "shared-random": lambda: {
        "gate": hb.SharedGate(hb.RandomGate(3, heads="own")),
        "selector": (hb.TopK(5) & hb.Threshold(0.5)) | hb.FirstTokens(2),
    },
    "shared-error": lambda: {
        "gate": hb.SharedGate(hb.PredictionError()),
        "selector": hb.TopK(2) | hb.Window(3),
    },
    "written-sum": lambda: {
        "gate": hb.WeightedSum(
            [
                hb.CommittedWrite(),
                hb.PredictionError("l2"),
                hb.LearnedRouter(3, gradient="straight_through"),
            ],
            [1.0, 0.5, 0.1],
        ),
        "selector": hb.TopK(3) | hb.Window(2),
    },
    "recall": lambda: {"gate": hb.RecallError(), "selector": hb.Threshold(0.2) & hb.TopK(4)},
    "key-norm": lambda: {"gate": hb.KeyNorm(), "selector": hb.Threshold(-2.0) | hb.TopK(2)},
    "value-norm": lambda: {
        "gate": hb.SharedGate(hb.ValueNorm()),
        "selector": hb.Threshold(0.4) & hb.TopK(4),
        "attention": hb.SelectedAttention(conv_size=2, conv_values=True, qk_norm=False),
    },
    "entropy": lambda: {
        "gate": hb.PredictionEntropy(11),
        "selector": hb.Threshold(0.9) | hb.FirstTokens(1),
    },
    "random": lambda: {"gate": hb.RandomGate(1), "selector": hb.TopK(2) | hb.Window(3)},
    "periodic": lambda: {
        "gate": hb.PeriodicGate(3, 1),
        "selector": hb.Threshold(0.5) & hb.Window(8),
    },
    "window": lambda: {"selector": hb.Window(4)},
    "delay-growth": lambda: {
        "selector": hb.TopK(2, delay=3) & (hb.SublinearGrowth(0.6, max_tokens=10) | hb.Window(2))
    },
    "cooldown-budget": lambda: {
        "selector": hb.Budget(hb.Cooldown(_fixed_by_hand() | hb.TopK(3), 2) | hb.Window(2), 3)
    },
    "prompt-lowest": lambda: {
        "gate": hb.SharedGate(hb.PredictionError()),
        "selector": hb.PromptFraction(0.5, 6)
        & hb.Budget(hb.Cooldown(hb.Threshold(0.5), 2), 3, leaves="lowest"),
    },
    "mass": lambda: {
        "gate": hb.PredictionError("relative_l2"),
        "selector": hb.ErrorMass(0.6, 5) | hb.FirstTokens(1),
    },
    "reference": lambda: {
        "memory": hb.GatedDeltaMemory(impl="reference"),
        "selector": hb.TopK(3) | hb.FirstTokens(1),
        "attention": hb.SelectedAttention(impl="reference"),
    },
    "queries-when-surprised": lambda: {
        "selector": hb.Threshold(0.9) | hb.Window(3),
        "query_gate": hb.ThresholdQueries(hb.PredictionError(), 0.9),
    },
    "queries-by-a-router": lambda: {
        "gate": hb.PredictionError("l2"),
        "selector": hb.TopK(4),
        "query_gate": hb.ThresholdQueries(hb.SharedGate(hb.LearnedRouter()), 0.0, window=2),
    },
    "memory-of-its-own-size": lambda: {
        "memory": hb.GatedDeltaMemory(projections="own", num_heads=6, head_dim=2, expand_v=1.5),
        "gate": hb.SharedGate(hb.PredictionError()),
        "selector": hb.TopK(3),
        "combiner": hb.GatedSum(output_gate=True),
    },
    "memory-first": lambda: {
        "memory": hb.GatedDeltaMemory(
            3,
            projections="own",
            num_heads=6,
            num_k_heads=2,
            head_dim=2,
            expand_v=1.5,
            qk_l2norm_eps=1e-6,
        ),
        "selector": hb.TopK(3) | hb.Window(2),
        "attention": hb.SelectedAttention(partial_rotary_factor=0.5),
        "combiner": hb.ScaledSum(
            bias=True, start="memory", memory_gate="silu", attention_gate="sigmoid"
        ),
    },
    "taps-of-its-own": lambda: {
        "memory": hb.GatedDeltaMemory((1, 3, 2)),
        "selector": hb.Threshold(0.9) | hb.Window(2),
    },
    "memory-of-its-own-width": lambda: {
        "memory": hb.DeltaMemory(conv_init="identity", projections="own", expand_v=0.5),
        "selector": hb.Threshold(0.9) | hb.Window(2),
        "combiner": hb.SoftmaxMix(),
    },
    "memory-of-its-own-projections": lambda: {
        "memory": hb.GatedDeltaMemory(projections="own"),
        "selector": hb.Threshold(0.9) | hb.Window(2),
        "combiner": hb.SoftmaxMix(output_gate=True),
    },
    "memory-of-the-rest": lambda: {
        "memory": hb.UnstoredMemory(hb.GatedDeltaMemory(2)),
        "selector": hb.Threshold(0.9) & hb.Cooldown(hb.Threshold(0.9), 2),
    },
    "convolved-keys": lambda: {
        "memory": hb.GatedDeltaMemory(2, A_init_range=(1.0, 1.0), dt_min=0.002, dt_max=0.002),
        "selector": hb.Threshold(0.9) | hb.Window(2),
        "attention": hb.SelectedAttention(conv_size=2),
    },
    "null-sink": lambda: {
        "gate": hb.LearnedRouter(),
        "selector": hb.TopK(3) | hb.Window(2),
        "attention": hb.SelectedAttention(null_sink=True),
        "combiner": hb.GatedSum(read_norm=False),
    },
    "convolved-keys-and-values": lambda: {
        "selector": hb.TopK(3),
        "attention": hb.SelectedAttention(conv_size=4, conv_values=True),
    },
    "users-parity": lambda: {
        "gate": Parity(),
        "selector": AtLeast(0.5) | hb.Window(2),
        "combiner": Sum(),
    },
    "users-loudness": lambda: {"gate": Loudness(), "selector": hb.Threshold(0.2) & Smallest(3)},
}


class Size(NamedTuple):
    seed: int
    batch: int
    tokens: int
    heads: tuple[int, int]  # query heads, key/value heads


HEADS = [(1, 1), (2, 1), (4, 2), (3, 3)]
SIZES = st.builds(
    Size, st.integers(0, 2**16), st.integers(1, 2), st.integers(0, 14), st.sampled_from(HEADS)
)
EDGES = [Size(0, 2, 0, (2, 1)), Size(1, 1, 1, (1, 1)), Size(2, 2, 14, (4, 2))]
SEEDS = st.integers(0, 2**16)


def over_sizes(
    share: int = 1, **more: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test over drawn sizes, `1 / share` of the profile's number of them.

    Without `more` strategies, the test also runs over the degenerate sizes in `EDGES`.
    """
    examples = max(settings().max_examples // share, 2)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        if not more:
            for size in EDGES:
                test = example(size=size)(test)
        return settings(max_examples=examples)(given(size=SIZES, **more)(test))

    return decorate


def build(case: str, size: Size, dtype: torch.dtype = torch.float64) -> hb.HAMLayer:
    """The layer of a case, in eval mode.

    An initial value of a weight may hide a mistake, so every weight is moved by a random number.
    """
    torch.manual_seed(size.seed)
    heads, kv_heads = size.heads
    layer = hb.HAMLayer(4 * heads, heads, num_kv_heads=kv_heads, **CASES[case]())
    with torch.no_grad():
        for weight in layer.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return layer.to(dtype).eval()


def inputs(size: Size, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(size.seed)
    return torch.randn(size.batch, size.tokens, 4 * size.heads[0], generator=generator, dtype=dtype)


def rows_of(seed: int, lengths: Sequence[int], width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(length, width, generator=generator, dtype=torch.float64) for length in lengths
    ]


def pack(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Packs sequences `[T_n, ...]` into `[1, sum(T), ...]`, and returns that and the borders."""
    borders = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(torch.int32)
    return torch.cat(list(rows))[None], borders


def cuts(tokens: int, drawn: Sequence[int]) -> list[int]:
    """Borders of pieces; some pieces may be empty."""
    return [0, *sorted(min(cut, tokens) for cut in drawn), tokens]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def everyone_sees(tokens: int, kv_heads: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()[..., None].expand(-1, -1, kv_heads)


def sees(evict_at: Tensor, kv_heads: int) -> Tensor:
    """Whether query t sees token j, `[t, j, Hkv]`, from evict_at `[T, heads]` of one sequence."""
    t = torch.arange(len(evict_at))
    return ((t[:, None] >= t)[..., None] & (t[:, None, None] < evict_at[None])).expand(
        -1, -1, kv_heads
    )


class Plain(NamedTuple):
    y: Tensor
    residual: Tensor
    v: Tensor


def plain(layer: hb.HAMLayer, x: Tensor, visible: Tensor) -> Plain:
    """The oracle of a layer: a loop over tokens for the memory, a dense mask for attention.

    Args:
        layer: a layer with a memory and attention.
        x: `[T, hidden]`, one sequence.
        visible: bool `[T, T, Hkv]`, whether query t sees token j.
    """
    heads, kv_heads, dim = layer.dims[1:4]
    tokens = len(x)
    projected = [x @ proj.weight.T for proj in (layer.q_proj, layer.k_proj, layer.v_proj)]

    waits = isinstance(layer.memory, hb.UnstoredMemory)
    memory = layer.memory.inner if waits else layer.memory
    taps = memory.conv.weight
    if memory.conv.used is not None:
        taps = taps * memory.conv.used
    own, counts = projected, (heads, kv_heads, kv_heads)
    if memory.projections == "own":
        own = [x @ p.weight.T for p in (memory.q_proj, memory.k_proj, memory.v_proj)]
        own_heads = memory.num_heads or heads
        counts = (memory.num_k_heads or own_heads,) * 2 + (own_heads,)
    mixed = F.silu(convolved(torch.cat(own, 1), taps))
    widths = [part.shape[1] for part in own]
    mq, mk, mv = (
        part.unflatten(-1, (count, -1))
        for part, count in zip(mixed.split(widths, 1), counts, strict=True)
    )
    most = max(counts)
    mq, mk, mv = (part.repeat_interleave(most // part.shape[1], 1) for part in (mq, mk, mv))
    shortened = memory.qk_l2norm_eps
    mq, mk = (part / (part.square().sum(-1, keepdim=True) + shortened).sqrt() for part in (mq, mk))
    beta = torch.sigmoid(x @ memory.b_proj.weight.T) * (2 if memory.allow_neg_eigval else 1)
    decay = torch.ones_like(beta)
    if isinstance(memory, hb.GatedDeltaMemory):
        step = F.softplus(x @ memory.a_proj.weight.T + memory.dt_bias)
        decay = torch.exp(-memory.A_log.exp() * step)
    remembered, residuals = recalled(mq, mk, mv, beta, decay)
    if waits and tokens:
        # what the last query sees is stored for good: the selector of the case lists nothing else
        stored = visible[-1].repeat_interleave(mk.shape[1] // kv_heads, 1)
        remembered, _ = recalled(mq, mk, mv, beta.where(~stored, 0), decay)

    q, k, v = (part.unflatten(-1, (-1, dim)) for part in projected)
    attention = layer.attention
    if attention.conv_size > 1:
        taps = attention.conv.weight
        width = kv_heads * dim
        k = convolved(k.flatten(1), taps[:width]).view_as(k)
        if attention.conv_values:
            v = convolved(v.flatten(1), taps[width:]).view_as(v)
    if attention.qk_norm:
        q, k = rms(q, attention.q_norm), rms(k, attention.k_norm)
    if attention.rope_theta is not None:
        size = int(dim * attention.partial_rotary_factor)
        angle = torch.arange(tokens)[:, None] * attention.rope_theta ** (
            -torch.arange(size // 2).double() * 2 / size
        )
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        turned = (torch.complex(*part[..., :size].chunk(2, -1)) * turn for part in (q, k))
        q, k = (
            torch.cat([part.real, part.imag, whole[..., size:]], -1)
            for part, whole in zip(turned, (q, k), strict=True)
        )
    group = heads // kv_heads
    k, v, visible = (
        part.repeat_interleave(group, dim=-1 if part.dtype == torch.bool else 1)
        for part in (k, v, visible)
    )
    logits = torch.einsum("ihd,jhd->ijh", q, k) / dim**0.5
    router = getattr(layer.gate, "gate", layer.gate)
    if isinstance(router, hb.LearnedRouter):
        bias = F.logsigmoid(router.mlp(x))
        if router.gradient == "straight_through":
            bias = torch.zeros_like(bias)
        if router is not layer.gate:
            bias = bias.mean(1, keepdim=True)
        logits = logits + bias.expand(-1, kv_heads).repeat_interleave(group, 1)
    factor = x.new_ones(tokens)
    if layer.query_gate is not None:
        reads, factor = asked(layer, x, residuals, mv)
        age = torch.arange(tokens)[:, None] - torch.arange(tokens)
        near = (reads[:, None] | (age < layer.query_gate.window))[..., None]
        visible = visible & near
    weight = logits.exp() * visible
    null = x.new_zeros(heads)
    if attention.null_sink:
        null = attention.null.exp().repeat_interleave(group)
    weight = weight / (weight.sum(1, keepdim=True) + null).clamp(min=1e-300)
    attended = factor[:, None, None] * torch.einsum("ijh,jhd->ihd", weight, v)

    combiner = layer.combiner
    if isinstance(combiner, Sum):
        return Plain((remembered - attended).flatten(1), residuals, mv)
    reads = remembered, attended
    if combiner.read_norm:
        reads = rms(remembered, combiner.memory_norm), attended
        if combiner.attention_read_norm:
            reads = reads[0], rms(attended, combiner.attention_norm)
    if isinstance(combiner, hb.ScaledSum):
        activations = {None: torch.ones_like, "silu": F.silu, "sigmoid": torch.sigmoid}
        reads = tuple(
            read * activations[gate](logit.view(read.shape))
            for read, gate, logit in zip(
                reads,
                (combiner.memory_gate, combiner.attention_gate),
                (combiner.memory_g_proj(x), combiner.attention_g_proj(x)),
                strict=True,
            )
        )
    gates = x @ combiner.gate_proj.weight.T + combiner.gate_proj.bias
    squash = torch.sigmoid
    if isinstance(combiner, hb.ScaledSum):
        squash = torch.clone
    if isinstance(combiner, hb.SoftmaxMix):

        def squash(pair):
            return pair.softmax(-1)

    if reads[0].shape == reads[1].shape:
        gates = squash(gates.view(tokens, heads, 2))
        mixed = (gates[..., :1] * reads[0] + gates[..., 1:] * reads[1]).flatten(1)
    else:
        paired = reads[0].shape[1] == heads
        gates = gates.view(tokens, 2, heads).mT if paired else gates
        gates = squash(gates).mT.flatten(1) if paired else squash(gates)
        first, second = gates.split([read.shape[1] for read in reads], 1)
        mixed = torch.cat(
            [(first[..., None] * reads[0]).flatten(1), (second[..., None] * reads[1]).flatten(1)], 1
        )
    if combiner.output_gate:
        mixed = mixed * F.silu(x @ combiner.g_proj.weight.T)
    bias = 0 if combiner.o_proj.bias is None else combiner.o_proj.bias
    return Plain(mixed @ combiner.o_proj.weight.T + bias, residuals, mv)


def recalled(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """The delta rule in a loop over tokens: read and residual, `[T, H, D]`."""
    state = q.new_zeros(k.shape[1], k.shape[2], v.shape[2])
    read, residual = torch.zeros_like(v), torch.zeros_like(v)
    for t in range(len(q)):
        state = decay[t, :, None, None] * state
        residual[t] = v[t] - (k[t, :, :, None] * state).sum(1)
        state = state + beta[t, :, None, None] * k[t, :, :, None] * residual[t, :, None]
        read[t] = (q[t, :, :, None] * state).sum(1) / q.shape[2] ** 0.5
    return read, residual


def asked(layer: hb.HAMLayer, x: Tensor, residual: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Which queries read `[T]`, and the factor of every read `[T]`."""
    gate, tau = layer.query_gate.gate, layer.query_gate.controller.initial_tau
    if isinstance(gate, hb.PredictionError):
        score = 1 - F.cosine_similarity(v - residual, v, dim=-1)
        return score.mean(1) >= tau, x.new_ones(len(x))
    logit = gate.gate.mlp(x)
    reads = logit.mean(1) >= tau
    weight = F.logsigmoid(logit).mean(1).exp()
    return reads, torch.where(reads, weight, 1)


def convolved(x: Tensor, taps: Tensor) -> Tensor:
    """Causal depthwise convolution of x `[T, C]` with taps `[C, size]`; the last is the token's."""
    padded = F.pad(x, [0, 0, taps.shape[1] - 1, 0])
    return sum(padded[tap : tap + len(x)] * taps[:, tap] for tap in range(taps.shape[1]))


def rms(x: Tensor, norm: torch.nn.RMSNorm) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in a tree, such as a state, a ledger or the output of a layer."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return tensors(list(tree.values()))
    if isinstance(tree, (tuple, list)):
        return [tensor for part in tree for tensor in tensors(part)]
    return []


def content(state: hb.HAMState) -> list[list[tuple[Tensor, Tensor, int]]]:
    """Stored positions (ascending), their lifetimes, and their number, `[n][head]`."""
    stored, tokens = state.cache.stored(), state.cache.tokens

    def row(n: int, head: int) -> tuple[Tensor, Tensor, int]:
        there = stored.position[n, :, head] != NEVER
        position, order = stored.position[n, there, head].sort()
        return position, stored.evict_at[n, there, head][order], int(tokens[n, head])

    return [[row(n, head) for head in range(tokens.shape[1])] for n in range(tokens.shape[0])]


def same(a: Any, b: Any) -> bool:
    """Whether the tensors of two trees are equal."""
    a, b = tensors(a), tensors(b)
    return len(a) == len(b) and all(torch.equal(*pair) for pair in zip(a, b, strict=True))
