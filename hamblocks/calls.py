"""How a layer calls its parts: one method per part, which checks what the part returned."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hamblocks import contracts
from hamblocks.assembly import is_own
from hamblocks.gated_read import gated_read
from hamblocks.keys import Keys
from hamblocks.ledger import EMPTY
from hamblocks.own_weights import check_within_reach
from hamblocks.protocols import (
    Attention,
    Combiner,
    Gate,
    GateOutput,
    LayerDims,
    Memory,
    MemoryTrace,
    NewTokens,
    QueryGate,
    QueryGateOutput,
    Selection,
    Selector,
)
from hamblocks.zero_gradients import with_zero_gradients
from hamblocks_ops import NEVER
from hamblocks_ops.arguments import wrong
from hamblocks_ops.context import arguments_are_checked
from hamblocks_ops.precision import detached


class Projected(NamedTuple):
    """q `[B, T, H, D]`, k and v `[B, T, Hkv, D]`, projected from x."""

    q: Tensor
    k: Tensor
    v: Tensor


class CallsParts(nn.Module):
    """A module with the parts of a layer."""

    dims: LayerDims
    memory: Memory | None
    gate: Gate | None
    selector: Selector | None
    query_gate: QueryGate | None
    attention: Attention | None
    combiner: Combiner
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    _memory_projects: bool

    def __init__(self) -> None:
        super().__init__()
        self._is_own: dict[str, tuple[object, bool]] = {}

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a part.

        The layer has checked the arguments, so the ops inside parts of hamblocks do not check them
        again. A user-defined part may call ops with other arguments, so its ops do check them.
        """
        part = getattr(self, name)
        if torch.compiler.is_compiling():  # checks cost nothing at run time then
            return part(*args, **kwargs)
        known = self._is_own.get(name)
        if known is None or known[0] is not part:
            known = self._is_own[name] = part, is_own(part)
        if not known[1]:
            return part(*args, **kwargs)
        with arguments_are_checked():
            return part(*args, **kwargs)

    def _projected(self, x: Tensor) -> Projected | None:
        """q, k and v, if attention or the memory uses them."""
        if self._memory_projects and not self.dims.has_attention:
            return None
        if x.shape[1] == 1:  # decoding: a linear map of a matrix takes fewer ops
            one, sizes = x[:, 0], (len(x), 1, -1, self.dims.head_dim)
            q, k, v = self.q_proj(one), self.k_proj(one), self.v_proj(one)
            return Projected(q.view(sizes), k.view(sizes), v.view(sizes))
        size = -1, self.dims.head_dim
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return Projected(q.unflatten(-1, size), k.unflatten(-1, size), v.unflatten(-1, size))

    def _remembered(
        self,
        x: Tensor,
        projected: Projected | None,
        position: Tensor,
        past: Any,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor | None, MemoryTrace, Any]:
        """The read of the memory, its trace and its next state; without a memory, only a trace."""
        if self.memory is None:
            assert projected is not None
            _, k, v = projected
            group = self.dims.num_heads // self.dims.num_kv_heads
            k, v = (x if group == 1 else x.repeat_interleave(group, 2) for x in (k, v))
            return None, MemoryTrace(k, v, None, None, None, position), None
        metric: str | None = getattr(self.gate, "metric", None)  # HasMetric
        # the memory computes the metric that all gates name; if they differ it writes the residual
        if self.query_gate is not None and metric != getattr(self.query_gate, "metric", None):
            metric = None
        given = {"position": position, "state": past, "cu_seqlens": cu_seqlens, "metric": metric}
        shared = None if self._memory_projects else projected
        tokens = (None, None, None) if shared is None else shared
        result: tuple[Tensor, MemoryTrace, Any] = self._call("memory", x, *tokens, **given)
        contracts.check_memory(result, x, self.dims, metric)
        read, trace, state = result
        if metric is not None and trace.metric is None:  # a memory that does not say what it scored
            trace = trace._replace(metric=metric)
        return read, trace, state

    def _read_unstored(
        self, trace: MemoryTrace, evict_at: Tensor, state: Any, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Any]:
        """The read of a memory that waits for the selector, and its state (see `ReadsUnstored`)."""
        heads = self.dims.memory_read[0]
        stored = _of_heads(evict_at == NEVER, heads)
        result: tuple[Tensor, Any] = self.memory.read_unstored(  # type: ignore[union-attr]
            trace, stored, state=state, cu_seqlens=cu_seqlens
        )
        contracts.check_unstored(result, trace, self.dims)
        return result

    def _asked(self, x: Tensor, trace: MemoryTrace) -> QueryGateOutput:
        """Which queries read, by the query gate."""
        assert self.query_gate is not None
        result: QueryGateOutput = self._call("query_gate", x, trace.scored_for(self.query_gate))
        contracts.check_query_gate(result, x)
        return result

    def _scored(self, x: Tensor, trace: MemoryTrace) -> tuple[Tensor, Tensor | None]:
        """Scores `[B, T, Hkv or 1]`, averaged over the query heads of a group, and logit biases."""
        if self.gate is None:
            return torch.zeros(*x.shape[:2], 1, device=x.device), None
        if self.query_gate is not None:  # the two may name different metrics
            trace = trace.scored_for(self.gate)
        result: GateOutput = self._call("gate", x, trace)
        contracts.check_gate(result, x, self.dims)
        score, logit_bias = detached(result.score), result.logit_bias
        heads, kv_heads = score.shape[2], self.dims.num_kv_heads
        if heads == 1 or heads == kv_heads:
            return score, logit_bias
        if heads < kv_heads:  # a memory with fewer heads than attention has key/value heads
            return score.repeat_interleave(kv_heads // heads, 2), logit_bias
        return score.unflatten(2, (kv_heads, -1)).mean(3), logit_bias

    def _selected(
        self, score: Tensor, ledger: Any, position: Tensor, cu_seqlens: Tensor | None
    ) -> Selection:
        """The lifetimes of the selector; position -1 is padding."""
        if self.selector is None:
            kept = torch.where(position < 0, EMPTY, NEVER).to(torch.int32)
            return Selection(kept[..., None].expand(score.shape))
        given = {"position": position, "cu_seqlens": cu_seqlens}
        result: Selection = self._call("selector", score, ledger, **given)
        contracts.check_selection(result, score)
        return result

    def _prepared(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: Any,
        position: Tensor,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Queries, keys and values after `prepare` of the attention part, and its next state."""
        part: Any = self.attention
        prepare = getattr(part, "prepare", None)  # PreparesTokens
        if prepare is None:
            return q, k, v, None
        # what others hang on the part's own call must happen before its parameters are used
        hooked = isinstance(part, nn.Module) and (
            part._forward_pre_hooks or "forward" in vars(part)
        )
        result: tuple[Tensor, Tensor, Tensor, Any]
        if hooked and getattr(part, "prepares_when_called", False):  # PreparesWhenCalled
            result = self._call("attention", q, NewTokens(k, v, position, past, cu_seqlens))
        else:
            if hooked:
                check_within_reach(part)
            result = prepare(q, k, v, position=position, state=past, cu_seqlens=cu_seqlens)
        contracts.check_prepared(result, q, k, v)
        return result

    def _attended(self, q: Tensor, keys: Keys, decision: QueryGateOutput | None) -> Tensor:
        """The read of attention, for the queries that the query gate lets read."""
        runs = False

        def attend(q: Tensor, keys: Keys) -> Tensor:
            nonlocal runs
            runs = True
            read: Tensor = self._call("attention", q, keys)
            contracts.check_attention(read, q)
            return read

        if decision is None:
            return attend(q, keys)
        read = gated_read(attend, q, keys, decision)
        return read if runs else with_zero_gradients(read, self.parameters())

    def _combined(
        self, x: Tensor, memory_read: Tensor | None, attention_read: Tensor | None
    ) -> Tensor:
        y: Tensor = self._call("combiner", x, memory_read, attention_read)
        contracts.check_combiner(y, x)
        return y


def _of_heads(stored: Tensor, heads: int) -> Tensor:
    """`stored`, bool `[B, T, 1 or Hkv]`, for every head of a memory: `[B, T, heads]`.

    A head that serves several key/value heads has stored what all of them have.

    Raises:
        ValueError: the heads of neither serve those of the other evenly.
    """
    deciding = stored.shape[2]
    if heads % deciding == 0:
        return stored.repeat_interleave(heads // deciding, 2)
    if deciding % heads:
        expected = f"one decision per token (SharedGate), or a multiple or divisor of {deciding}"
        raise wrong("num_heads of the memory", expected, str(heads))
    by_head: Tensor = stored.unflatten(2, (heads, -1))
    return by_head.all(3)
