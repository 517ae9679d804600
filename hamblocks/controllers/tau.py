"""A threshold in buffers that keep its value whatever a model is cast to or averaged with."""

from __future__ import annotations

import math
import numbers
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hamblocks_ops.arguments import wrong

INFINITE = 1e-30
"""Absolute sum of an infinite threshold: too small to change a mean with finite thresholds."""


def sum_and_weight(tau: Tensor) -> tuple[Tensor, Tensor]:
    """A threshold as a sum and a weight, so that averages of both give the mean threshold.

    A finite tau is (tau, 1), and an infinite one is (+-1e-30, 0), so that tau = sum / weight. Both
    numbers are finite, and so are their averages over several thresholds. An average over finite
    and infinite thresholds is the mean of the finite ones.

    Args:
        tau: float32 `[]`, not NaN.

    Returns:
        Sum and weight, float32 `[]`.
    """
    infinite = tau.isinf()
    return torch.where(infinite, tau.sign() * INFINITE, tau), (~infinite).float()


class HasTau(nn.Module):
    """A threshold that stays float32 whatever the model is cast to. Its state is in buffers."""

    by_head = True
    """Its counts are those of all ranks, also where they share the heads of a layer."""

    tau_sum: Tensor
    tau_weight: Tensor

    def __init__(self, tau: float, **buffers: Tensor) -> None:
        super().__init__()
        held = sum_and_weight(float32(tau))
        for name, buffer in (*zip(("tau_sum", "tau_weight"), held, strict=True), *buffers.items()):
            self.register_buffer(name, buffer)

    @property
    def tau(self) -> Tensor:
        """The threshold, float32 `[]`: +inf and -inf are exact."""
        return self._held()

    def _held(self) -> Tensor:
        """The threshold that the buffers hold."""
        return self.tau_sum.float() / self.tau_weight.float()

    def _place(self, tau: Tensor) -> None:
        """Sets tau, float32 `[]`."""
        for buffer, value in zip((self.tau_sum, self.tau_weight), sum_and_weight(tau), strict=True):
            buffer.copy_(value)

    @torch.no_grad()
    def set_threshold(self, tau: float) -> None:
        """Sets tau by hand, at any time.

        Raises:
            ValueError: `tau` is NaN or no number, or the buffers are offloaded.
        """
        self._check_in_memory()
        self._place(float32(number("tau", tau)))

    def _check_in_memory(self) -> None:
        """Checks that the buffers are here: what is written to offloaded ones would be lost.

        Offloading fetches them for the module's call, and writes nothing back.

        Raises:
            ValueError: they are on the meta device.
        """
        if self.tau_sum.is_meta:
            expected = "one with its buffers in memory (offload_buffers=False) where they change"
            raise wrong("controller", expected, f"{type(self).__name__} with offloaded buffers")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves buffers between devices, but casts none of them."""
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # with assign=True, torch takes buffers over in the dtype of the state dict
        super()._load_from_state_dict(*args, **kwargs)
        self._keep_float32()

    def _keep_float32(self) -> None:
        """Casts buffers back to float32, which FSDP, for one, casts to its `buffer_dtype`."""
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype != torch.float32:
                setattr(self, name, buffer.float())

    def extra_repr(self) -> str:
        """The threshold, where reading it does not wait for a device."""
        return f"tau={float(self.tau):g}" if self.tau.device.type == "cpu" else ""


def float32(value: float) -> Tensor:
    """A number as a float32 tensor `[]`."""
    return torch.tensor(value, dtype=torch.float32)


def shortest(value: Tensor) -> float:
    """The number with the fewest digits that rounds to a float32 `[]`: 0.1, not 0.100000001."""
    exact = float(value)
    for digits in range(6, 9):
        short = float(f"{exact:.{digits}g}")
        if struct.unpack("f", struct.pack("f", short))[0] == exact:
            return short
    return exact


def number(name: str, value: float) -> float:
    """Checks a number, of Python or numpy, and returns it as a float.

    Raises:
        ValueError: it is NaN or no number.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or math.isnan(value):
        raise ValueError(f"{name}: expected a number that is not NaN, got {value!r}")
    return float(value)


def unit(name: str, value: float) -> float:
    """Checks a number in [0, 1], and returns it as a float.

    Raises:
        ValueError: it is none.
    """
    if not 0 <= number(name, value) <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return float(value)
