"""What a call launches on a GPU, without one: ops of torch are noted, kernels compute nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from every_kernel import modules_with_kernels, named
from torch.utils._python_dispatch import TorchDispatchMode

import hamblocks_ops
from hamblocks_ops.declare import OpWithChoice
from hamblocks_ops.dispatch import always, interpreted

NO_LAUNCH = {
    *("alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "squeeze"),
    *("split_with_sizes", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "unflatten"),
    *("device", "diagonal", "_record_function_enter_new", "_record_function_exit"),
}
"""Ops of torch that make a tensor without computing anything."""


class Launches(TorchDispatchMode):
    """Takes note of launches: of ops of torch by name, of kernels with their grids.

    An operator of hamblocks runs as on a GPU, and what it launches is noted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.names: list[str] = []
        self.grids: dict[str, list[tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "hamblocks":
            self.inside += 1
            try:
                with self:
                    return own(func)(*args, **kwargs)
            finally:
                self.inside -= 1
        if self.inside and func.namespace == "aten":
            # below autograd, ops that are made of others reach this mode whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        name = func.overloadpacket.__name__
        if name not in NO_LAUNCH:
            self.names.append(name)
        return func(*args, **kwargs)

    def kernel(self, name: str) -> Any:
        """What takes the place of a kernel."""

        class Kernel:
            def __getitem__(_, grid: Any) -> Callable[..., None]:  # noqa: N805
                def run(*_args: Any, **_kwargs: Any) -> None:
                    self.names.append(name)
                    if not callable(grid):  # fla's grids depend on what its autotuner chooses
                        self.grids.setdefault(name, []).append(grid)

                return run

        return Kernel()


def own(op: Any) -> Callable[..., Any]:
    """What a registered operator runs on a GPU; on "meta" it would only make its results."""
    definition = op
    if isinstance(op, torch._ops.OpOverload):
        definition = torch._library.custom_ops.OPDEFS[op._name.removesuffix(".default")]
    function: Callable[..., Any] = definition._init_fn
    return function


@contextmanager
def noted(mode: Launches | None = None) -> Iterator[Launches]:
    """Within this context all launches are noted, and no kernel computes anything."""
    launches = Launches() if mode is None else mode
    with ExitStack() as stack:
        for module in modules_with_kernels():
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel"):
                    stack.enter_context(patch.object(module, name, launches.kernel(named(kernel))))
        for module, name in kernels_of_fla():
            stack.enter_context(patch.object(module, name, launches.kernel(f"fla {name}")))
        stack.enter_context(launches)
        yield launches


def kernels_of_fla() -> list[tuple[Any, str]]:
    """Where the modules of flash-linear-attention that are imported have a kernel."""
    from triton.runtime import KernelInterface

    return [
        (module, name)
        for path, module in list(sys.modules.items())
        if path.startswith("fla.")
        for name, value in list(vars(module).items())
        if isinstance(value, KernelInterface)
    ]


@contextmanager
def chosen_as_on_a_gpu() -> Iterator[None]:
    """Within this context "auto" takes the implementations that it takes on a GPU."""
    import fla.ops.gated_delta_rule  # noqa: F401 - its kernels are found where it is imported

    ops = [op for op in vars(hamblocks_ops).values() if isinstance(op, OpWithChoice)]
    rows = [row for op in ops for row in op.table if row.passed_over is interpreted]
    for row in rows:
        object.__setattr__(row, "passed_over", always)
    try:
        with ExitStack() as stack:
            for name in ("append", "decode", "gated_delta_rule.refused"):
                module = import_module(f"hamblocks_ops.{name}")
                stack.enter_context(patch.object(module, "interpreted", always))
            decode = import_module("hamblocks_ops.decode")
            stack.enter_context(patch.object(decode, "DEVICES", {"cuda", "cpu"}))
            yield
    finally:
        for row in rows:
            object.__setattr__(row, "passed_over", interpreted)


@contextmanager
def without_values() -> Iterator[None]:
    """Within this context no value is read on the host, as for tensors on a GPU."""
    with ExitStack() as stack:
        for path, module in list(sys.modules.items()):
            if path.startswith("hamblocks") and hasattr(module, "values_are_checked"):
                stack.enter_context(patch.object(module, "values_are_checked", lambda _: False))
        yield
