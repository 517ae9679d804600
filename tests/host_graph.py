"""Records the torch ops of a call and runs them again, as a CUDA graph does, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostGraph(TorchDispatchMode):
    """The ops of one call of `step`; no Python of the call runs in a replay.

    A replay runs the same ops on the same tensors and leaves every result in the memory where the
    first call left it. The first call is carried out, unlike a capture of a CUDA graph.
    """

    READS_A_VALUE = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal")

    def __init__(self, step: Callable[[], None]) -> None:
        super().__init__()
        self.recorded: list[tuple[Any, Any, Any, list[Tensor]]] = []
        with self:
            step()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.__name__.split(".")[0] not in self.READS_A_VALUE, f"{func} cannot be captured"
        result = func(*args, **(kwargs or {}))
        self.recorded.append((func, args, kwargs or {}, _tensors(result)))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, before in self.recorded:
                given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
                for old, new in zip(before, _tensors(func(*args, **kwargs)), strict=True):
                    # a view, or the tensor that was changed in place, is where it was
                    if old.untyped_storage().data_ptr() not in given:
                        old.copy_(new)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Records a step as a CUDA graph does: nothing is done before the first replay.

    As in a capture, argument checks read no values.
    """
    with patch.object(torch.compiler, "is_compiling", lambda: True), _Undone() as undone:
        graph = HostGraph(step)
    undone.undo()
    return graph.replay


class _Undone(TorchDispatchMode):
    """Keeps what ops change in place, to undo it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            for x in _tensors((args, kwargs or {})):
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.kept:
                    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self.kept[storage.data_ptr()] = whole, whole.clone()
        return func(*args, **(kwargs or {}))

    def undo(self) -> None:
        for whole, before in self.kept.values():
            whole.copy_(before)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
