"""Swappable building blocks for Hybrid Associative Memory layers (arXiv 2603.22325).

A recurrent delta-rule memory sees every token, a KV cache stores only the tokens that the memory
fails to predict, and softmax attention runs over the stored tokens. Importing needs torch alone.

The public names stand in `hamblocks.public`. They are imported when the first of them is used, so
that `import hamblocks` itself imports no torch. The pytest plugin relies on this: pytest imports it
in every suite of the environment.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hamblocks.public import *  # noqa: F403 - for type checkers and editors

__version__ = "0.1.0"


if not TYPE_CHECKING:  # else type checkers would take any name for one of the package

    def __getattr__(name: str) -> object:
        if find_spec(f"hamblocks.{name}") is not None:
            return import_module(f"hamblocks.{name}")
        public = import_module("hamblocks.public")
        if name != "__all__" and name not in public.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(public, name)
        globals()[name] = value  # the next use finds it without this function
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
