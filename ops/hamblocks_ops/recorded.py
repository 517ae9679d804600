"""The gradient of a written-out gradient: torch differentiates the formula that it records."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def recorded(
    run: Callable[..., Tensor | Sequence[Tensor]],
    given: Sequence[Tensor],
    grads: Tensor | Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of `run(*given)`, as functions that torch can differentiate again.

    For the backward pass of an `autograd.Function` under `create_graph=True`.

    Args:
        run: the formula, in ops that torch records.
        given: its arguments.
        grads: the gradients of its results; None for a result that has none.

    Returns:
        A gradient for each argument; None for one that needs none, or has none.
    """
    results = run(*given)
    if isinstance(results, Tensor):
        results = [results]
    if grads is None or isinstance(grads, Tensor):
        grads = [grads]
    wanted = [x for x in given if x.requires_grad]
    pairs = [
        (result, grad)
        for result, grad in zip(results, grads, strict=True)
        if grad is not None and result.requires_grad
    ]
    if not pairs:
        return [None] * len(given)
    of, by = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(of, wanted, by, create_graph=True, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in given]
