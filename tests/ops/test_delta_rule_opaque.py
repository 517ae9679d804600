"""The operator that hides the chunks from a compiler is `chunked`, and has its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hamblocks_ops.gated_delta_rule.chunked import chunked
from hamblocks_ops.gated_delta_rule.opaque import forward

BORDERS = torch.tensor([0, 5, 5, 97, 100])


def arguments(tokens: int, packed: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, beta, g and the initial state; q has the strides of a transposed tensor."""
    generator = torch.Generator().manual_seed(tokens)
    batch, wide = 1 if packed else 2, torch.promote_types(dtype, torch.float32)

    def draw(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=wide).to(dtype)

    each = batch, tokens, 2
    return [
        x.requires_grad_()
        for x in (
            draw(batch, 2, tokens, 3, dtype=dtype).transpose(1, 2),
            torch.nn.functional.normalize(draw(*each, 3, dtype=dtype), dim=-1),
            draw(*each, 6, dtype=dtype),
            draw(*each).sigmoid(),
            -draw(*each).exp(),
            draw(4 if packed else batch, 2, 3, 6),
        )
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "packed"), [(0, False), (1, False), (64, False), (100, False), (100, True)]
)
def test_results_and_gradients_are_those_of_chunked(
    tokens: int, packed: bool, dtype: torch.dtype
) -> None:
    given = arguments(tokens, packed, dtype)
    cu_seqlens = BORDERS if packed else None
    q, k, v, beta, g, state = given
    wanted = chunked(q, k, v, beta=beta, g=g, scale=0.5, initial_state=state, cu_seqlens=cu_seqlens)
    got = forward(q, k, v, beta, g, state, 0.5, cu_seqlens)
    weights = [torch.randn_like(one) for one in wanted]
    gradients = [
        torch.autograd.grad(
            sum((x * w).sum() for x, w in zip(ys, weights, strict=True)),
            given,
            materialize_grads=True,
        )
        for ys in (got, wanted)
    ]
    for one, other in zip((*got, *gradients[0]), (*wanted, *gradients[1]), strict=True):
        assert one.is_contiguous()
        assert one.dtype == other.dtype
        # the operator takes smaller chunks
        most = max(1e-5, torch.finfo(one.dtype).eps) if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(one, other, rtol=most, atol=most)
    assert gradients[1][-1].abs().max() > 0


@pytest.mark.parametrize("packed", [False, True])
def test_shapes_and_strides_are_those_that_a_compiler_is_told(packed: bool) -> None:
    given = (*arguments(100, packed), 0.5, BORDERS if packed else None)
    torch.library.opcheck(
        forward, given, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_a_second_derivative_is_refused_by_name() -> None:
    given = arguments(9, False)
    out, *_ = forward(*given, 0.5, None)
    (first,) = torch.autograd.grad(out.square().sum(), given[2], create_graph=True)
    with pytest.raises(NotImplementedError, match="gated_delta_rule, compiled for any length"):
        first.sum().backward()
