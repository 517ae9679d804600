"""The delta rule through fla: its own bits, the residual read off v_new, and what it refuses."""

from __future__ import annotations

from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from hamblocks.testing import DeltaRuleInputs, assert_close
from hamblocks_ops import explain, gated_delta_rule, surprise
from hamblocks_ops.dispatch import WHEN_NAMED

refused = import_module("hamblocks_ops.gated_delta_rule.refused")
BF16 = torch.bfloat16
CASES = [
    DeltaRuleInputs(tokens=70, key_dim=16, value_dim=8, dtype=BF16),
    DeltaRuleInputs(tokens=65, group=2, write="any", dtype=BF16, layout="strided"),
    DeltaRuleInputs(packed=(0, 3, 65, 0, 1), group=2, dtype=BF16),
    DeltaRuleInputs(tokens=64, decay="none", state=False, dtype=torch.float16),
]


def whole(case: DeltaRuleInputs) -> dict[str, Any]:
    tensors = {"g": None, "initial_state": None, "cu_seqlens": None} | case.tensors()
    if tensors["g"] is None:
        tensors["g"] = torch.zeros_like(tensors["beta"])
    if tensors["initial_state"] is None:
        heads = case.heads * case.group
        tensors["initial_state"] = torch.zeros(case.batch, heads, case.key_dim, case.value_dim)
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=["plain", "grouped", "packed", "float16"])
def test_has_the_bits_of_fla(case: DeltaRuleInputs) -> None:
    """Forward, and backward where no gradient comes through the residual and no beta is 0, for
    which 2**-64 stands."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def run(through_fla: bool) -> list[Tensor]:
        given = {name: x.contiguous() if x is not None else None for name, x in whole(case).items()}
        leaves = {
            name: x.requires_grad_()
            for name, x in given.items()
            if x is not None and x.is_floating_point()
        }
        borders = given["cu_seqlens"]
        if through_fla:
            more = {
                "cu_seqlens": None if borders is None else borders.long(),
                "output_final_state": True,
            }
            out, state = chunk_gated_delta_rule(**leaves, **more)
        else:
            metric = None if case.dtype == torch.float16 else "cosine"
            result = gated_delta_rule(**given, metric=metric, output_residual=False, impl="fla")
            out, state = result.out, result.final_state
        cotangents = [
            torch.sin(torch.arange(x.numel())).view_as(x).to(x.dtype) for x in (out, state)
        ]
        return [out, state, *torch.autograd.grad([out, state], list(leaves.values()), cotangents)]

    for number, (mine, theirs) in enumerate(zip(run(False), run(True), strict=True)):
        if number < 2 or case.write != "any":
            assert torch.equal(mine, theirs)
        else:
            assert torch.allclose(mine, theirs, rtol=0, atol=2.0**-56)


def written(case: DeltaRuleInputs) -> tuple[Tensor, Tensor, Tensor]:
    """What fla keeps of a call, v_new, with beta and the values: by its inner functions."""
    from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h
    from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
    from fla.ops.utils import chunk_local_cumsum
    from fla.ops.utils.constant import RCP_LN2

    call = {name: x if x is None else x.contiguous() for name, x in whole(case).items()}
    beta = call["beta"].clamp(min=2.0**-64)
    sums = chunk_local_cumsum(call["g"], chunk_size=64, scale=RCP_LN2)
    w, u, _ = chunk_gated_delta_rule_fwd_intra(
        k=call["k"], v=call["v"], g=sums, beta=beta, chunk_size=64
    )
    _, v_new, _ = chunk_gated_delta_rule_fwd_h(
        k=call["k"],
        w=w,
        u=u,
        g=sums,
        initial_state=call["initial_state"],
        output_final_state=True,
        chunk_size=64,
    )
    return v_new, beta, call["v"]


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["cosine", "relative_l2", "l2"])
def test_residual_and_score_are_read_off_what_was_written(metric: str) -> None:
    case = DeltaRuleInputs(tokens=66, write="any", key_dim=8, value_dim=16, dtype=BF16)
    result = gated_delta_rule(**case.tensors(), metric=metric, impl="fla")
    v_new, beta, v = written(case)
    residual = v_new.float() / beta[..., None]
    assert torch.equal(result.residual, residual.to(BF16))
    expected = surprise(residual, v.float(), metric=metric, impl="reference")
    assert_close(result.score, expected, own=torch.finfo(torch.float32).eps * case.tokens**0.5)


@pytest.mark.slow
def test_the_first_residual_is_the_value() -> None:
    """v_new is beta * v rounded there: its quotient would be the value within a rounding, its
    cosine anything."""
    case = DeltaRuleInputs(tokens=66, state=False, heads=4, value_dim=64, write="any", dtype=BF16)
    result = gated_delta_rule(**case.tensors(), metric="cosine", impl="fla")
    assert torch.equal(result.residual[:, 0], case.tensors()["v"][:, 0])
    assert torch.equal(result.score[:, 0], torch.ones(2, 4))


@pytest.mark.slow
def test_the_gradient_of_beta_does_not_drown_in_that_of_its_quotient() -> None:
    """A residual does not depend on its own beta: for one token its gradient is 0, however small
    beta is."""
    tensors = DeltaRuleInputs(tokens=1, key_dim=16, value_dim=16, dtype=BF16).tensors()
    beta = torch.full_like(tensors["beta"], 2.0**-40).requires_grad_()
    result = gated_delta_rule(**tensors | {"beta": beta}, impl="fla")
    (grad,) = torch.autograd.grad(result.residual.sum(), beta)
    assert bool((grad == 0).all())


def reason(**case: Any) -> str:
    learns = case.pop("learns", False)
    tensors = DeltaRuleInputs(**{"dtype": BF16, "tokens": 20} | case).tensors()
    if learns:
        tensors["q"].requires_grad_()
    return explain(gated_delta_rule, **tensors, metric="cosine")["fla"]


def test_reasons() -> None:
    assert reason(dtype=torch.float64) == "it computes in float32 at the most"
    assert "TF32" in reason(dtype=torch.float32)
    assert "float16, which cannot hold it" in reason(dtype=torch.float16)
    assert reason(key_dim=257) == "its kernels hold keys of 1 to 256 entries, not 257"
    assert reason(value_dim=16385) == "a tile holds vectors of up to 16384 entries, not 16385"
    if not torch.cuda.is_available():
        assert reason() == WHEN_NAMED + "Triton's interpreter is for tests"


def test_reasons_of_what_is_installed() -> None:
    with patch.object(refused, "installed", lambda _: False):
        assert reason() == "flash-linear-attention is not installed (pip install hamblocks[gpu])"
    with patch.object(refused, "_release", lambda: "0.5.1"):
        assert reason() == (
            "flash-linear-attention 0.5.1 is installed, 0.6.0 is supported (pip install hamblocks[gpu])"
        )
    with patch.object(refused, "interpreting", lambda: False):
        assert "odd size of keys or values: 4, 3" in reason()
    with patch.object(refused, "MAX_STREAMS", 1):
        assert "up to 1 streams" in reason(tokens=20)


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("triton", "chip", "wrong"),
    [
        ("3.3.1", 9, False),
        ("3.4.0", 9, True),
        ("3.7.0+git1", 9, True),
        ("3.7.1", 9, False),
        ("3.6.0", 8, False),
    ],
)
def test_hopper_with_a_triton_that_miscompiles_the_backward(
    triton: str, chip: int, wrong: bool
) -> None:
    with (
        patch.object(refused, "interpreting", lambda: False),
        patch.object(refused, "without_triton", lambda _: None),
        patch.object(
            refused.importlib.metadata,
            "version",
            lambda name: triton if name == "triton" else "0.6.0",
        ),
        # another chip than that of the tensors is the current one
        patch.object(
            torch.cuda,
            "get_device_capability",
            lambda device=None: (chip if device == CPU else 17 - chip, 0),
        ),
    ):
        assert reason(value_dim=4) in ("yes", WHEN_NAMED + "Triton's interpreter is for tests")
        learning = reason(value_dim=4, learns=True)
        assert ("produces incorrect results for gated chunk_bwd_dqkwg" in learning) == wrong
        with patch.object(refused, "installed", lambda _: True):  # tilelang, which fla then takes
            assert "incorrect" not in reason(value_dim=4, learns=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [DeltaRuleInputs(tokens=3, dtype=BF16), DeltaRuleInputs(packed=(2, 0, 1), dtype=BF16)],
    ids=["plain", "packed"],
)
def test_operators_are_registered_well(case: DeltaRuleInputs) -> None:
    fla = import_module("hamblocks_ops.gated_delta_rule.fla")
    call = whole(case)
    names = ("q", "k", "v", "beta", "g", "initial_state")
    learning = [call[name].clone().requires_grad_() for name in names]
    given = call["cu_seqlens"], 0.5
    torch.library.opcheck(fla.chunks, (*learning, *given, True, "cosine"))
    torch.library.opcheck(fla.chunks, (*learning, *given, False, None))
    out, residual, state, _, sums, inverse = fla.chunks(
        *(x.detach() for x in learning), *given, True, "l2"
    )
    q, k, v, beta, _g, start = (x.detach() for x in learning)
    backward = out, residual, state, q, k, v, beta, start, call["cu_seqlens"], sums, inverse, 0.5
    checks = ("test_schema", "test_faketensor")  # the backward of the backward is not promised
    torch.library.opcheck(fla.chunks_backward, backward, test_utils=checks)
