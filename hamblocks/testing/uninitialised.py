"""Fills uninitialised memory, so that a result that depends on it shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class FilledMemory(TorchDispatchMode):
    """Fills every tensor that `torch.empty` and its relatives return.

    Args:
        value: what floating tensors are filled with, and integer tensors too. Integers have no NaN:
            for a NaN they are filled with the largest number of their dtype.
    """

    def __init__(self, value: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.value = value

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] in (
            "empty",
            "empty_like",
            "empty_strided",
            "new_empty",
            "new_empty_strided",
        ):
            self._fill(result)
        return result

    def _fill(self, x: Tensor) -> None:
        if x.dtype == torch.bool:
            x.fill_(self.value != 0)
        elif x.is_floating_point() or x.is_complex() or self.value == self.value:
            x.fill_(self.value)
        else:
            x.fill_(torch.iinfo(x.dtype).max)
