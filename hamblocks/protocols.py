"""What a part is: the calls that a HAM layer makes, and what travels between the parts.

A part is anything with the right call: no base class, no registration. Letters in shapes: B rows, T tokens, N sequences
(B, or those packed into one row by cu_seqlens), H query heads, Hkv key/value heads, D head size, L tokens of a ledger.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from hamblocks_ops.arguments import wrong


class LayerDims(NamedTuple):
    """Sizes of a layer, handed to `build(dims)` of every part that has parameters.

    `build` is called once, by the layer that owns the part; a second call must raise.

    Attributes:
        hidden_size: width of x.
        num_heads: query heads, and heads of the memory.
        num_kv_heads: key/value heads, a divisor of num_heads.
        head_dim: size of a head.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


class MemoryTrace(NamedTuple):
    """What the memory saw and failed to predict.

    Attributes:
        k: `[B, T, H, D]`, the keys as the memory wrote them (unit length).
        v: `[B, T, H, D]`, the values as the memory wrote them.
        beta: `[B, T, H]`, write strength.
        residual: `[B, T, H, D]`, value minus prediction, or None where the gate named a metric instead.
        score: `[B, T, H]` float32, surprise under the gate's metric, or None.
        position: int32 `[B, T]`, of each token within its sequence.
    """

    k: Tensor
    v: Tensor
    beta: Tensor
    residual: Tensor | None
    score: Tensor | None
    position: Tensor


@runtime_checkable
class Memory(Protocol):
    """The recurrent memory that sees every token."""

    def __call__(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        position: Tensor,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        metric: str | None = None,
    ) -> tuple[Tensor, MemoryTrace, Any]:
        """x `[B, T, hidden]`, q `[B, T, H, D]`, k and v `[B, T, Hkv, D]` -> read `[B, T, H, D]`, trace, state.

        With `metric` the trace has a score; without it, a residual.
        """
        ...


class GateOutput(NamedTuple):
    """What a gate says of every token.

    Attributes:
        score: `[B, T, H]`, `[B, T, Hkv]` or `[B, T, 1]`: what the selector ranks; it carries no gradient.
        logit_bias: `[B, T, Hkv]` or `[B, T, 1]`, added to the logits of the key, differentiable; None: nothing.
    """

    score: Tensor
    logit_bias: Tensor | None = None


@runtime_checkable
class Gate(Protocol):
    """The surprise policy. A gate that is a metric of the residual says so by an attribute `metric`."""

    def __call__(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """x `[B, T, hidden]` and what the memory tells -> a score."""
        ...


class Lifetimes(NamedTuple):
    """Tokens of the past and until when they live.

    Attributes:
        position: int32 `[N, L, H]`, ascending; -1 for empty rows, which come first.
        evict_at: int32 `[N, L, H]`.
    """

    position: Tensor
    evict_at: Tensor


class Selection(NamedTuple):
    """What a selector decides.

    Attributes:
        evict_at: int32 `[B, T, H]`, lifetimes of the new tokens.
        lowered: lifetimes, as they are now, of the tokens that the given ledger listed; None if it listed none.
        ledger: what to hand to the next call; None for a selector that never revises a lifetime.
    """

    evict_at: Tensor
    lowered: Lifetimes | None = None
    ledger: Any = None


@runtime_checkable
class Selector(Protocol):
    """Scores to lifetimes.

    A selector that revises lifetimes streams: its `start(sequences, heads, device)` gives the empty ledger, every
    ledger has a field `position` (int32 `[N, L, H]`, ascending, -1 for empty rows) that lists the tokens it may still
    evict, and lifetimes are only lowered, never below now. One that needs the whole sequence sets `causal = False`.
    """

    def __call__(
        self,
        score: Tensor,
        ledger: Any = None,
        *,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """score `[B, T, H]`; position int32 `[B, T]`, -1 for padding, None: from 0. No ledger: a sequence in one go."""
        ...


@runtime_checkable
class Controller(Protocol):
    """Sets a threshold. `step()`, called once per optimizer step by `step_controllers`, moves it."""

    def __call__(self, score: Tensor) -> Tensor:
        """Tau, float32 `[]`, for this score `[B, T, H]` (NaN: no token); in training it also counts."""
        ...

    def step(self) -> None:
        """Moves tau by what was counted since the last step."""
        ...


@runtime_checkable
class Attention(Protocol):
    """Softmax attention over the stored tokens."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        evict_at: Tensor,
        *,
        position: Tensor,
        logit_bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Any = None,
    ) -> tuple[Tensor, Any]:
        """q `[B, T, H, D]`, k and v `[B, T, Hkv, D]`, evict_at `[B, T, Hkv or 1]` -> read `[B, T, H, D]`, cache."""
        ...


@runtime_checkable
class Combiner(Protocol):
    """Joins the two reads."""

    def __call__(self, x: Tensor, memory_read: Tensor, attention_read: Tensor) -> Tensor:
        """x `[B, T, hidden]`, reads `[B, T, H, D]` -> y `[B, T, hidden]`."""
        ...


# What a part may offer besides its call. The layer looks for these by type when it is built.


@runtime_checkable
class HasMetric(Protocol):
    """A gate whose score is a metric of the memory's residual.

    The layer passes the metric to the memory, which then fills `MemoryTrace.score` and need not
    write the residual.
    """

    metric: str | None
    """A metric of `hamblocks.ops.surprise`, or None for a gate that reads the residual itself."""


@runtime_checkable
class Buildable(Protocol):
    """A part with parameters, made once for the sizes of the layer that owns it (see `Built`)."""

    def build(self, dims: LayerDims) -> None:
        """Makes the parameters; a second call raises a ValueError."""
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


def check_part(name: str, part: object) -> None:
    """Checks that a part is an object that can be called, not the class it is made from.

    Raises:
        ValueError: it is not.
    """
    if not callable(part) or isinstance(part, type):
        raise wrong(name, "a part (a callable object, see hamblocks.protocols)", part)


def check_count(name: str, value: object, least: int = 0) -> None:
    """Checks an integer that is at least `least`.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise wrong(name, f"an integer >= {least}", value)


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
                f"{type(self).__name__}: expected a part of its own for every layer, got one that another layer built "
                "(layers would share its weights; make one part per layer)"
            )
        self.dims = dims
        self.make(dims)

    def make(self, dims: LayerDims) -> None:
        """Makes the parameters."""
        raise NotImplementedError
