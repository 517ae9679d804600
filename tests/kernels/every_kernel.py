"""All Triton kernels of this project, so that no test of all kernels forgets one."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import hamblocks_ops


def modules_with_kernels() -> Iterator[Any]:
    """All modules that define or import kernels."""
    for found in pkgutil.walk_packages(hamblocks_ops.__path__, "hamblocks_ops."):
        if ".triton" in found.name:
            module = import_module(found.name)
            if any(name.endswith("_kernel") for name in vars(module)):
                yield module


def every_kernel() -> list[Any]:
    """All kernels, each once."""
    kernels = {
        named(kernel): kernel
        for module in modules_with_kernels()
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    }
    return list(kernels.values())


def named(kernel: Any) -> str:
    """Of which op a kernel is, and its name."""
    return f"{kernel.fn.__module__.split('.')[1]} {kernel.fn.__name__}"
