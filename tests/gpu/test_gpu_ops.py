"""`pytest -m gpu`: what the CPU proves of every implementation, on a GPU, and at the sizes that it
is for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hamblocks.testing import (
    AttentionInputs,
    DeltaRuleInputs,
    OpImplementation,
    PagedInputs,
    RowInputs,
    parametrize_with_checks,
)
from hamblocks.testing.kinds.op_cases import refusal
from hamblocks.testing.ops import OPS
from hamblocks_ops import (
    explain,
    gated_delta_rule,
    implementations,
    paged_attention,
    selected_attention,
    surprise,
)

pytestmark = pytest.mark.gpu
FAST = [
    OpImplementation(op, impl=name, device="cuda")
    for op in OPS
    for name in implementations(op) or ("auto",)
    if name != "reference"
]


@parametrize_with_checks(ops=FAST)
def test_properties(check: Any) -> None:
    check()


LARGE: dict[Any, list[Any]] = {
    gated_delta_rule: [
        DeltaRuleInputs(tokens=1000, heads=2, key_dim=64, value_dim=64),
        DeltaRuleInputs(tokens=700, heads=2, group=2, key_dim=128, value_dim=128, write="any"),
        DeltaRuleInputs(packed=(300, 0, 1, 517, 64), key_dim=128, value_dim=256, decay="hard"),
        DeltaRuleInputs(tokens=300, key_dim=256, value_dim=128, decay="none"),
    ],
    surprise: [
        RowInputs(tokens=4000, dim=dim, seed=seed) for dim in (64, 128, 250) for seed in range(3)
    ],
    selected_attention: [
        AttentionInputs(tokens=1500, dim=64, policy="some"),
        AttentionInputs(tokens=1100, dim=128, policy="window", group=4, kv_heads=1, bias="some"),
        AttentionInputs(tokens=700, dim=256, policy="topk"),
        AttentionInputs(packed=(500, 0, 1, 321, 130), dim=128, policy="any", bias="shared"),
        AttentionInputs(tokens=200, cache=1300, dim=128, group=2, policy="all"),
        AttentionInputs(tokens=1, cache=2000, dim=64, group=8, kv_heads=1, policy="all"),
    ],
    paged_attention: [
        PagedInputs(
            width=60, slabs=((400, 16), (90, 64)), sequences=3, group=4, dim=128, policy="any"
        ),
        PagedInputs(
            width=40,
            slabs=((300, 32),),
            sequences=2,
            together=2,
            group=2,
            dim=64,
            queries=4,
            bias="some",
        ),
        PagedInputs(width=20, slabs=((99, 64),), sequences=2, dim=256, forked=True, policy="all"),
    ],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("part", [part for part in FAST if part.like in LARGE], ids=repr)
def test_sizes_that_users_run(part: OpImplementation, dtype: torch.dtype) -> None:
    """Forward and backward, in every dtype that the implementation takes.

    Errors of two orders of the same sums drift apart with their length: four times the reference's
    own are allowed.
    """
    for case in LARGE[part.like]:
        case = replace(case, dtype=dtype)
        if refusal(part, case) is not None:
            continue
        problem = part.problem(case)
        got, own = problem.run("it"), [problem.run("reference")]
        if problem.yardstick != "reference":
            own.append(problem._moved(1))
        for name, exact in problem.run("reference", dtype=torch.float64).items():
            errors = [float((x[name].double() - exact).nan_to_num().norm()) for x in (got, *own)]
            assert torch.equal(got[name].isfinite(), exact.isfinite()), f"{name} of {case}"
            eps = torch.finfo(got[name].dtype).eps if got[name].is_floating_point() else 0
            most = 4 * max(errors[1:]) + eps * float(exact[exact.isfinite()].norm())
            assert errors[0] <= most, f"{name} of {case}: error {errors[0]:.2e}, allowed {most:.2e}"


def test_auto_takes_the_kernels_made_for_it() -> None:
    x = torch.zeros(1, 64, 2, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    beta, evict_at = (
        torch.ones(1, 64, 2, device="cuda"),
        torch.ones(1, 64, 2, dtype=torch.int32, device="cuda"),
    )
    assert explain(selected_attention, x, x, x, evict_at).chosen == "triton"
    assert explain(surprise, x, x).chosen == "triton"
    answers = explain(gated_delta_rule, x, x, x, beta=beta)
    assert answers["fla"] == "yes" or "Hopper" in answers["fla"], answers


@pytest.mark.parametrize(
    "case", [one for one in LARGE[selected_attention] if one.bias == "none"], ids=repr
)
def test_flash_attention_in_inference(case: AttentionInputs) -> None:
    """It is refused with a gradient, which the checks ask for."""
    case = replace(case, dtype=torch.bfloat16)
    part = OpImplementation(selected_attention, impl="flash", device="cuda")
    problem = part.problem(case)
    got, own = (problem.run(impl, backward=False) for impl in ("it", "reference"))
    for name, exact in problem.run("reference", dtype=torch.float64, backward=False).items():
        error, allowed = (float((x[name].double() - exact).nan_to_num().norm()) for x in (got, own))
        size = float(exact[exact.isfinite()].norm())
        assert error <= 4 * allowed + torch.finfo(got[name].dtype).eps * size, (
            f"{name}: {error / size:.2e}"
        )
