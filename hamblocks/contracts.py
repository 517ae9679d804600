"""Checks what each part of a layer returned, and whether a state fits the layer."""

from __future__ import annotations

import torch
from torch import Tensor

from hamblocks.cache import CacheSizes
from hamblocks.protocols import (
    GateOutput,
    LayerDims,
    Lifetimes,
    MemoryTrace,
    QueryGateOutput,
    Selection,
)
from hamblocks.state import HAMState
from hamblocks_ops.arguments import check_tensor, wrong


def check_memory(result: object, x: Tensor, dims: LayerDims, metric: str | None) -> None:
    """Checks what the memory returned for x `[B, T, hidden_size]`.

    Raises:
        ValueError: it is not (read, MemoryTrace, state), a shape is wrong, or it ignored `metric`.
    """
    if not isinstance(result, tuple) or len(result) != 3 or not isinstance(result[1], MemoryTrace):
        raise wrong("memory", "(read, MemoryTrace, state) from its call", _kind(result))
    read, trace, _ = result
    batch, tokens = x.shape[:2]
    heads, dim = dims.memory_read
    _check_read("memory", read, [batch, tokens, heads, dim])
    for name in ("k", "v"):
        _check_shape(f"memory: trace.{name}", getattr(trace, name), [batch, tokens, heads, None])
    if metric is not None and trace.score is None:
        expected = f"trace.score from a memory called with metric={metric!r}, as the gate asks"
        raise wrong("memory", expected, "None (the memory ignores `metric`)")
    if trace.score is not None:
        _check_shape("memory: trace.score", trace.score, [batch, tokens, heads])


def check_unstored(result: object, trace: MemoryTrace, dims: LayerDims) -> None:
    """Checks what `read_unstored` of the memory returned.

    Raises:
        ValueError: it is not (read, state), or the shape of the read is wrong.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise wrong("memory", "(read, state) from read_unstored", _kind(result))
    _check_read("memory", result[0], [*trace.k.shape[:2], *dims.memory_read])


def check_gate(result: object, x: Tensor, dims: LayerDims) -> None:
    """Checks what the gate returned for x `[B, T, hidden_size]`.

    Raises:
        ValueError: it is not a GateOutput, has a wrong number of tokens or heads, or is not
            floating.
    """
    if not isinstance(result, GateOutput):
        raise wrong("gate", "GateOutput(score, logit_bias) from its call", _kind(result))
    score, logit_bias = result
    rows = list(x.shape[:2])
    check_tensor("score", score, "[B, T, heads] from the gate", [*rows, None], like=x)
    if not score.is_floating_point():
        raise wrong("score", "a floating-point dtype from the gate", score)
    allowed = {1, dims.num_kv_heads, dims.num_heads}
    memory_heads, _ = dims.memory_read
    if memory_heads % dims.num_kv_heads == 0 or dims.num_kv_heads % memory_heads == 0:
        allowed.add(memory_heads)
    if score.shape[2] not in allowed:
        counts = ", ".join(map(str, sorted(allowed)))
        raise wrong("score", f"one of {counts} heads from the gate", f"{score.shape[2]} heads")
    if logit_bias is None:
        return
    check_tensor("logit_bias", logit_bias, "[B, T, heads] from the gate", [*rows, None], like=x)
    if not logit_bias.is_floating_point():
        raise wrong("logit_bias", "a floating-point dtype from the gate", logit_bias)
    if logit_bias.shape[2] != 1 and logit_bias.shape[2] != dims.num_kv_heads:
        expected = f"1 or {dims.num_kv_heads} heads from the gate"
        raise wrong("logit_bias", expected, f"{logit_bias.shape[2]} heads")


def check_query_gate(result: object, x: Tensor) -> None:
    """Checks what the query gate returned for x `[B, T, hidden_size]`.

    Raises:
        ValueError: it is not a QueryGateOutput, or a shape or dtype is wrong.
    """
    if not isinstance(result, QueryGateOutput):
        expected = "QueryGateOutput(reads, weight, window) from its call"
        raise wrong("query_gate", expected, _kind(result))
    reads, weight, window = result
    batch, tokens = x.shape[:2]
    if not isinstance(reads, Tensor) or reads.dtype != torch.bool:
        raise wrong("query_gate", f"reads bool {[batch, tokens]}", _kind(reads))
    _check_shape("query_gate: reads", reads, [batch, tokens])
    if weight is not None:
        _check_shape("query_gate: weight", weight, [batch, tokens, 1])
        if not weight.is_floating_point():
            raise wrong("query_gate", "a floating weight", _kind(weight))
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        raise wrong("query_gate", "window: an integer >= 0", repr(window))


def check_selection(result: object, score: Tensor) -> None:
    """Checks what the selector returned for scores `[B, T, heads]`.

    Raises:
        ValueError: it is not a Selection, or its lifetimes are not int32 of the score's shape, or
            those that it lowered not int32 `[B, L, heads]`.
    """
    if not isinstance(result, Selection):
        raise wrong("selector", "Selection(evict_at, ...) from its call", _kind(result))
    evict_at = result.evict_at
    is_right = (
        isinstance(evict_at, Tensor)
        and evict_at.shape == score.shape
        and evict_at.dtype == torch.int32
    )
    if result.lowered is not None and not isinstance(result.lowered, Lifetimes):
        raise wrong(
            "selector", "lowered: Lifetimes(position, evict_at) or None", _kind(result.lowered)
        )
    if result.lowered is not None:
        position, until = result.lowered
        fits = (
            isinstance(position, Tensor)
            and isinstance(until, Tensor)
            and position.dtype == until.dtype == torch.int32
            and position.shape == until.shape
            and position.dim() == 3
            and position.shape[::2] == score.shape[::2]
        )
        if not fits:
            sizes = f"[{score.shape[0]}, L, {score.shape[2]}]"
            expected = f"lowered: position and evict_at, both int32 {sizes}"
            raise wrong("selector", expected, _kind((position, until)))
    if result.ledger is not None and not hasattr(result.ledger, "position"):
        raise wrong("selector", "a ledger with a field position, or None", _kind(result.ledger))
    if not is_right:
        expected = f"evict_at int32 {list(score.shape)}, positions and no mask"
        raise wrong("selector", expected, _kind(evict_at))


def check_prepared(result: object, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Checks what `prepare` of the attention part returned.

    Raises:
        ValueError: it is not (q, k, v, state), with q, k and v in the given shapes and dtypes.
    """
    if not isinstance(result, tuple) or len(result) != 4:
        raise wrong("attention", "(q, k, v, state) from prepare", _kind(result))
    for name, got, given in zip(("q", "k", "v"), result, (q, k, v), strict=False):
        if not isinstance(got, Tensor) or got.shape != given.shape or got.dtype != given.dtype:
            expected = f"{name} from prepare as it was given, {_kind(given)}"
            raise wrong("attention", expected, _kind(got))


