"""Counts what a call makes the host do: torch ops, Python calls and argument checks.

Counts do not depend on the machine or on its load, so a test can hold them to a bound.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hamblocks as hb
import hamblocks_ops
from hamblocks.ops import gated_delta_rule
from hamblocks_ops import arguments

OUR_FOLDERS = tuple(f"{Path(package.__file__).parent}/" for package in (hb, hamblocks_ops))
CHECKS: frozenset[CodeType] = frozenset(
    check.__code__
    for name, check in inspect.getmembers(arguments, inspect.isfunction)
    if name.startswith("check_")
)
"""The code of the public argument checks of `hamblocks_ops.arguments`."""


RESERVED_STEPS = 64
"""Steps whose pages are taken in advance: more than are counted and timed."""
WARM_UP_STEPS = 2
"""The first steps may do work once that later ones do not."""


class Counts(NamedTuple):
    """What one call makes the host do.

    Attributes:
        torch_ops: ops that reach torch's dispatcher, views included.
        our_calls: calls of Python functions of hamblocks and hamblocks_ops. Python 3.12 and later
            count fewer, because they inline comprehensions.
        python_calls: calls of all Python functions, torch's included.
        argument_checks: calls of `hamblocks_ops.arguments.check_*`.
    """

    torch_ops: int
    our_calls: int
    python_calls: int
    argument_checks: int


class _OpCounter(TorchDispatchMode):
    """Counts every op that is dispatched while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.ops += 1
        return func(*args, **(kwargs or {}))


def count(call: Callable[[], object]) -> Counts:
    """Runs `call` twice and counts what it does, first its torch ops and then its Python calls.

    The two runs are separate because the dispatch mode itself makes Python calls.
    """
    with _OpCounter() as counter:
        call()
    codes: list[CodeType] = []

    def record(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            codes.append(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(before)
    return Counts(
        torch_ops=counter.ops,
        our_calls=sum(code.co_filename.startswith(OUR_FOLDERS) for code in codes),
        python_calls=len(codes),
        argument_checks=sum(code in CHECKS for code in codes),
    )


@torch.no_grad()
def decode_step(reserved: bool, attention: hb.SelectedAttention) -> Callable[[], None]:
    """A call that decodes one token of both sequences through one layer.

    The layer has hidden size 256 and 4 heads and is in eval mode. 100 tokens stand before the
    first that is decoded.

    Args:
        reserved: take the pages of the cache in advance, so that a step reads no value from the
            device and allocates no page.
        attention: the layer's attention.
    """
    torch.manual_seed(0)
    layer = hb.HAMLayer(
        256,
        4,
        gate=hb.PredictionError("cosine"),
        selector=hb.Threshold(0.9) | hb.Window(16),
        attention=attention,
    ).eval()
    x = torch.randn(2, 100, 256)
    state = layer.prefill(x).state
    if reserved:
        state.reserve(RESERVED_STEPS)

    @torch.no_grad()
    def step() -> None:
        nonlocal state
        state = layer.decode(x[:, 0], state).state

    for _ in range(WARM_UP_STEPS):
        step()
    return step


class _Moved(TorchDispatchMode):
    """Counts ops of torch that compute something, and the bytes that they read and write.

    Products of two matrices and operators of hamblocks are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.nbytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name not in (*FREE, "mm", "addmm"):
            self.ops += 1
            tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.nbytes += sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
        return result


FREE = (
    *("alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "squeeze"),
    *("split_with_sizes", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view"),
    *("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
)
"""Ops of torch that compute nothing."""


def passes_of_a_layer(tokens: int = 256, heads: int = 2, dim: int = 128) -> list[tuple[int, float]]:
    """Ops of torch in a layer beside its products, the delta rule and attention.

    Of a layer in bfloat16 what the delta rule alone takes is subtracted. The ops are those of a
    GPU: what a CPU takes in blocks is one op there for each step.

    Returns:
        For the forward and the backward pass, their number, and what they move in units of a
        tensor `[T, heads * dim]`.
    """
    torch.manual_seed(0)
    layer = hb.HAMLayer(
        heads * dim,
        heads,
        head_dim=dim,
        memory=hb.GatedDeltaMemory(),
        gate=hb.PredictionError("cosine"),
        selector=hb.Threshold(0.5),
    ).to(torch.bfloat16)
    x, q, k, v = (
        torch.randn(1, tokens, *shape, dtype=torch.bfloat16).requires_grad_()
        for shape in ((heads * dim,), *[(heads, dim)] * 3)
    )
    beta, g = (
        x.requires_grad_() for x in (torch.rand(1, tokens, heads), -torch.rand(1, tokens, heads))
    )

    def delta() -> torch.Tensor:
        result = gated_delta_rule(q, k, v, beta=beta, g=g, metric="cosine", output_residual=False)
        return result.out

    with mock.patch("hamblocks.blocked.runs", return_value=False):
        whole = _moved(lambda: layer(x).y, [x, *layer.parameters()])
    delta_alone = _moved(delta, [q, k, v, beta, g])
    return [
        (one.ops - less.ops, (one.nbytes - less.nbytes) / x.nbytes)
        for one, less in zip(whole, delta_alone, strict=True)
    ]


def _moved(call: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> tuple[_Moved, _Moved]:
    """What the forward and the backward pass of a call count."""
    with _Moved() as forward:
        out = call()
    with _Moved() as backward:
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    return forward, backward
