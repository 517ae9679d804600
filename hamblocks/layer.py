"""The HAM layer: a sequence mixer made of a memory, a gate, a selector, attention and a combiner, and nothing else."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hamblocks.attention import SelectedAttention
from hamblocks.cache import KVCache
from hamblocks.combiners import GatedSum
from hamblocks.gates import PredictionError
from hamblocks.memory import GatedDeltaMemory
from hamblocks.protocols import (
    Attention,
    Combiner,
    Gate,
    LayerDims,
    Memory,
    Selector,
    check_count,
    check_part,
)
from hamblocks.selectors import EMPTY, not_causal, start
from hamblocks.state import HAMState, leaves, tree_map
from hamblocks_ops.arguments import check_cu_seqlens, check_floating, check_tensor, wrong
from hamblocks_ops.packing import positions, sequence_of


class LayerStats(NamedTuple):
    """What a layer decided, for every token of the call.

    Attributes:
        score: `[B, T, Hkv or 1]`, what the selector was given.
        evict_at: int32, same shape: lifetimes as decided by the end of the call.
        position: int32 `[B, T]`, within the sequence.
        cu_seqlens: int32 `[N+1]`, or None.
    """

    score: Tensor
    evict_at: Tensor
    position: Tensor
    cu_seqlens: Tensor | None

    def keep_fraction(self) -> Tensor:
        """Fraction of the call's tokens still stored at the end of it, float32 `[]`; 0 where there was no token."""
        if self.position.numel() == 0:
            return self.score.new_zeros((), dtype=torch.float32)
        if self.cu_seqlens is None:
            last = self.position[:, -1:]
        else:
            sequence = sequence_of(self.cu_seqlens, self.position.shape[1])
            last = self.position[:, self.cu_seqlens.long()[1:][sequence] - 1]
        return (self.evict_at > last[..., None]).float().mean()


class LayerOutput(NamedTuple):
    """Result of a layer.

    Attributes:
        y: `[B, T, hidden]`, dtype of x.
        state: for the next call; None unless a state was given.
        stats: what was decided.
    """

    y: Tensor
    state: HAMState | None
    stats: LayerStats


