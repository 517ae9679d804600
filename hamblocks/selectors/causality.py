"""Which selector of an expression is not causal."""

from __future__ import annotations

from hamblocks.protocols import Selector
from hamblocks.selectors.combined import Combined
from hamblocks.selectors.questions import is_causal
from hamblocks.selectors.wrapper import Wrapper


def not_causal(selector: Selector) -> Selector | None:
    """The first selector that is not causal, inside `|`, `&` and wrappers; None if all are."""
    if isinstance(selector, Combined):
        found = not_causal(selector.left)
        return not_causal(selector.right) if found is None else found
    if isinstance(selector, Wrapper):
        return not_causal(selector.inner)
    return None if is_causal(selector) else selector
