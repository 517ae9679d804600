"""Arithmetic moved by up to one rounding, which shows how far rounding moves a result.

This is Monte Carlo arithmetic (Parker 1997).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class MovedByOneRounding(TorchDispatchMode):
    """Moves every operand of arithmetic by up to one rounding of its dtype, at random.

    The result of a cast to a narrower dtype is moved too. Views and copies are not.

    Args:
        seed: of the random numbers.
        exact: whether to leave sums, products and quotients alone that need no rounding: `x - x` is
            0, `x * 1` is `x`. Without it they are moved too, because another order of the same sums
            would round where this one does not.
        products: dtype by whose rounding the operands of matrix products are moved; None: their
            own. It is the error of a tensor core that is fed in this dtype.
    """

    ARITHMETIC = frozenset(
        """
        add sub rsub mul div reciprocal addcmul addcdiv lerp pow square sqrt rsqrt exp exp2 expm1
        log log2 log1p erf tanh sigmoid log_sigmoid_forward softplus silu gelu relu elu cos sin sum
        mean var cumsum prod norm linalg_vector_norm logsumexp _softmax _log_softmax mm bmm addmm
        baddbmm mv dot linalg_solve_triangular convolution native_layer_norm native_group_norm
        _fused_rms_norm _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_fused_attention_overrideable sigmoid_backward tanh_backward
        silu_backward softplus_backward gelu_backward log_sigmoid_backward _softmax_backward_data
        native_layer_norm_backward _fused_rms_norm_backward convolution_backward
        """.split()  # noqa: SIM905 - a list of 60 strings reads worse
    )
    """Names of the ATen operators whose operands are moved."""

    PRODUCTS = frozenset(["mm", "bmm", "addmm", "baddbmm", "linalg_solve_triangular"])
    """Those of them that are matrix products."""

    SUMS = frozenset(["addmm", "baddbmm"])
    """Those of them that are a product and a sum."""

    def __init__(
        self, seed: int, *, exact: bool = False, products: torch.dtype | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = torch.Generator().manual_seed(seed)
        self.exact = exact
        self.products = products

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        if name == "_to_copy":
            return self._cast(args[0], func(*args, **kwargs))
        written = kwargs.get("out")
        if written is None and name.endswith("_") and not name.startswith("_"):
            written = args[0]
        if isinstance(written, Tensor) and name.rstrip("_") in self.ARITHMETIC:
            # as the operator that returns its result, of which these are other forms
            plain = getattr(torch.ops.aten, name.rstrip("_"))
            more = {key: x for key, x in kwargs.items() if key != "out"}
            return written.copy_(self._rounded(name.rstrip("_"), plain, args, more))
        # what a custom operator does inside is not seen here: its operands are moved
        if name not in self.ARITHMETIC and func.namespace in ("aten", "prim", "prims"):
            return func(*args, **kwargs)
        return self._rounded(name, func, args, kwargs)

    def _rounded(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        coarse = self.products if name in self.PRODUCTS else None
        result = func(*(self._moved(x, coarse) for x in args), **kwargs)
        needs_none = (
            self.EXACT.get(name)
            if self.exact and isinstance(result, Tensor) and len(args) > 1
            else None
        )
        if needs_none is None or (kwargs.get("alpha", 1) != 1 and name not in self.SUMS):
            return result
        plain = func(*args, **kwargs)
        return torch.where(needs_none(args[0], args[1], plain, func, args, kwargs), plain, result)

    def _cast(self, x: Tensor, result: Tensor) -> Tensor:
        floating = x.is_floating_point() and result.is_floating_point()
        if not floating or torch.finfo(result.dtype).bits >= torch.finfo(x.dtype).bits:
            return result
        moved: Tensor = self._moved(result)
        return torch.where(result.to(x.dtype) == x, result, moved) if self.exact else moved

    def _moved(self, x: Any, coarse: torch.dtype | None = None) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        eps = torch.finfo(coarse or x.dtype).eps
        step = torch.rand(x.shape, generator=self.generator, dtype=torch.float64) * 2 - 1
        return x * (1 + eps * step).to(x.dtype)

    EXACT: ClassVar[dict[str, Callable[..., Any]]] = {}
    """By operator, a function that returns where its result needs no rounding."""


def _like(x: Any, result: Tensor) -> Tensor:
    return torch.as_tensor(x).to(result.dtype)


def _sum(a: Any, b: Any, result: Tensor, *_: Any) -> Tensor:
    a, b = _like(a, result), _like(b, result)
    other = result - a  # the error of a sum is a floating-point number too (Knuth's TwoSum)
    return torch.as_tensor((a - (result - other)) + (b - other) == 0)


def _difference(a: Any, b: Any, result: Tensor, *_: Any) -> Tensor:
    return _sum(a, -_like(b, result), result)


def _simple(x: Tensor) -> Tensor:
    """Where x is zero or a power of two: a product with it changes the exponent only."""
    mantissa, _ = torch.frexp(x.double())
    return (x == 0) | (mantissa.abs() == 0.5)


def _product(a: Any, b: Any, result: Tensor, *_: Any) -> Tensor:
    return _simple(_like(a, result)) | _simple(_like(b, result))


def _quotient(a: Any, b: Any, result: Tensor, *_: Any) -> Tensor:
    return (_like(a, result) == 0) | _simple(_like(b, result))


def _total(
    a: Any, _b: Any, result: Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    terms = func((a != 0).to(result.dtype), *args[1:], **kwargs)
    return torch.as_tensor(terms <= 1)


def _matrix_product(a: Any, b: Any, result: Tensor, func: Any, *_: Any) -> Tensor:
    """Where a sum of products has at most one term that is not zero, and that product is exact."""
    there = [(x != 0).to(result.dtype) for x in (a, b)]
    rounding = [(~_simple(x)).to(result.dtype) for x in (a, b)]
    return torch.as_tensor((func(*there) <= 1) & (func(*rounding) == 0))


def _sum_with_product(
    a: Any, _b: Any, result: Tensor, _func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """`beta * a + alpha * (b @ c)`: where neither product nor sum rounds."""
    _, *factors = args
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    product = torch.matmul(*factors)
    exact = _matrix_product(*factors, product, torch.matmul)
    exact = exact & _product(product, torch.as_tensor(alpha), product)
    exact = exact & _product(a, torch.as_tensor(beta), result)
    # beta = 0: torch does not read `a`, which may be anything
    added = alpha * product
    return exact & _sum(torch.zeros_like(added) if beta == 0 else beta * a, added, result)


def _solution(a: Any, _b: Any, result: Tensor, *_: Any) -> Tensor:
    """Where an equation of a unit triangular system has a single unknown."""
    others: Tensor = (a != 0) & ~torch.eye(a.shape[-1], dtype=torch.bool, device=a.device)
    return ~others.any(-1, keepdim=True).expand(result.shape)


MovedByOneRounding.EXACT = {
    "add": _sum,
    "sub": _difference,
    "mul": _product,
    "div": _quotient,
    "sum": _total,
    "mm": _matrix_product,
    "bmm": _matrix_product,
    "addmm": _sum_with_product,
    "baddbmm": _sum_with_product,
    "linalg_solve_triangular": _solution,
}
