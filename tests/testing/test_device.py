"""Ops on another device are compared on the CPU.

The device "cpu:0" serves for that: tensors are copied there and back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from hamblocks.cli import app
from hamblocks.testing import AttentionInputs, OpImplementation, check_op, parametrize_with_checks
from hamblocks.testing.kinds import op_cases, ops
from hamblocks_ops import gated_delta_rule, paged_attention, select_window, selected_attention

pytest_plugins = ["pytester"]
ELSEWHERE = [
    OpImplementation(selected_attention, impl="gather", device="cpu:0"),
    OpImplementation(gated_delta_rule, impl="chunked", device="cpu:0"),
    OpImplementation(paged_attention, impl="pages", device="cpu:0"),
    OpImplementation(select_window, device="cpu:0"),
]


@pytest.mark.slow
@parametrize_with_checks(ops=ELSEWHERE)
def test_checks_of_what_runs_elsewhere(check: object) -> None:
    check()  # type: ignore[operator]


def test_tensors_lie_there_as_they_lay_here() -> None:
    call = AttentionInputs(tokens=5, layout="transposed").tensors() | {"scale": 0.5}
    for name, x in (
        OpImplementation(selected_attention, impl="gather", device="cpu:0").moved(call).items()
    ):
        if isinstance(x, Tensor):
            assert x is not call[name]
            assert x.stride() == call[name].stride()
            assert torch.equal(x, call[name])
        else:
            assert x == 0.5


def test_inputs_that_change_there_are_noticed() -> None:
    def careless(q: Tensor, k: Tensor, v: Tensor, evict_at: Tensor, **more: object) -> object:
        result = selected_attention(q, k, v, evict_at, **more)  # type: ignore[arg-type]
        evict_at.add_(1)
        return result

    part = OpImplementation(selected_attention, careless, device="cpu:0")
    with pytest.raises(AssertionError, match="evict_at"):
        part(**AttentionInputs().tensors())


@pytest.mark.usefixtures("_uncached")
def test_what_runs_nowhere_here_is_not_applicable() -> None:
    """Without a GPU and the interpreter, Triton refuses every case, and no check fails."""
    with patch("hamblocks_ops.dispatch.interpreting", lambda: False):
        run = CliRunner().invoke(
            app, ["check", "op", "hamblocks.ops:surprise", "--impl", "triton", "--json"]
        )
    assert run.exit_code == 0, run.output
    (told,) = json.loads(run.stdout)
    assert len(told["results"]) == len(ops.CHECKS)


@pytest.fixture
def _uncached() -> Iterator[None]:
    for cached in (op_cases.never_runs, op_cases.refused_dtypes):
        cached.cache_clear()
    yield
    for cached in (op_cases.never_runs, op_cases.refused_dtypes):
        cached.cache_clear()


def test_messages_name_the_device() -> None:
    assert (
        repr(ELSEWHERE[0]) == "OpImplementation(selected_attention, impl='gather', device='cpu:0')"
    )
    assert (
        repr(OpImplementation(selected_attention))
        == "OpImplementation(selected_attention, impl='auto')"
    )
    assert check_op(OpImplementation(select_window, device="cpu:0"), only=["check_op_is_causal"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here_is_told() -> None:
    run = CliRunner().invoke(app, ["check", "op", "hamblocks.ops:surprise", "--device", "cuda"])
    assert run.exit_code == 2
    assert "--device: expected a device that torch can use here" in " ".join(run.output.split())


@pytest.mark.slow
def test_pytest_runs_elsewhere(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from hamblocks.ops import select_window
        from hamblocks.testing import parametrize_with_checks

        @parametrize_with_checks(ops=[select_window])
        def test_ops(check):
            assert check.part.device == "cpu:0"
            check()
        """
    )
    run = pytester.runpytest_subprocess("--hamblocks-device", "cpu:0", "-p", "no:cacheprovider")
    run.assert_outcomes(passed=run.parseoutcomes()["passed"])
    wrong = pytester.runpytest_subprocess("--hamblocks-device", "nowhere")
    wrong.stderr.fnmatch_lines(["*--hamblocks-device: expected one that is here*"])
