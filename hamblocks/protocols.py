"""What a part is: the calls that a HAM layer makes, and what travels between the parts.

A part is anything with the right call: no base class and no registration. Shape letters are
explained in docs/reference/shapes.md; in this file H is the number of query heads, Hkv of key/value
heads, N the number of sequences (the batch size B, or the number packed into one batch row).

The layer never calls a part without a token: B and T are at least 1 in every call.
"""

from __future__ import annotations

import numbers
import operator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from typing_extensions import TypeVar

from hamblocks.keys import Keys
from hamblocks_ops import surprise
from hamblocks_ops.arguments import wrong
from hamblocks_ops.precision import detached
from hamblocks_ops.surprise import METRICS

PARTS = ("memory", "gate", "selector", "query_gate", "attention", "combiner")
"""The attributes of a layer that hold its parts, in the order in which a call uses them."""

State = TypeVar("State", default=Any)
"""The state of a memory: a tree of tuples, lists, dicts and tensors `[N, ...]`."""

Ledger = TypeVar("Ledger", default=Any, contravariant=True)
"""The ledger of a selector: a tree of the same kind with a field `position`."""


class LayerDims(NamedTuple):
    """Sizes of a layer, passed to `build(dims)` of every part that has parameters.

    Attributes:
        hidden_size: width of x.
        num_heads: query heads, and heads of the memory unless it has its own number (H).
        num_kv_heads: key/value heads, a divisor of num_heads (Hkv).
        head_dim: size of a head (D).
        has_memory: whether the layer has a memory.
        has_attention: whether the layer has attention over stored tokens.
        memory_heads: heads of the memory where they are not num_heads.
        memory_dim: size of the memory's values where it is not head_dim.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_memory: bool = True
    has_attention: bool = True
    memory_heads: int | None = None
    memory_dim: int | None = None

    @property
    def memory_read(self) -> tuple[int, int]:
        """Heads and size of the memory's read."""
        return self.memory_heads or self.num_heads, self.memory_dim or self.head_dim

    def __repr__(self) -> str:
        names = self._fields[:4] if self[4:] == (True, True, None, None) else self._fields
        return f"LayerDims({', '.join(f'{name}={getattr(self, name)}' for name in names)})"


class MemoryTrace(NamedTuple):
    """What the memory saw and failed to predict, and what the caller says of each token.

    In a layer without a memory, k and v are the projections themselves and beta, residual, score
    and metric are None.

    A gate that names no `metric` gets the residual, and so may use it and any number of metrics in
    one call (see `surprise`).

    Attributes:
        k: `[B, T, H, D]`, the keys as the memory wrote them (unit length).
        v: `[B, T, H, D]`, the values as the memory wrote them.
        beta: `[B, T, H]`, write strength.
        residual: `[B, T, H, D]`, value minus prediction, or None where the gate named a metric.
        score: `[B, T, H]` float32, surprise under the gate's metric, or None without a metric.
        position: int32 `[B, T]`, position of each token within its sequence.
        metric: the metric of `score`, or None without a score.
        given: `[B, T, heads]` or `[B, T, 1]`, the score that the caller of the layer handed in, or
            None.
        q: `[B, T, H, D]`, the queries as the memory read with them; None: it does not tell.
        g: `[B, T, H]`, the log decay; None: nothing decays, or the memory does not tell.
        stored_k: `[B, T, Hkv, D]`, the keys as attention stores them: after norms, rotary positions
            and whatever else `prepare` does. None in a trace that comes from a memory alone.
        stored_v: `[B, T, Hkv, D]`, the values as attention stores them, or None.
    """

    k: Tensor
    v: Tensor
    beta: Tensor | None
    residual: Tensor | None
    score: Tensor | None
    position: Tensor
    metric: str | None = None
    given: Tensor | None = None
    q: Tensor | None = None
    g: Tensor | None = None
    stored_k: Tensor | None = None
    stored_v: Tensor | None = None

    def surprise(self, metric: str) -> Tensor:
        """The prediction error under any metric, detached.

        Returns `score` where it has this metric, and computes it from the residual otherwise.

        Args:
            metric: a metric of `hamblocks.ops.surprise`.

        Returns:
            `[B, T, H]`, float32 (float64 for float64 inputs).

        Raises:
            ValueError: there is no such metric, or the trace has neither the residual nor the score
                of this metric.
        """
        if metric not in METRICS:
            raise wrong("metric", f"one of {', '.join(METRICS)}", repr(metric))
        if self.score is not None and self.metric == metric:
            return detached(self.score)
        if self.residual is not None:
            residual = self.residual.detach()
            return surprise(residual, self.v.detach().to(residual.dtype), metric=metric)
        if self.score is None:
            got = "no residual and no score" + (" (no memory)" if self.beta is None else "")
        else:
            got = f"no residual, and the score of metric {self.metric!r}"
        raise wrong("trace", f"a residual, or the score of metric {metric!r}", got)

    def scored_for(self, gate: object) -> MemoryTrace:
        """The trace as a gate expects it: `score` is under the gate's metric, if it names one.

        Gates that share a trace, in a sum or in a layer, may name different metrics. The trace then
        comes with the residual. Without one the trace is returned as it is.
        """
        metric: str | None = getattr(gate, "metric", None)  # HasMetric
        if metric is None or metric == self.metric or self.residual is None:
            return self
        return self._replace(score=self.surprise(metric), metric=metric)


