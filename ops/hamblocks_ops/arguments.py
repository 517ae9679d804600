"""Argument checks: every failure names the argument, what was expected and what came."""

from __future__ import annotations

import contextlib
import itertools
import numbers
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

_check_values_everywhere: ContextVar[bool] = ContextVar("check_values_everywhere", default=False)


def describe(value: object) -> str:
    """How an error message shows what came."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def wrong(name: str, expected: str, got: object) -> ValueError:
    """The error of a bad argument, to be raised by the caller."""
    return ValueError(
        f"{name}: expected {expected}, got {got if isinstance(got, str) else describe(got)}"
    )


@contextlib.contextmanager
def value_checks() -> Iterator[None]:
    """Within this context the values of tensors are checked on every device.

    Without it only tensors on the CPU are, because reading a value off an accelerator waits for it.
    """
    token = _check_values_everywhere.set(True)
    try:
        yield
    finally:
        _check_values_everywhere.reset(token)


def values_are_checked(tensor: Tensor) -> bool:
    """Whether the values of a tensor may be read: on a CPU, not while tracing or in `torch.func`."""
    if (
        torch.compiler.is_compiling()
        or tensor.numel() == 0
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    ):
        return False
    return tensor.device.type == "cpu" or _check_values_everywhere.get()


def check_tensor(
    name: str, value: object, layout: str, sizes: Sequence[int | None], like: Tensor | None = None
) -> None:
    """Checks type, shape (None: any size) and, with `like`, the device.

    `layout` names the dimensions in the error.
    """
    if not isinstance(value, Tensor):
        raise wrong(name, f"a tensor {layout}", value)
    fits = value.dim() == len(sizes) and all(
        want is None or want == have for want, have in zip(sizes, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise wrong(name, f"shape {layout} = [{wanted}]", value)
    if like is not None and value.device != like.device:
        raise wrong(name, f"device {like.device}", value)


def check_floating(name: str, value: Tensor, like: Tensor | None = None) -> None:
    """Checks that the dtype is floating, and with `like` that it is the same one."""
    if not value.is_floating_point():
        raise wrong(name, "a floating-point dtype", value)
    if like is not None and value.dtype != like.dtype:
        raise wrong(
            name, f"dtype {str(like.dtype).removeprefix('torch.')}, as the other tensors", value
        )


def check_integer(name: str, value: Tensor) -> None:
    """Checks that the dtype is int32 or int64."""
    if value.dtype not in (torch.int32, torch.int64):
        raise wrong(name, "dtype int32 or int64", value)


def check_range(name: str, value: Tensor, low: float, high: float) -> None:
    """Checks low <= value <= high, which NaN is not, where values are checked (`value_checks`)."""
    if not values_are_checked(value):
        return
    least, most = (float(bound) for bound in value.detach().aminmax())
    if not (least >= low and most <= high):
        raise wrong(name, f"values in [{low:g}, {high:g}]", f"values from {least:g} to {most:g}")


def check_scale(scale: object) -> None:
    """Checks a scale that is not None. A tensor is no number: its gradient would be lost."""
    if not isinstance(scale, numbers.Real):
        raise wrong("scale", "a number or None", scale)


def without_heads(name: str, value: Tensor) -> ValueError:
    """The error of a tensor `[B, T, heads, size]` that has no head, or heads of size 0."""
    return wrong(name, "at least one head, of at least one entry", value)


def check_cu_seqlens(cu_seqlens: object, batch: int, tokens: int, like: Tensor) -> None:
    """Checks `[N+1]` ascending integers from 0 to `tokens`, and that there is one batch row."""
    if not isinstance(cu_seqlens, Tensor):
        raise wrong("cu_seqlens", "an int32 tensor [N+1]", cu_seqlens)
    check_integer("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise wrong("cu_seqlens", "shape [N+1]", cu_seqlens)
    if cu_seqlens.device != like.device:
        raise wrong("cu_seqlens", f"device {like.device}", cu_seqlens)
    if batch != 1:
        raise wrong("cu_seqlens", "a packed batch [1, sum(T), ...]", f"a batch of {batch} rows")
    if not values_are_checked(cu_seqlens):
        return
    borders = [int(border) for border in cu_seqlens.tolist()]
    if borders[0] != 0 or borders[-1] != tokens:
        raise wrong(
            "cu_seqlens",
            f"first 0 and last T = {tokens}",
            f"first {borders[0]} and last {borders[-1]}",
        )
    for index, (left, right) in enumerate(itertools.pairwise(borders)):
        if right < left:
            raise wrong(
                "cu_seqlens", "ascending values", f"{right} after {left} at index {index + 1}"
            )
