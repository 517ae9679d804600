"""What parts with a state offer so that their layer can run with context parallel.

Each rank then holds a slice of a sequence: consecutive tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Transition(NamedTuple):
    """What some tokens do to a recurrent state: S -> carry S + write.

    Attributes:
        carry: `[B, H, Dk, Dk]`.
        write: `[B, H, Dk, Dv]`, the state after the tokens if it was 0 before them.
    """

    carry: Tensor
    write: Tensor

    def after(self, state: Tensor) -> Tensor:
        """The state after the tokens."""
        return self.carry @ state + self.write


@runtime_checkable
class HasTransition(Protocol):
    """A memory whose state is linear in the state before, after a short convolution."""

    @property
    def border_size(self) -> int:
        """Number of tokens before a slice that the convolution reads: its taps - 1."""
        ...

    @property
    def recurrent_size(self) -> tuple[int, int, int]:
        """H, Dk and Dv of the recurrent state."""
        ...

    def border_inputs(
        self, x: Tensor, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> Tensor:
        """Inputs of the convolution `[B, T, channels]`; arguments as in a call of the memory."""
        ...

    def transition(
        self,
        x: Tensor,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        *,
        border: Tensor,
    ) -> Transition:
        """What the tokens do to the recurrent state.

        Args:
            x: `[B, T, hidden_size]`.
            q: `[B, T, H, D]`, or None, like k and v.
            k: `[B, T, Hkv, D]`.
            v: `[B, T, Hkv, D]`.
            border: `[B, border_size, channels]`, the inputs of the convolution before x.
        """
        ...

    def state_of(self, border: Tensor, recurrent: Tensor) -> Any:
        """The state to continue from, as the memory's calls take it.

        Args:
            border: `[B, border_size, channels]`, the last inputs of the convolution.
            recurrent: `[B, H, Dk, Dv]`.
        """
        ...


@runtime_checkable
class HasBorder(Protocol):
    """An attention part whose state is the last inputs of a short convolution."""

    @property
    def border_size(self) -> int:
        """Number of tokens before a slice that the convolution reads; 0: there is no state."""
        ...

    def border_inputs(self, k: Tensor, v: Tensor) -> Tensor:
        """Inputs of the convolution `[B, T, channels]`."""
        ...