@runtime_checkable
class Memory(Protocol[State]):
    """The recurrent memory that sees every token.

    Its state is a tree (tuples, lists, dicts) of tensors whose first dimension is the sequence. All
    zeros is the state of a sequence that has seen no token.
    """

    def __call__(
        self,
        x: Tensor,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        *,
        position: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        metric: str | None = None,
    ) -> tuple[Tensor, MemoryTrace, State]:
        """Reads and writes every token.

        Args:
            x: `[B, T, hidden_size]`; packed: `[1, sum(T), hidden_size]`, like all tensors here.
            q: `[B, T, H, D]`. q, k and v are None for a memory that `ProjectsItself`.
            k: `[B, T, Hkv, D]`.
            v: `[B, T, Hkv, D]`.
            position: int32 `[B, T]`, position of each token within its sequence.
            state: what the last call returned; None: no sequence has seen a token.
            cu_seqlens: int32 `[N+1]`, borders of packed sequences.
            metric: a metric of `hamblocks.ops.surprise`: fill `score` of the trace. None: fill
                `residual`.

        Returns:
            The read `[B, T, H, D]` in the dtype of v, the trace, and the state for the next call.
            A memory that `ProjectsItself` may have another H and D.
        """
        ...


@runtime_checkable
class ProjectsItself(Protocol):
    """A memory with projections of its own: it may have sizes of its own, and ignores q, k, v.

    A layer calls it with None for q, k and v.
    """

    own_projections: bool
    """Whether the memory projects x itself."""

    def read_size(self, dims: LayerDims) -> tuple[int, int]:
        """Heads and size of the read in a layer of these sizes."""
        ...


