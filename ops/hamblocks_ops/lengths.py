"""Lengths that are not known while a call is traced.

Some loops run once per bit of the number of tokens, or once per chunk. `torch.compile` and
`torch.export` unroll a loop, and an unrolled loop is right for one length only. Where the length is
symbolic such a loop is therefore one operator of the graph, so that one graph serves all lengths.
Where it is a number the loop is traced, so that the compiler can fuse it.
"""

from __future__ import annotations

import torch


def is_symbolic(length: int) -> bool:
    """Whether `length` stands for many lengths in the graph that is being traced."""
    if not torch.compiler.is_compiling():
        return False
    # an import of sympy, which a tracer has imported before
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(length)