def check_attention(read: object, q: Tensor) -> None:
    """Checks what the attention part returned for queries `[B, T, H, D]`.

    Raises:
        ValueError: it is not a tensor of the shape of q.
    """
    _check_read("attention", read, list(q.shape))


def check_combiner(y: object, x: Tensor) -> None:
    """Checks what the combiner returned for x `[B, T, hidden_size]`.

    Raises:
        ValueError: it is not a tensor of the shape of x.
    """
    if not isinstance(y, Tensor) or y.shape != x.shape:
        expected = f"y [B, T, hidden_size] = {list(x.shape)} from its call"
        raise wrong("combiner", f"{expected} (does it project the reads?)", _kind(y))


def check_state(state: object, dims: LayerDims, sequences: int) -> None:
    """Checks that a layer of sizes `dims` can continue `sequences` sequences from a state.

    Raises:
        ValueError: it is not a HAMState, is spent, or belongs to another layer or batch size.
    """
    if not isinstance(state, HAMState):
        raise wrong("state", "a HAMState", type(state).__name__)
    if len(state.position) != sequences:
        raise wrong("state", f"one of {sequences} sequences", f"one of {len(state.position)}")
    if (state.cache is not None) != dims.has_attention:
        expected = "one with a cache" if dims.has_attention else "one without a cache"
        raise wrong("state", f"{expected}, as of this layer", "the other")
    if state.cache is None:
        return
    state.cache.check()
    sizes = state.cache.sizes
    if sizes is not None:
        wanted, got = [dims.num_kv_heads, dims.head_dim], [sizes.num_kv_heads, sizes.head_dim]
        if got != wanted:
            raise wrong("state", f"[Hkv, D] = {wanted}, as the layer", f"{got}")


def check_begun(state: HAMState, **later: object) -> None:
    """Checks that a state with tokens has states of the same parts as the layer.

    Args:
        state: what a call began with.
        later: the states of memory and attention after it, by their names in `state`.

    Raises:
        ValueError: a part has a state now and had none, or the reverse.
    """
    if state.cache is None or state.cache.sizes is None:  # before its first token
        return
    for name, after in later.items():
        if (getattr(state, name) is None) != (after is None):
            expected = "None" if after is None else "a state"
            raise wrong(f"state.{name}", f"{expected}, as of this layer's {name}", "the other")


def check_cache(
    sizes: CacheSizes | None, k: Tensor, score: Tensor, logit_bias: Tensor | None
) -> None:
    """Checks that a cache can store tokens with these keys, scores and biases.

    Raises:
        ValueError: dtype, device or the number of heads of scores and biases differ from the cache,
            or only one of the two has logit biases.
    """
    if sizes is None:
        return
    if (logit_bias is None) == sizes.logit_bias:
        without = "without" if logit_bias is None else "with"
        raise wrong("state", f"one {without} logit biases, as the gate", "the other")
    if sizes.dtype != k.dtype:
        expected = f"a cache of {k.dtype}, as keys and values here"
        raise wrong("state", expected, f"one of {sizes.dtype}")
    if sizes.device != k.device:
        raise wrong("state", f"a cache on {k.device}, as keys here", f"one on {sizes.device}")
    heads = max(x.shape[2] for x in (score, logit_bias) if x is not None)
    if sizes.streams != heads:
        expected = f"a cache with {heads} streams per sequence, as the gate has heads"
        raise wrong("state", expected, f"{sizes.streams}")


def _check_read(name: str, read: object, sizes: list[int]) -> None:
    if not isinstance(read, Tensor) or list(read.shape) != sizes:
        raise wrong(name, f"a read [B, T, H, D] = {sizes} from its call", _kind(read))


def _check_shape(name: str, value: object, sizes: list[int | None]) -> None:
    fits = (
        isinstance(value, Tensor)
        and value.dim() == len(sizes)
        and all(want in (None, got) for want, got in zip(sizes, value.shape, strict=True))
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise wrong(name, f"a tensor [{wanted}]", _kind(value))


def _kind(value: object) -> str:
    """Short form of a value for messages: dtype and shape, the entries of a tuple, or the type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return "(" + ", ".join(_kind(entry) for entry in value) + ")"
    return "None" if value is None else type(value).__name__
