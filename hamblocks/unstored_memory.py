"""A memory whose output covers only the tokens that attention does not store."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from hamblocks.heads import Split
from hamblocks.memory import DeltaMemory, GatedDeltaMemory
from hamblocks.protocols import Built, LayerDims, Memory, MemoryTrace
from hamblocks_ops import gated_delta_rule
from hamblocks_ops.arguments import wrong


class UnstoredMemoryState(NamedTuple):
    """State of an `UnstoredMemory`. A state of zeros equals the state before the first token.

    Attributes:
        inner: state of the inner memory, to which every token was written.
        unstored: shape and dtype as `recurrent` of the inner state: the state that is read.
    """

    inner: Any
    unstored: Tensor


@final
class UnstoredMemory(Built):
    """A delta-rule memory whose read comes from the tokens that attention does not store.

    A token is then either in the cache or in the state, as in LoLA (arXiv 2505.23666), and stored
    tokens do not use the capacity of the state. Two recurrences run over the same q, k, v and g:

    - S writes every token with beta. Its residual is what gates read, as in any layer.
    - R writes a token with beta, or with 0 if it is stored for good (`evict_at` is NEVER). The
      memory's output is that of R.

    Which tokens are stored depends on S alone, so R needs no loop over tokens: each recurrence is
    one call of `gated_delta_rule`. A token that is stored for a while, as by `Window`, is written
    to R at once. A token that is stored for good only decays R. This holds per head; a head of the
    memory that belongs to several key/value heads skips the tokens that all of them store.

    Whether a token is stored for good must be known when it comes. So a layer with this memory
    needs a selector that never lowers a lifetime later: `Threshold`, `Window`, `FirstTokens`, their
    `|` and `&`, and `Cooldown` of these.
    """

    state_type: ClassVar[type[UnstoredMemoryState]] = UnstoredMemoryState

    def __init__(self, inner: Memory) -> None:
        """Takes the inner memory.

        Args:
            inner: a `DeltaMemory` or `GatedDeltaMemory`, with its projections and its decay.

        Raises:
            ValueError: `inner` is neither.
        """
        super().__init__()
        if not isinstance(inner, (DeltaMemory, GatedDeltaMemory)):
            raise wrong("inner", "a DeltaMemory or GatedDeltaMemory", inner)
        self.inner = inner

    @property
    def own_projections(self) -> bool:
        """See `hamblocks.protocols.ProjectsItself`."""
        return self.inner.own_projections

    def read_size(self, dims: LayerDims) -> tuple[int, int]:
        """Heads and value size (see `hamblocks.protocols.ProjectsItself`)."""
        return self.inner.read_size(dims)

    def make(self, dims: LayerDims) -> None:
        """Makes the parameters, which are those of the inner memory."""
        self.inner.build(dims)

    def split_heads(self, ranks: int) -> dict[str, Split]:
        """See `hamblocks.heads.SplitsHeads`: the parameters are those of the inner memory."""
        return {}

    def forward(
        self,
        x: Tensor,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        *,
        position: Tensor,
        state: UnstoredMemoryState | None = None,
        cu_seqlens: Tensor | None = None,
        metric: str | None = None,
    ) -> tuple[Tensor, MemoryTrace, UnstoredMemoryState]:
        """See `hamblocks.protocols.Memory`: the inner memory's call. R is not read yet.

        Raises:
            ValueError: `state` is not the state of such a memory, or a bad argument of
                `gated_delta_rule`.
        """
        past = None
        if state is not None:
            if not isinstance(state, UnstoredMemoryState):
                raise wrong("state", "an UnstoredMemoryState", type(state).__name__)
            past = self.inner.state_type(*state.inner)  # a saved state comes back as plain tuples
        given = {"position": position, "cu_seqlens": cu_seqlens, "metric": metric}
        read, trace, after = self.inner(x, q, k, v, state=past, **given)
        unstored = torch.zeros_like(after.recurrent) if state is None else state.unstored
        return read, trace, UnstoredMemoryState(after, unstored)

    def read_unstored(
        self,
        trace: MemoryTrace,
        stored: Tensor,
        *,
        state: UnstoredMemoryState,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, UnstoredMemoryState]:
        """See `hamblocks.protocols.ReadsUnstored`.

        Raises:
            ValueError: a bad argument of `gated_delta_rule`.
        """
        assert trace.q is not None
        assert trace.beta is not None
        result = gated_delta_rule(
            trace.q,
            trace.k,
            trace.v,
            beta=trace.beta.masked_fill(stored, 0),
            g=trace.g,
            initial_state=state.unstored,
            cu_seqlens=cu_seqlens,
            output_residual=False,
            impl=self.inner.impl,
        )
        return result.out, state._replace(unstored=result.final_state)
