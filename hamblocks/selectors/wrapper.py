"""The base of selectors that shorten the lifetimes of another selector."""

from __future__ import annotations

from hamblocks.protocols import Selector, check_part
from hamblocks.selectors.combined import Composable
from hamblocks.selectors.questions import ignores_score, is_causal


class Wrapper(Composable):
    """A selector that only shortens the lifetimes of another one, its `inner`."""

    monotone = False
    """False: raising a threshold inside `inner` may lengthen the lifetimes of other tokens."""

    inner: Selector

    def __init__(self, inner: Selector) -> None:
        """Makes the selector.

        Raises:
            ValueError: `inner` is no selector.
        """
        super().__init__()
        check_part("inner", inner)
        self.inner = inner

    def _inners(self) -> tuple[Selector, ...]:
        return (self.inner,)

    @property
    def causal(self) -> bool:
        """Whether the inner selector is causal."""
        return is_causal(self.inner)

    @property
    def ignores_score(self) -> bool:
        """Whether the inner selector looks at no score."""
        return ignores_score(self.inner)
