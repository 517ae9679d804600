"""Patches Triton's interpreter, so that kernels run on a CPU with correct results.

If TRITON_INTERPRET=1 is set before anything imports Triton, kernels run in numpy, including those
of flash-linear-attention. The interpreter of Triton 3.7 has five problems. Call `mend` once, before
fla is imported, to fix them:

- An autotuner needs a GPU driver to time its configurations. Fixed: it takes the first one.
- The loop variable of a `range` is a tensor in a compiled kernel, but a Python int in the
  interpreter, without `.to`.
- bfloat16 is stored as its bits in uint16, and arithmetic, products and reductions treat these bits
  as integers.
- A cast to bfloat16 truncates, while a GPU rounds to the nearest value.
- numpy warns about infinities and NaN, while a GPU does not.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import Any

from hamblocks_ops.dispatch import interpreting

_mended = False


def mend() -> None:
    """Patches the interpreter in this process. A second call does nothing.

    Raises:
        RuntimeError: Triton is not installed, or runs without its interpreter.
    """
    global _mended
    if not interpreting():
        raise RuntimeError(
            "expected Triton's interpreter, got a Triton that compiles or none; "
            "set TRITON_INTERPRET=1 before anything imports Triton or fla"
        )
    if _mended:
        return
    import triton.language as tl
    from triton.runtime import autotuner, interpreter

    _take_the_first_configuration(autotuner)
    _make_loop_variables_tensors(interpreter, tl)
    _compute_bfloat16(interpreter, tl)
    _do_not_warn(interpreter)
    _mended = True


def _take_the_first_configuration(autotuner: Any) -> None:
    def bench(_self: Any, *_args: Any, config: Any, **_meta: Any) -> list[float]:
        return [0.0, 0.0, 0.0]

    autotuner.Autotuner._bench = bench


def _make_loop_variables_tensors(interpreter: Any, tl: Any) -> None:
    import numpy as np

    def tensors(*borders: Any) -> Iterator[Any]:
        for index in range(*(int(border) for border in borders)):
            yield tl.tensor(
                interpreter.TensorHandle(np.array([index], dtype=np.int32), tl.int32), tl.int32
            )

    def visit_for(self: Any, node: Any) -> Any:
        self.generic_visit(node)
        call = node.iter
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id == "range"
        ):
            call.func.id = "_range_of_tensors"
        return node

    interpreter._range_of_tensors = tensors
    interpreter.ASTTransformer.visit_For = visit_for


def _do_not_warn(interpreter: Any) -> None:
    import numpy as np

    launch = interpreter.GridExecutor.__call__

    def quietly(self: Any, *args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return launch(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = quietly


def _compute_bfloat16(interpreter: Any, tl: Any) -> None:
    import numpy as np

    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder

    def is_bfloat16(x: Any) -> bool:
        return bool(x.dtype.scalar == tl.bfloat16)

    def widened(bits: Any) -> Any:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def rounded(x: Any) -> Any:
        """The bits of x in bfloat16, rounded to the nearest, ties to even; NaN stays NaN."""
        x = np.ascontiguousarray(x, dtype=np.float32)
        bits = x.view(np.uint32).astype(np.uint64)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)

    def wide(x: Any) -> Any:
        return handle(widened(x.data), tl.float32) if is_bfloat16(x) else x

    def narrow(x: Any) -> Any:
        if x.data.dtype == np.bool_:
            return handle(x.data, tl.int1)
        return handle(rounded(x.data), tl.bfloat16)

    def in_float32(own: Callable[..., Any], operands: int) -> Callable[..., Any]:
        """Wraps a method to run in float32 if one of its first `operands` arguments is bfloat16.

        These arguments are widened, and the result is rounded to bfloat16.
        """

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            tensors, rest = args[:operands], args[operands:]
            if not any(is_bfloat16(x) for x in tensors):
                return own(self, *args, **kwargs)
            result = own(self, *map(wide, tensors), *rest, **kwargs)
            return narrow(result)

        return method

    for name, operands in (
        ("binary_op", 2),
        ("unary_op", 1),
        ("create_fma", 3),
        ("create_rsqrt", 1),
    ):
        setattr(builder, name, in_float32(getattr(builder, name), operands))

    dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *more: Any) -> Any:
        result = dot(self, wide(a), wide(b), wide(d), *more)
        return narrow(result) if is_bfloat16(d) else result

    cast = builder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16:
            return src if is_bfloat16(src) else handle(rounded(src.data), tl.bfloat16)
        return (
            cast(self, wide(src), dst_type)
            if dst_type.scalar != tl.float32 or not is_bfloat16(src)
            else wide(src)
        )

    fp_to_fp = builder.create_fp_to_fp

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = (
        create_dot,
        cast_impl,
        create_fp_to_fp,
    )

    for kind in (interpreter.ReduceOps, interpreter.ScanOps):
        kind.apply_impl = _reducing_float32(kind.apply_impl, tl, wide, narrow)


def _reducing_float32(own: Any, tl: Any, wide: Any, narrow: Any) -> Any:
    """Wraps the method of a reduction or scan to run in float32 if an input is bfloat16."""

    def apply_impl(self: Any, inputs: Any) -> Any:
        if not any(x.dtype.scalar == tl.bfloat16 for x in inputs):
            return own(self, inputs)

        def retyped(x: Any, handle: Any) -> Any:
            shape = [int(size) for size in x.shape]
            return tl.core.tensor(
                handle, tl.block_type(handle.dtype.scalar, shape) if shape else handle.dtype.scalar
            )

        result = own(self, tuple(retyped(x, wide(x.handle)) for x in inputs))
        several = isinstance(result, (list, tuple))
        done = [
            retyped(x, narrow(x.handle)) if x.dtype.scalar == tl.float32 else x
            for x in (result if several else [result])
        ]
        return done if several else done[0]

    return apply_impl
