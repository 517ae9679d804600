"""The HAM layer: memory, gate, selector, attention and combiner, and the cache between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hamblocks import contracts
from hamblocks.assembly import (
    DEFAULT,
    OrDefault,
    dims_of,
    parts_of,
    projects_itself,
    warn_of_unsaved,
)
from hamblocks.cache import Extension, KVCache, dry_run
from hamblocks.cache.checks import check_sequences
from hamblocks.calls import CallsParts
from hamblocks.graphed import GraphedDecode
from hamblocks.heads import Split, shared_call
from hamblocks.keys import DenseKeys
from hamblocks.ledger import EMPTY
from hamblocks.outputs import LayerExplanation, LayerOutput, LayerStats
from hamblocks.own_weights import check_like_weights, check_present
from hamblocks.parallel.heads import HeadSplit, local_dims
from hamblocks.parallel.layer import call_sharded, check_sharded
from hamblocks.parallel.shard import ContextShard
from hamblocks.pieces import Pieces
from hamblocks.protocols import (
    PARTS,
    Attention,
    Buildable,
    Combiner,
    Gate,
    HasLedger,
    Memory,
    QueryGate,
    QueryGateOutput,
    ReadsUnstored,
    Selector,
    check_count,
)
from hamblocks.reachable import hidden_modules
from hamblocks.rollback import call_and_record
from hamblocks.saved import load
from hamblocks.selectors import start
from hamblocks.state import HAMState, Ring, tree_map
from hamblocks.zero_gradients import with_zero_gradients
from hamblocks_ops.arguments import check_cu_seqlens, check_floating, check_tensor, wrong
from hamblocks_ops.context import arguments_are_checked, recorded_choices
from hamblocks_ops.packing import positions, sequence_of, unpadded


class _Call(NamedTuple):
    """The projected and prepared tokens of one call, with their scores."""

    q: Tensor
    k: Tensor
    v: Tensor
    score: Tensor
    logit_bias: Tensor | None
    position: Tensor
    cu_seqlens: Tensor | None
    decision: QueryGateOutput | None


class _Step(NamedTuple):
    """The attention read of a call with a state, and the changes that it will store.

    Attributes:
        read: `[B, T, H, D]`.
        evict_at: int32 `[B, T, Hkv or 1]`.
        ledger: the selector's ledger after the call.
        extension: the cache with the call's tokens.
        seen: int32 `[N]`, tokens seen after the call.
    """

    read: Tensor
    evict_at: Tensor
    ledger: Any
    extension: Extension
    seen: Tensor


class HAMLayer(CallsParts):
    """Sequence mixer of Hybrid Associative Memories (arXiv 2603.22325).

    Every token is projected to q, k, v and goes through the memory, a recurrence. The gate scores
    the token, by default by how badly the memory predicted its value. The selector turns scores
    into lifetimes in the KV cache: until which position a token is stored. Softmax attention runs
    over the stored tokens, and the combiner joins the outputs of memory and attention.

        HAMLayer(512, 8, selector=Threshold(TargetFraction(0.5)) | Window(64))
        HAMLayer(512, 8, attention=None)  # only the memory: no cache, no attention norms
        HAMLayer(512, 8, memory=None)  # only attention, over all tokens
        HAMLayer(512, 8, memory=None, selector=FirstTokens(4) | Window(64))  # some tokens
    """

    head_split: HeadSplit | None = None
    """Set where ranks share the heads (`hamblocks.parallel.heads`); `dims` are then this rank's."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        selector: Selector | OrDefault | None = DEFAULT,
        gate: Gate | OrDefault | None = DEFAULT,
        memory: Memory | OrDefault | None = DEFAULT,
        query_gate: QueryGate | None = None,
        attention: Attention | OrDefault | None = DEFAULT,
        combiner: Combiner | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
    ) -> None:
        """Builds the layer from its parts; each part belongs to one layer.

        Args:
            hidden_size: width of x.
            num_heads: query heads, and heads of a memory that has no number of its own.
            selector: turns scores into lifetimes, e.g.
                `Threshold(TargetFraction(0.5)) | Window(64)`. None stores every token. Required in
                a layer with a memory and attention.
            gate: computes the score of a token. Default: `PredictionError("cosine")`, or None in a
                layer without a memory. None: every score is 0, which is allowed for selectors that
                use the position only (`Window`, `FirstTokens`).
            query_gate: decides which queries read the stored tokens. None: all do.
            memory: the recurrence. Default: `GatedDeltaMemory()`. None: the layer has no memory.
            attention: attention over the stored tokens. Default: `SelectedAttention()`. None: the
                layer has no attention and no cache.
            combiner: joins the outputs of memory and attention. Default: `GatedSum()`.
            num_kv_heads: key/value heads, a divisor of num_heads; each may store other tokens.
                None: num_heads.
            head_dim: None: hidden_size // num_heads.
            qkv_bias: whether the projections to q, k and v have biases.

        Raises:
            ValueError: sizes that do not divide, a selector that is not causal, a part that already
                belongs to another layer, something that is not a part, or a part that needs one
                that the layer does not have.
        """
        super().__init__()
        parts = parts_of(memory, gate, selector, query_gate, attention, combiner)
        has = parts["memory"], parts["attention"]
        self.dims = dims_of(hidden_size, num_heads, num_kv_heads, head_dim, *has)
        hidden_size, num_heads, kv_heads, head_dim, *_ = self.dims
        self._memory_projects = projects_itself(parts["memory"])
        self._memory_waits = isinstance(parts["memory"], ReadsUnstored)
        if self.dims.has_attention or not self._memory_projects:
            self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias)
            self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=qkv_bias)
            self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=qkv_bias)
        for name, part in parts.items():
            if isinstance(part, Buildable):
                part.build(self.dims)
            setattr(self, name, part)
        # register modules that are hidden in plain Python objects, so that train(), to() and
        # state_dict() reach them
        hidden = {
            f"{name}.{path}".replace(".", "_"): module
            for name, part in parts.items()
            for path, module in hidden_modules(part).items()
        }
        if hidden:
            self.part_modules = nn.ModuleDict(hidden)
        for name, part in parts.items():
            warn_of_unsaved(name, part)

    def split_heads(self, ranks: int) -> dict[str, Split]:
        """See `hamblocks.heads.SplitsHeads`; use `hamblocks.parallel.heads.split_module`."""
        _, heads, kv_heads, dim, *_ = self.dims
        self.dims = local_dims(self.dims, ranks)
        rows = {"q_proj": Split(0, [heads * dim])}
        rows |= dict.fromkeys(("k_proj", "v_proj"), Split(0, [kv_heads * dim]))
        names = [name for name, _ in self.named_parameters()]
        return {name: rows[name[:6]] for name in names if name[:6] in rows}

    # states

    def init_state(
        self,
        batch_size: int,
        *,
        page_size: int = 32,
        max_pages: int | None = None,
        rollback: int = 0,
    ) -> HAMState:
        """The empty state before the first token, for calls with consecutive parts of sequences.

        Dtype, device and shapes are taken from the first call.

        Args:
            batch_size: number of sequences, N.
            page_size: tokens in a page of the cache.
            max_pages: upper limit of pages in the cache's pool; None: no limit.
            rollback: how many of the last tokens `HAMState.rollback` can take back. Above 0, the
                last `rollback` tokens of a call run one by one, and each step copies the pages that
                it changes.

        Raises:
            ValueError: a size is not an integer, or too small.
        """
        rollback = check_count("rollback", rollback)
        cache = KVCache(batch_size, page_size=page_size, max_pages=max_pages)
        return HAMState(
            position=torch.zeros(batch_size, dtype=torch.int32, device="cpu"),
            cache=None if self.attention is None else cache,
            ring=Ring(rollback) if rollback else None,
        )

    def reset(self, state: HAMState, sequences: Tensor) -> HAMState:
        """The state with some sequences emptied, so that new sequences can take their place.

        Checkpoints and the states of the ring are dropped.

        Args:
            state: the state; it is spent (see `HAMState`).
            sequences: bool `[N]`, the sequences to empty.

        Raises:
            ValueError: a bad argument.
        """
        check_sequences(sequences, len(state.position))
        cache = None if state.cache is None else state.cache.reset(sequences)

        def renewed(old: Tensor, new: Tensor) -> Tensor:
            gone = sequences.to(old.device).view(-1, *[1] * (old.dim() - 1))
            return torch.where(gone, new.to(old.dtype), old)

        memory, attention = (
            tree_map(renewed, tree, tree_map(torch.zeros_like, tree))
            for tree in (state.memory, state.attention)
        )
        ledger = state.ledger
        if ledger is not None:
            heads, device = ledger.position.shape[2], ledger.position.device
            ledger = tree_map(renewed, ledger, self._ledger(len(sequences), heads, device))
        gone = sequences.to(state.position.device)
        ring = None if state.ring is None else Ring(state.ring.size)
        position = state.position.masked_fill(gone, 0)
        return HAMState(position, memory, attention, ledger, cache, ring=ring)

    def load_state(
        self, saved: Mapping[str, Any], device: torch.device | str | None = None
    ) -> HAMState:
        """Makes a state from `HAMState.state_dict()` of a state of this layer.

        Args:
            saved: the saved state.
            device: device of the state; None: the device of the saved tensors.

        Raises:
            ValueError: the state belongs to another layer.
        """
        state = load(saved, self.memory, self.attention, self.selector, device)
        contracts.check_state(state, self.dims, len(state.position))
        return state

    def _ledger(self, batch_size: int, heads: int, device: torch.device | None) -> Any:
        return None if self.selector is None else start(self.selector, batch_size, heads, device)

    # calls

    def prefill(
        self,
        x: Tensor,
        state: HAMState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        given_score: Tensor | None = None,
    ) -> LayerOutput:
        """`forward` with a state, for the next tokens of every sequence; None: a new state."""
        if state is None:
            check_tensor("x", x, "[B, T, hidden]", [None, None, self.dims.hidden_size])
            state = self.init_state(x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)
        given = {"cu_seqlens": cu_seqlens, "given_score": given_score}
        result: LayerOutput = self(x, state=state, **given)
        return result

    def decode(
        self, x: Tensor, state: HAMState, *, given_score: Tensor | None = None
    ) -> LayerOutput:
        """`forward` for the next token of every sequence.

        Args:
            x: `[N, hidden_size]`.
            state: state from `init_state`, `prefill` or the last call; it is spent.
            given_score: `[N, heads]`, as in `forward`.

        Returns:
            y `[N, hidden_size]`, the next state, stats.

        Raises:
            ValueError: a bad argument, or the state is missing.
        """
        check_tensor("x", x, "[N, hidden]", [None, self.dims.hidden_size])
        if state is None:
            expected = "a HAMState, from init_state, prefill or the last call that was given one"
            raise wrong("state", expected, "None")
        if given_score is not None:
            check_tensor("given_score", given_score, "[N, heads]", [x.shape[0], None])
            given_score = given_score[:, None]
        # the module itself and not its `forward`: hooks of others belong to every call
        result: LayerOutput = self(x[:, None], state=state, given_score=given_score)
        return result._replace(y=result.y[:, 0])

    def graphed_decode(self, state: HAMState, steps: int) -> GraphedDecode[HAMState]:
        """Reserves the pages of `steps` tokens per sequence, and decodes them by a CUDA graph.

        Args:
            state: state from `init_state`, `prefill` or the last call; it is spent.
            steps: most tokens per sequence, at least 1.

        Returns:
            A callable that maps x `[N, hidden_size]`, the next token of every sequence, to y
            `[N, hidden_size]`. Its attribute `state` is the state after the tokens so far.

        Raises:
            ValueError: a bad argument, or one of `HAMState.reserve`.
        """

        def step(x: Tensor, state: HAMState) -> tuple[Tensor, HAMState]:
            y, after, _ = self.decode(x, state)
            assert after is not None
            return y, after

        sequences = len(state.position) if isinstance(state, HAMState) else 0
        contracts.check_state(state, self.dims, sequences)
        return GraphedDecode(step, state, steps)

    def forward(
        self,
        x: Tensor,
        *,
        state: HAMState | None = None,
        cu_seqlens: Tensor | None = None,
        given_score: Tensor | None = None,
        shard: ContextShard | None = None,
    ) -> LayerOutput:
        """Maps x to y: whole sequences, or with a state the next tokens of every sequence.

        Args:
            x: `[B, T, hidden_size]`; packed: `[1, sum(T), hidden_size]`.
            state: state from `init_state(N)` or the last call, to continue from; it is spent (see
                `HAMState`). Gradients flow to earlier calls through the states of the memory and of
                attention, but not through stored tokens. None: `x` holds whole sequences.
            cu_seqlens: int32 `[N+1]`, borders of N sequences packed into one batch row.
            given_score: floating `[B, T, heads]` with 1, Hkv or H heads, a score from outside for
                gates that read one (`GivenScore`): labels, or another model's entropy.
            shard: context parallel: x holds the tokens of this rank, and every rank of the shard's
                group calls the layer. It says where packed sequences end, so `cu_seqlens` is None.

        Returns:
            y in the shape and dtype of x, the next state (None without `state`), and stats.

        Raises:
            ValueError: a bad argument, or a part returned a value that its protocol does not allow.
                The message names the argument or part, what was expected and what it got.
        """
        if self.head_split is not None and shared_call() is None:
            given = {"state": state, "cu_seqlens": cu_seqlens, "shard": shard}
            split: LayerOutput = self.head_split.call(
                self, self.head_split, x, given_score, **given
            )
            return split
        self._check(x, state, cu_seqlens, given_score)
        if shard is not None:
            check_sharded(x, shard, state, cu_seqlens)
            if x.shape[0] * shard.tokens:
                return call_sharded(self, x, shard, given_score)
        batch, tokens = x.shape[:2]
        if batch * tokens == 0:
            position = positions(batch, tokens, device=x.device, cu_seqlens=cu_seqlens)
            return self._of_no_token(x, position, state, cu_seqlens)
        if state is not None and state.ring is not None:
            return call_and_record(self, x, state, cu_seqlens, given_score)
        begin = None if state is None else state.position.to(x.device)
        position = _positions(x, begin, cu_seqlens)
        where = position, cu_seqlens
        past = None if state is None else state.memory
        try:
            projected = self._projected(x)
            memory_read, trace, memory = self._remembered(x, projected, position, past, cu_seqlens)
        except RuntimeError:
            check_like_weights(self, x)
            raise
        trace = trace if given_score is None else trace._replace(given=given_score)
        if self.attention is None or projected is None:
            y, stats = self._combined(x, memory_read, None), LayerStats(None, None, *where)
            if state is None or begin is None:
                return LayerOutput(y, None, stats)
            seen = begin + (tokens if cu_seqlens is None else cu_seqlens.diff().to(begin.dtype))
            return LayerOutput(y, state._replace(position=seen, memory=memory), stats)
        prepared = None if state is None else state.attention
        q, k, v, after = self._prepared(*projected, prepared, *where)
        if state is not None and (
            (state.memory is None) != (memory is None) or (prepared is None) != (after is None)
        ):
            contracts.check_begun(state, memory=memory, attention=after)
        trace = trace._replace(stored_k=k, stored_v=v)
        score, logit_bias = self._scored(x, trace)
        decision = None if self.query_gate is None else self._asked(x, trace)
        call = _Call(q, k, v, score, logit_bias, *where, decision)
        reads = None if decision is None else decision.reads
        if state is None or begin is None:
            read, evict_at = self._read_whole(call)
            if self._memory_waits:
                memory_read, _ = self._read_unstored(trace, evict_at, memory, cu_seqlens)
            y = self._combined(x, memory_read, read)
            return LayerOutput(y, None, LayerStats(score, evict_at, *where, reads))
        step = self._read_stored(call, state, begin)
        if self._memory_waits:
            memory_read, memory = self._read_unstored(trace, step.evict_at, memory, cu_seqlens)
        y = self._combined(x, memory_read, step.read)
        # The only change in place, and the last step: an error above leaves the cache as it was.
        with arguments_are_checked():
            cache = step.extension.commit(step.seen)
        later = HAMState(step.seen, memory, after, step.ledger, cache, state.checkpoints)
        return LayerOutput(y, later, LayerStats(score, step.evict_at, *where, reads))

    def explain(
        self,
        x: Tensor,
        *,
        state: HAMState | None = None,
        cu_seqlens: Tensor | None = None,
        given_score: Tensor | None = None,
    ) -> LayerExplanation:
        """Lists which implementation each op of a call uses, and why the others are not used.

        The layer runs once in eval mode. Controllers count no scores, and the state does not
        change. Call it under `torch.no_grad()` to get the choices for inference.

        Args:
            x: as in `forward`.
            state: as in `forward`; it is not spent.
            cu_seqlens: as in `forward`.
            given_score: as in `forward`.

        Returns:
            For each op by name, every implementation with "yes" or a reason. With a state,
            "attention" lists the implementations that read pages in place (`paged_attention`), then
            those that read a padded copy (`selected_attention`).

        Raises:
            ValueError: a bad argument, as in `forward`.
        """
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with recorded_choices() as choices, dry_run():
                self(x, state=state, cu_seqlens=cu_seqlens, given_score=given_score)
        finally:
            for module, mode in modes:
                module.training = mode
        answers = {choice.op: choice.explanation for choice in choices}
        parts = {kind: getattr(self, kind) for kind in PARTS}
        names = {kind: "none" if x is None else type(x).__name__ for kind, x in parts.items()}
        how = "whole sequences" if state is None else "the next piece of each sequence of a state"
        learns = "with" if torch.is_grad_enabled() else "without"
        return LayerExplanation(answers, f"{how}, x {list(x.shape)}, {learns} gradients", names)

    def _of_no_token(
        self, x: Tensor, position: Tensor, state: HAMState | None, cu_seqlens: Tensor | None
    ) -> LayerOutput:
        """The result for x without tokens: no part is called, and the state does not change."""
        y = with_zero_gradients(x.clone(), self.parameters())
        if self.attention is None:
            return LayerOutput(y, state, LayerStats(None, None, position, cu_seqlens))
        evict_at = position[..., None].expand(-1, -1, self.dims.num_kv_heads)
        score = torch.zeros(evict_at.shape, device=x.device)
        return LayerOutput(y, state, LayerStats(score, evict_at, position, cu_seqlens))

    def _read_whole(self, call: _Call) -> tuple[Tensor, Tensor]:
        """The attention read of whole sequences, and lifetimes."""
        where = call.position, call.cu_seqlens
        evict_at = self._selected(call.score, None, *where).evict_at
        keys = DenseKeys(
            call.k,
            call.v,
            position=call.position,
            evict_at=evict_at,
            query_position=call.position,
            logit_bias=call.logit_bias,
            cu_seqlens=call.cu_seqlens,
        )
        return self._attended(call.q, keys, call.decision), evict_at

    def _read_stored(self, call: _Call, state: HAMState, begin: Tensor) -> _Step:
        """The attention read of the cache and the new tokens; the cache does not change yet."""
        assert state.cache is not None
        contracts.check_cache(state.cache.sizes, call.k, call.score, call.logit_bias)
        pieces = Pieces(call.cu_seqlens, len(begin), call.q.shape[1])
        position, score = pieces.apart(call.position, EMPTY), pieces.apart(call.score, 0)
        ledger = state.ledger
        if ledger is None:  # the first call
            ledger = self._ledger(len(begin), score.shape[2], score.device)
            if ledger is not None and state.cache.sizes is not None:
                raise wrong("state", "one with a ledger, as of this layer's selector", "the other")
        elif not isinstance(self.selector, HasLedger):
            raise wrong("state", "one without a ledger, as of this layer's selector", "the other")
        selection = self._selected(score, ledger, position, None)
        with arguments_are_checked():
            extension = state.cache.extend(
                pieces.apart(call.k, 0),
                pieces.apart(call.v, 0),
                position=position,
                evict_at=selection.evict_at,
                logit_bias=None if call.logit_bias is None else pieces.apart(call.logit_bias, 0),
                lowered=selection.lowered,
            )
        decision = call.decision
        if decision is not None:
            reads, weight, window = decision
            weight = None if weight is None else pieces.apart(weight, 0)
            decision = QueryGateOutput(pieces.apart(reads, False), weight, window)
        read = self._attended(pieces.apart(call.q, 0), extension.keys, decision)
        return _Step(
            read=pieces.together(read),
            evict_at=pieces.together(selection.evict_at),
            ledger=selection.ledger,
            extension=extension,
            # sequences of a packed batch differ in length
            seen=begin + call.q.shape[1]
            if call.cu_seqlens is None
            else torch.maximum(begin, position.amax(1) + 1),
        )

    # checks

    def _check(
        self,
        x: Tensor,
        state: HAMState | None,
        cu_seqlens: Tensor | None,
        given_score: Tensor | None,
    ) -> None:
        # a trace would record how many tokens this x stores
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise wrong("x", "a call by torch.compile or torch.export", "one by torch.jit.trace")
        check_tensor("x", x, "[B, T, hidden]", [None, None, self.dims.hidden_size])
        check_floating("x", x)
        weight = next(self.parameters(), None)
        # torch computes from x on one device and a weight on the meta device, without an error
        if weight is not None and weight.is_meta != x.is_meta:
            check_present(self, x, weight)
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1], x)
        if given_score is not None:
            sizes = [*x.shape[:2], None]
            check_tensor("given_score", given_score, "[B, T, heads]", sizes, like=x)
            check_floating("given_score", given_score)
            if given_score.shape[2] not in {1, self.dims.num_kv_heads, self.dims.num_heads}:
                expected = f"1, {self.dims.num_kv_heads} or {self.dims.num_heads} heads"
                raise wrong("given_score", expected, f"{given_score.shape[2]}")
        if state is not None:
            sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
            contracts.check_state(state, self.dims, sequences)
            if x.is_meta and state.cache is not None:
                expected = "values beside a state with a cache: its pages are counted by them"
                raise wrong("x", expected, x)


def _positions(x: Tensor, begin: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Positions of a call's tokens, int32 `[B, T]`.

    Args:
        x: `[B, T, hidden]`.
        begin: int32 `[N]`, tokens seen before; None: none.
        cu_seqlens: borders of packed sequences.
    """
    batch, tokens = x.shape[:2]
    if begin is not None and tokens == 1 and cu_seqlens is None:
        return unpadded(begin[:, None])
    position = positions(batch, tokens, device=x.device, cu_seqlens=cu_seqlens)
    if begin is None:
        return position
    before = begin[:, None] if cu_seqlens is None else begin[sequence_of(cu_seqlens, tokens)]
    return unpadded(position + before)
