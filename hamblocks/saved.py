"""Builds the state of a layer from a saved state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hamblocks.cache import KVCache
from hamblocks.protocols import Attention, HasStateType, Memory, Selector
from hamblocks.selectors import start
from hamblocks.state import FORMAT, HAMState, Ring, leaves, tree_map
from hamblocks_ops.arguments import wrong


def load(
    saved: Mapping[str, Any],
    memory: Memory | None,
    attention: Attention | None,
    selector: Selector | None,
    device: torch.device | str | None,
) -> HAMState:
    """Builds the state that `HAMState.state_dict()` saved.

    Args:
        saved: the saved state.
        memory: the memory of the layer; if it has `state_type`, its state becomes one.
        attention: the attention part of the layer; likewise.
        selector: the selector of the layer; it determines the tree structure of the ledger.
        device: device of the state; None: the device of the saved tensors.

    Raises:
        ValueError: `saved` is no mapping, its format is missing or newer than this release, or the
            state of a part has a wrong number of entries.
    """
    if not isinstance(saved, Mapping):
        raise wrong("saved", "what HAMState.state_dict() returned", type(saved).__name__)
    check_format(saved.get("format"), FORMAT, "state")

    def moved(x: Tensor) -> Tensor:
        return x if device is None else x.to(device)

    return HAMState(
        position=moved(saved["position"]),
        memory=tree_map(moved, _typed("memory", memory, saved["memory"])),
        attention=tree_map(moved, _typed("attention", attention, saved["attention"])),
        ledger=_ledger(selector, [moved(x) for x in saved["ledger"]]),
        cache=None if saved["cache"] is None else KVCache.load(saved["cache"], device),
        ring=Ring(saved["rollback"]) if saved["rollback"] else None,
    )


def check_format(found: object, newest: int, what: str) -> None:
    """Checks the format number of something saved.

    Args:
        found: the number.
        newest: the newest format that this release knows; it knows all from 1.
        what: what was saved.

    Raises:
        ValueError: the number is none, or newer.
    """
    known = isinstance(found, int) and not isinstance(found, bool) and 1 <= found <= newest
    if known:
        return
    if isinstance(found, int) and found > newest:
        got = f"{found}: a newer release of hamblocks saved it"
    else:
        got = f"{found}: it is no saved {what} of hamblocks 0.1 or newer"
    raise wrong("format", f"1{f' to {newest}' if newest > 1 else ''} in a saved {what}", got)


def _ledger(selector: Selector | None, tensors: list[Tensor]) -> Any:
    """The ledger with leaves `tensors`, in the tree structure of the selector's ledgers."""
    if not tensors:
        return None
    empty = None if selector is None else start(selector, 0, 1)
    count = len(list(leaves(empty)))
    if count != len(tensors):
        expected = f"{count} tensors, as of this layer's selector"
        raise wrong("ledger", expected, f"{len(tensors)}")
    values = iter(tensors)
    return tree_map(lambda _: next(values), empty)


def _typed(name: str, part: object, saved: Any) -> Any:
    """Converts the outermost tuple of a part's saved state to the part's NamedTuple."""
    if saved is None or not isinstance(part, HasStateType):
        return saved
    fields = getattr(part.state_type, "_fields", ())
    if not isinstance(saved, (tuple, list)) or len(saved) != len(fields):
        count = len(saved) if isinstance(saved, (tuple, list)) else type(saved).__name__
        expected = f"{len(fields)} entries, as {part.state_type.__name__} has"
        raise wrong(name, expected, f"{count}")
    return part.state_type(*saved)
