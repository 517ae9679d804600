"""Properties of any selector: its empty ledger, whether it is causal, whether it reads scores."""

from __future__ import annotations

import torch

from hamblocks.ledger import Ledger
from hamblocks.protocols import HasCausality, HasLedger, IgnoresScore, Selector


def start(
    selector: Selector, batch_size: int, heads: int, device: torch.device | None = None
) -> Ledger | None:
    """The empty ledger of a selector.

    Args:
        selector: any selector.
        batch_size: N, the number of sequences.
        heads: H, the number of heads that decide.
        device: where the ledger is made; None: PyTorch's default device.

    Returns:
        None for a selector that never revises a lifetime.
    """
    if not isinstance(selector, HasLedger):
        return None
    ledger: Ledger | None = selector.start(batch_size, heads, device)
    return ledger


def revises(selector: Selector) -> bool:
    """Whether a selector may lower the lifetime of an earlier token: its ledger has slots."""
    ledger = start(selector, 1, 1)
    return ledger is not None and ledger.position.shape[1] > 0


def is_causal(selector: Selector) -> bool:
    """Whether a selector decides from the past alone; one that does not has `causal = False`."""
    return not isinstance(selector, HasCausality) or bool(selector.causal)


def ignores_score(selector: Selector) -> bool:
    """Whether a selector decides by position alone; one that does has `ignores_score = True`."""
    return isinstance(selector, IgnoresScore) and bool(selector.ignores_score)