class HAMLayer(nn.Module):
    """Sequence mixer of Hybrid Associative Memories (arXiv 2603.22325).

    Every token is projected to q, k, v and seen by the memory; the gate scores how badly the memory predicted it, the
    selector turns scores into lifetimes in the cache, softmax attention runs over what is stored, and the combiner
    joins both reads.

        HAMLayer(512, 8, gate=PredictionError("cosine"), selector=Threshold(TargetFraction(0.5)) | Window(64))
    """

    memory: Memory
    gate: Gate
    selector: Selector
    attention: Attention
    combiner: Combiner

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        selector: Selector,
        gate: Gate | None = None,
        memory: Memory | None = None,
        attention: Attention | None = None,
        combiner: Combiner | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
    ) -> None:
        """Builds the layer from its parts; each part belongs to one layer.

        Args:
            hidden_size: width of x.
            num_heads: query heads, and heads of the memory.
            selector: scores to lifetimes, e.g. `Threshold(TargetFraction(0.5)) | Window(64)`.
            gate: what a token's score is; None: `PredictionError("cosine")`.
            memory: the recurrence; None: `GatedDeltaMemory()`.
            attention: None: `SelectedAttention()`.
            combiner: None: `GatedSum()`.
            num_kv_heads: key/value heads, a divisor of num_heads; each decides for itself what it stores. None:
                num_heads.
            head_dim: None: hidden_size // num_heads.

        Raises:
            ValueError: sizes that do not divide, a selector that is not causal, a part that another layer owns, or
                something that is no part.
        """
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, value in (
            ("hidden_size", hidden_size),
            ("num_heads", num_heads),
            ("num_kv_heads", num_kv_heads),
        ):
            check_count(name, value, 1)
        if num_heads % num_kv_heads:
            raise wrong("num_kv_heads", f"a divisor of num_heads = {num_heads}", str(num_kv_heads))
        if head_dim is None:
            if hidden_size % num_heads:
                raise wrong(
                    "hidden_size",
                    f"a multiple of num_heads = {num_heads}, or head_dim",
                    str(hidden_size),
                )
            head_dim = hidden_size // num_heads
        check_count("head_dim", head_dim, 1)
        acausal = not_causal(selector)
        if acausal is not None:
            raise ValueError(
                f"selector: expected one that decides from the past, got {acausal} with causal = False"
            )
        self.dims = LayerDims(hidden_size, num_heads, num_kv_heads, head_dim)
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        parts: dict[str, Any] = {
            "memory": GatedDeltaMemory() if memory is None else memory,
            "gate": PredictionError() if gate is None else gate,
            "selector": selector,
            "attention": SelectedAttention() if attention is None else attention,
            "combiner": GatedSum() if combiner is None else combiner,
        }
        for name, part in parts.items():
            check_part(name, part)
        for name, part in parts.items():
            build = getattr(part, "build", None)
            if build is not None:
                build(self.dims)
            setattr(self, name, part)

    def init_state(
        self, sequences: int, *, page_size: int = 32, max_pages: int | None = None
    ) -> HAMState:
        """The state before the first token, to call the layer piece by piece.

        Args:
            sequences: N.
            page_size: tokens in a page of the cache.
            max_pages: the most pages its pool may grow to; None: no limit.

        Raises:
            ValueError: a size is no integer or too small.
        """
        check_count("sequences", sequences)
        device = self.k_proj.weight.device
        _, k, _, _, _, score, bias = self._nothing(sequences)
        return HAMState(
            position=torch.zeros(sequences, dtype=torch.int32, device=device),
            memory=None,
            ledger=start(self.selector, sequences, score.shape[2], device),
            cache=KVCache.empty(
                sequences,
                self.dims.num_kv_heads,
                self.dims.head_dim,
                k,
                shared=_rows(score, bias) == 1,
                logit_bias=bias is not None,
                page_size=page_size,
                max_pages=max_pages,
            ),
        )

    @torch.no_grad()
    def _nothing(
        self, sequences: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Any, Tensor, Tensor | None]:
        """What `_scored` gives for pieces without a token: shapes, dtypes, and the memory's state before the first."""
        x = self.k_proj.weight.new_empty(sequences, 0, self.dims.hidden_size)
        return self._scored(
            x, torch.zeros(sequences, 0, dtype=torch.int32, device=x.device), None, None
        )

    def reset(self, state: HAMState, sequences: Tensor) -> HAMState:
        """The state after some sequences began anew, so that others may take their place; checkpoints are dropped.

        Args:
            state: it is spent.
            sequences: bool `[N]`.

        Raises:
            ValueError: a bad argument.
        """
        cache = state.cache.reset(sequences)
        *_, fresh, score, _ = self._nothing(len(sequences))

        def renewed(old: Tensor, new: Tensor) -> Tensor:
            return torch.where(sequences.view(-1, *[1] * (old.dim() - 1)), new.to(old.dtype), old)

        memory = None if state.memory is None else tree_map(renewed, state.memory, fresh)
        ledger = tree_map(
            renewed,
            state.ledger,
            start(self.selector, len(sequences), score.shape[2], score.device),
        )
        return HAMState(state.position.masked_fill(sequences, 0), memory, ledger, cache)

    def load_state(self, saved: dict[str, Any]) -> HAMState:
        """The state that `HAMState.state_dict()` saved of this layer, on the layer's device.

        Raises:
            ValueError: it is of another layer.
        """
        device, sequences = self.k_proj.weight.device, len(saved["position"])
        *_, memory, score, _ = self._nothing(sequences)

        def filled(name: str, like: Any) -> Any:
            values = iter(saved[name])
            if len(list(leaves(like))) != len(saved[name]):
                raise wrong(
                    name,
                    f"{len(list(leaves(like)))} tensors, as this layer's",
                    f"{len(saved[name])}",
                )
            return tree_map(lambda _: next(values).to(device), like)

        state = HAMState(
            saved["position"].to(device),
            None if saved["memory"] is None else filled("memory", memory),
            filled("ledger", start(self.selector, sequences, score.shape[2], device)),
            KVCache.load(saved["cache"], device),
        )
        self._check_state(state, len(state.position))
        return state

    def prefill(
        self, x: Tensor, state: HAMState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> LayerOutput:
        """`forward` with a state, a new one where none is given: the next piece of every sequence, of any size."""
        if state is None:
            check_tensor("x", x, "[B, T, hidden]", [None, None, self.dims.hidden_size])
            state = self.init_state(x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        return self.forward(x, state=state, cu_seqlens=cu_seqlens)

    def decode(self, x: Tensor, state: HAMState) -> LayerOutput:
        """`forward` for the next token of every sequence: x `[N, hidden]` -> y `[N, hidden]`."""
        check_tensor("x", x, "[N, hidden]", [None, self.dims.hidden_size])
        result = self.forward(x[:, None], state=state)
        return result._replace(y=result.y[:, 0])

    def forward(
        self, x: Tensor, *, state: HAMState | None = None, cu_seqlens: Tensor | None = None
    ) -> LayerOutput:
        """Mixes a batch, or its next piece.

        Args:
            x: `[B, T, hidden]`; packed: `[1, sum(T), hidden]`.
            state: from `init_state(N)` or the last call, to go on where it ended; it is spent (see `HAMState`). What
                earlier calls stored passes no gradient, the memory does. None: whole sequences.
            cu_seqlens: int32 `[N+1]`, borders of N sequences packed into one row.

        Raises:
            ValueError: a bad argument; the message names it, what was expected and what came.
        """
        self._check(x, state, cu_seqlens)
        batch, tokens = x.shape[:2]
        position = positions(batch, tokens, device=x.device, cu_seqlens=cu_seqlens)
        if state is not None:
            begin = (
                state.position[:, None]
                if cu_seqlens is None
                else state.position[sequence_of(cu_seqlens, tokens)]
            )
            position = position + begin
        q, k, v, memory_read, memory, score, logit_bias = self._scored(
            x, position, state, cu_seqlens
        )
        if state is None:
            evict_at = self.selector(score, position=position, cu_seqlens=cu_seqlens).evict_at
            read, _ = self.attention(
                q, k, v, evict_at, position=position, logit_bias=logit_bias, cu_seqlens=cu_seqlens
            )
            y = self.combiner(x, memory_read, read)
            return LayerOutput(y, None, LayerStats(score, evict_at, position, cu_seqlens))
        self._check_cache(state.cache, k, score, logit_bias)
        pieces = _Pieces(cu_seqlens, state.position.shape[0], tokens)
        where = pieces.apart(position, EMPTY)
        selection = self.selector(pieces.apart(score, 0), state.ledger, position=where)
        read, cache = self.attention(
            pieces.apart(q, 0),
            pieces.apart(k, 0),
            pieces.apart(v, 0),
            selection.evict_at,
            position=where,
            logit_bias=None if logit_bias is None else pieces.apart(logit_bias, 0),
            cache=state.cache.lower(selection.lowered),
        )
        y = self.combiner(x, memory_read, pieces.together(read))
        seen = (
            torch.maximum(state.position, where.amax(1) + 1) if where.shape[1] else state.position
        )
        # the one thing that changes in place, when nothing can fail any more
        state = HAMState(seen, memory, selection.ledger, cache.commit(seen), state.marks)
        return LayerOutput(
            y, state, LayerStats(score, pieces.together(selection.evict_at), position, cu_seqlens)
        )

    def _scored(
        self, x: Tensor, position: Tensor, state: HAMState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Any, Tensor, Tensor | None]:
        """q, k, v, what the memory reads, its state, the score and the logit bias, of a batch or packed."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.dims.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        read, trace, memory = self.memory(
            x,
            q,
            k,
            v,
            position=position,
            state=None if state is None else state.memory,
            cu_seqlens=cu_seqlens,
            metric=getattr(self.gate, "metric", None),
        )
        score, logit_bias = self.gate(x, trace)
        return q, k, v, read, memory, *self._per_kv_head(x, score, logit_bias)

    def _per_kv_head(
        self, x: Tensor, score: Tensor, logit_bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Checks what the gate returned and averages the scores of the query heads of a key/value head."""
        heads, kv_heads = self.dims.num_heads, self.dims.num_kv_heads
        check_tensor("score", score, "[B, T, heads]", [*x.shape[:2], None], like=x)
        if score.shape[2] not in (1, kv_heads, heads):
            raise wrong(
                "score", f"1, {kv_heads} or {heads} heads from the gate", f"{score.shape[2]} heads"
            )
        if logit_bias is not None:
            check_tensor("logit_bias", logit_bias, "[B, T, heads]", [*x.shape[:2], None], like=x)
            if logit_bias.shape[2] not in (1, kv_heads):
                raise wrong(
                    "logit_bias",
                    f"1 or {kv_heads} heads from the gate",
                    f"{logit_bias.shape[2]} heads",
                )
        score = score.detach()
        if score.shape[2] in (1, kv_heads):
            return score, logit_bias
        return score.unflatten(2, (kv_heads, heads // kv_heads)).mean(3), logit_bias

    def _check(self, x: Tensor, state: HAMState | None, cu_seqlens: Tensor | None) -> None:
        check_tensor("x", x, "[B, T, hidden]", [None, None, self.dims.hidden_size])
        check_floating("x", x)
        weight = self.q_proj.weight
        if x.device != weight.device:
            raise wrong("x", f"device {weight.device}, as the layer", x)
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise wrong("x", f"dtype {str(weight.dtype).removeprefix('torch.')}, as the layer", x)
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1], x)
        if state is not None:
            self._check_state(state, x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)

    def _check_state(self, state: HAMState, sequences: int) -> None:
        if not isinstance(state, HAMState):
            raise wrong("state", "a HAMState", type(state).__name__)
        state.cache.check()
        if state.position.shape[0] != sequences:
            raise wrong(
                "state", f"one of {sequences} sequences", f"one of {state.position.shape[0]}"
            )
        sizes = [self.dims.num_kv_heads, self.dims.head_dim]
        got = [state.cache.kv_heads, state.cache.head_dim]
        if got != sizes:
            raise wrong("state", f"[Hkv, D] = {sizes}, as the layer", f"{got}")

    def _check_cache(
        self, cache: KVCache, k: Tensor, score: Tensor, logit_bias: Tensor | None
    ) -> None:
        """Checks what the parts' results show only now."""
        if (logit_bias is None) == cache.has_bias:
            without = "without" if logit_bias is None else "with"
            raise wrong("state", f"one {without} logit biases, as the gate", "the other")
        if cache.dtype != k.dtype:
            raise wrong(
                "state", f"a cache of {k.dtype}, as keys and values here", f"one of {cache.dtype}"
            )
        rows = _rows(score, logit_bias)
        if cache.row_heads != rows:
            raise wrong(
                "state",
                f"a cache with {rows} rows per sequence, as the gate's heads",
                f"{cache.row_heads}",
            )


def _rows(score: Tensor, logit_bias: Tensor | None) -> int:
    """Rows of the cache per sequence: 1 where all that is decided and stored is the same for every head."""
    return max(x.shape[2] for x in (score, logit_bias) if x is not None)


class _Pieces:
    """Packed pieces `[1, sum(T), ...]` and the same as rows `[N, max(T), ...]`; a batch is its own rows."""

    def __init__(self, cu_seqlens: Tensor | None, sequences: int, tokens: int) -> None:
        self.packed = cu_seqlens is not None
        self.sequences = sequences
        if cu_seqlens is not None:
            borders = cu_seqlens.long()
            self.sequence = sequence_of(cu_seqlens, tokens)
            self.offset = torch.arange(tokens, device=borders.device) - borders[self.sequence]
            self.longest = int(borders.diff().amax()) if sequences else 0

    def apart(self, x: Tensor, fill: float) -> Tensor:
        if not self.packed:
            return x
        rows = x.new_full((self.sequences, self.longest, *x.shape[2:]), fill)
        return rows.index_put((self.sequence, self.offset), x[0])

    def together(self, x: Tensor) -> Tensor:
        return x[self.sequence, self.offset][None] if self.packed else x