@runtime_checkable
class ReadsUnstored(Protocol):
    """A memory that reads once the selector has decided, from the tokens that are not stored.

    Its call scores the tokens; the layer drops the read of the call. It needs attention, and a
    selector that never revises a lifetime.
    """

    def read_unstored(
        self,
        trace: MemoryTrace,
        stored: Tensor,
        *,
        state: Any,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Reads for every token of the call, and writes those that are not stored.

        Args:
            trace: what the call returned.
            stored: bool `[B, T, H]`, H the heads of the read: the tokens that attention stores for
                good.
            state: what the call returned.
            cu_seqlens: int32 `[N+1]`, borders of packed sequences.

        Returns:
            The read, shape and dtype as that of the call, and the state for the next call. With
            nothing stored it is the read of the call; with everything stored since the first token
            it is 0.
        """
        ...


@runtime_checkable
class HasStateType(Protocol):
    """A part whose state is a NamedTuple: a saved state is loaded as that type."""

    state_type: type[Any]


class GateOutput(NamedTuple):
    """What a gate says of every token.

    Attributes:
        score: `[B, T, H]`, `[B, T, Hkv]` or `[B, T, 1]`, what the selector ranks. Scores of the
            query heads of a key/value head are averaged. The score carries no gradient.
        logit_bias: `[B, T, Hkv]` or `[B, T, 1]`, added to the attention logits of the key,
            differentiable. None adds nothing.
    """

    score: Tensor
    logit_bias: Tensor | None = None


@runtime_checkable
class Gate(Protocol):
    """The surprise policy: how much a token deserves to be stored."""

    def __call__(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Takes x `[B, T, hidden_size]` and the memory's trace, returns a score."""
        ...


class QueryGateOutput(NamedTuple):
    """Which queries read the stored tokens.

    Attributes:
        reads: bool `[B, T]`. A query that reads sees all that is stored.
        weight: `[B, T, 1]`, factor of the read of the queries that read, differentiable: a learned
            query gate gets its gradient through it. None: 1.
        window: tokens that a query which does not read still sees, itself included, as far as they
            are stored. 0: such a query gets 0 and costs nothing.
    """

    reads: Tensor
    weight: Tensor | None = None
    window: int = 0


@runtime_checkable
class QueryGate(Protocol):
    """Decides which queries read: attention on demand (AMOR, arXiv 2602.13215; L2A)."""

    def __call__(self, x: Tensor, trace: MemoryTrace) -> QueryGateOutput:
        """Takes x `[B, T, hidden_size]` and the memory's trace, as a gate does."""
        ...


@runtime_checkable
class HasMetric(Protocol):
    """A gate or query gate that needs a memory: its score is a metric of the memory's residual.

    The layer passes the metric to the memory, which then fills `MemoryTrace.score` and need not
    write the residual.
    """

    metric: str | None
    """A metric of `hamblocks.ops.surprise`, or None for a gate that reads the residual itself.

    Where gate and query gate do not name the same metric, the memory writes the residual."""


@runtime_checkable
class ReadsGiven(Protocol):
    """A gate or query gate that reads `MemoryTrace.given`: its layer must be called with `given_score`."""

    reads_given: bool


def reads_given(gate: object) -> bool:
    """Whether a gate says that it reads `MemoryTrace.given`."""
    return isinstance(gate, ReadsGiven) and gate.reads_given


@runtime_checkable
class HasSurrogateGradient(Protocol):
    """A gate or query gate with a gradient that is by intent not that of its values.

    Straight-through estimators have one. The checks then do not compare it with finite differences.
    """

    surrogate_gradient: bool


def surrogate_gradient(part: object) -> bool:
    """Whether a part says that it has a surrogate gradient."""
    return isinstance(part, HasSurrogateGradient) and part.surrogate_gradient


class Lifetimes(NamedTuple):
    """Tokens of the past and until when attention may read them.

    Attributes:
        position: int32 `[N, L, H]`, ascending; -1 marks empty slots, which come first.
        evict_at: int32 `[N, L, H]`.
    """

    position: Tensor
    evict_at: Tensor


class Selection(NamedTuple):
    """What a selector decides.

    Attributes:
        evict_at: int32 `[B, T, H]`, lifetimes of the new tokens.
        lowered: lifetimes, as they are now, of the tokens that the given ledger lists; None if it
            lists none.
        ledger: for the next call; None for a selector that never revises a lifetime.
    """

    evict_at: Tensor
    lowered: Lifetimes | None = None
    ledger: Any = None


@runtime_checkable
class Selector(Protocol[Ledger]):
    """Scores to lifetimes.

    A selector that revises lifetimes streams (see `HasLedger`). Every ledger has a field `position`
    (int32 `[N, L, H]`, ascending, -1 for empty slots) that lists the tokens the selector may still
    evict. Lifetimes are only lowered, never below now.
    """

    def __call__(
        self,
        score: Tensor,
        ledger: Ledger | None = None,
        *,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """Decides about new tokens, and lowers lifetimes of those in the ledger.

        Args:
            score: `[B, T, H]`, floating.
            ledger: what the last call returned; None: the call holds whole sequences.
            position: int32 `[B, T]`, position of each token within its sequence, -1 for padding.
                None: counted from 0.
            cu_seqlens: int32 `[N+1]`, borders of packed sequences; only without a ledger.
        """
        ...


@runtime_checkable
class HasLedger(Protocol):
    """A selector that revises lifetimes, and so keeps a ledger of the tokens it may still evict."""

    def start(self, batch_size: int, heads: int, device: torch.device | None = None) -> Any:
        """The empty ledger for `batch_size` sequences and `heads` heads that decide."""
        ...


@runtime_checkable
class HasCausality(Protocol):
    """A selector that says whether it decides from the past alone; a layer refuses `False`."""

    causal: bool


@runtime_checkable
class IgnoresScore(Protocol):
    """A selector that decides by position alone, and so needs no gate: `ignores_score` is True."""

    ignores_score: bool


@runtime_checkable
class Controller(Protocol):
    """Sets a threshold. `step_controllers` calls `step()` once per optimizer step, to move it."""

    def __call__(self, score: Tensor) -> Tensor:
        """Takes score `[B, T, H]` (NaN: no token), returns tau, float32 `[]`; counts in training."""
        ...

    def step(self) -> None:
        """Moves tau by what was counted since the last step."""
        ...


@runtime_checkable
class Attention(Protocol):
    """Softmax attention over the stored tokens. It never sees the cache, only keys to read."""

    def __call__(self, q: Tensor, keys: Keys) -> Tensor:
        """Reads the keys for every query.

        Args:
            q: `[B, T, H, D]`, as `prepare` returned it.
            keys: all that may be read. `keys.attend(q)` is softmax attention by the fastest
                implementation, `keys.dense()` gives plain tensors.

        Returns:
            The read, `[B, T, H, D]` in the dtype of q; 0 where a query sees no key.
        """
        ...


@runtime_checkable
class PreparesTokens(Protocol):
    """An attention part that changes queries, keys and values before keys and values are stored."""

    def prepare(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        position: Tensor,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Norms, rotary positions, short convolutions and the like: each token from its past.

        Args:
            q: `[B, T, H, D]`; packed: `[1, sum(T), H, D]`, like all tensors here.
            k: `[B, T, Hkv, D]`.
            v: `[B, T, Hkv, D]`.
            position: int32 `[B, T]`, position of each token within its sequence.
            state: what the last call returned, a tree like that of a memory (all zeros is the state
                of a sequence that has seen no token); None: no sequence has seen a token.
            cu_seqlens: int32 `[N+1]`, borders of packed sequences.

        Returns:
            q, k and v in the same shapes and dtypes, and the state for the next call; None for a
            part that treats every token by itself.
        """
        ...


class NewTokens(NamedTuple):
    """Tokens that an attention part is to prepare, in place of keys to read.

    Attributes are arguments of `PreparesTokens.prepare`.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    state: Any = None
    cu_seqlens: Tensor | None = None

    def prepared_by(self, part: PreparesTokens, q: Tensor) -> Any:
        """What the part's `prepare` returns for these tokens and their queries q."""
        where = {"position": self.position, "state": self.state, "cu_seqlens": self.cu_seqlens}
        return part.prepare(q, self.k, self.v, **where)


@runtime_checkable
class PreparesWhenCalled(Protocol):
    """A part with `prepare` that prepares within its own call, if `prepares_when_called` is True.

    Where the part has hooks before its call, its layer then calls `part(q, new_tokens)` with
    `NewTokens` in place of `prepare`. So what others hang on its calls happens first: FSDP2 gathers
    the parameters of a part that is sharded by itself, and hooks load what is offloaded.
    """

    prepares_when_called: bool


@runtime_checkable
class Combiner(Protocol):
    """Joins the two reads."""

    def __call__(
        self, x: Tensor, memory_read: Tensor | None, attention_read: Tensor | None
    ) -> Tensor:
        """Joins the reads and projects them.

        Args:
            x: `[B, T, hidden_size]`.
            memory_read: `[B, T, H, D]`; None in a layer without a memory.
            attention_read: `[B, T, H, D]`; None in a layer without attention.

        Returns:
            y, `[B, T, hidden_size]`.
        """
        ...


@runtime_checkable
class Buildable(Protocol):
    """A part with parameters, made once for the sizes of the layer that owns it (see `Built`)."""

    def build(self, dims: LayerDims) -> None:
        """Makes the parameters; a second call raises a ValueError."""
        ...


def check_part(name: str, part: object) -> None:
    """Checks that a part is an object that can be called, not the class it is made from.

    Raises:
        ValueError: it is not.
    """
    if not callable(part) or isinstance(part, type):
        raise wrong(name, "a part (a callable object, see hamblocks.protocols)", part)


def check_count(name: str, value: object, least: int = 0) -> int:
    """Checks an integer, of Python or numpy, that is at least `least`.

    Returns:
        The same number as an `int`, which is what a part stores: JSON knows no other integers.

    Raises:
        ValueError: it is not.
    """
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or operator.index(value) < least:  # type: ignore[arg-type]
        raise wrong(name, f"an integer >= {least}", value)
    return operator.index(value)  # type: ignore[arg-type]


class Built(torch.nn.Module):
    """A part with parameters: `build(dims)` makes them, once.

    A subclass defines `make(dims)`.
    """

    dims: LayerDims | None = None

    def build(self, dims: LayerDims) -> None:
        """Makes the parameters for a layer of these sizes.

        Raises:
            ValueError: the part already belongs to a layer.
        """
        if self.dims is not None:
            raise ValueError(
                f"{type(self).__name__}: expected a part of its own for every layer, got one that "
                "another layer built (layers would share its weights; make one part per layer)"
            )
        self.dims = dims
        self.make(dims)

    def make(self, dims: LayerDims) -> None:
        """Makes the parameters."""
        raise NotImplementedError
