"""`hamblocks check` and `hamblocks record`: tables, JSON, exit codes, golden files."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from users_parts import GATES

import hamblocks
from hamblocks.cli import app

MODULE = (
    GATES
    + """
import torch
from hamblocks.ops import selected_attention

class Scaled(torch.nn.Module):
    factor = 1.0
    def build(self, dims):
        self.weight = torch.nn.Parameter(torch.ones(dims.hidden_size))
    def forward(self, x, trace):
        return hb.GateOutput((x * self.weight * self.factor).sum(-1, keepdim=True))

class Double(Scaled):
    factor = 1 + 1e-3

class Fixed:
    def __call__(self, x, trace):
        return hb.GateOutput(x @ torch.ones(6, 1))

def attend(q, k, v, evict_at, **more):
    return selected_attention(q, k, v, evict_at, impl="reference", **more)

def late(q, k, v, evict_at, **more):
    return selected_attention(q, k, v, evict_at.clamp(max=2**31 - 2) + 1, impl="reference", **more)

class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(6, 6)
    def forward(self, x):
        return self.mix(x.cumsum(1))
"""
)


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CI", raising=False)
    (tmp_path / "mine.py").write_text(MODULE)
    yield
    sys.modules.pop("mine", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


FEW = ("--only", "check_gate_is_causal", "--only", "check_gate_is_built_once")


def test_a_table_tells_what_passed_failed_and_does_not_apply() -> None:
    good = run("check", "gate", "mine:Written", *FEW)
    assert good.exit_code == 0, good.output
    assert re.search(r"check_gate_is_causal +pass", good.output)
    assert re.search(r"check_gate_is_built_once +not applicable +it has no build", good.output)
    assert "1 passed, 0 failed, 1 not applicable" in good.output
    bad = run("check", "gate", "mine:Peeks", *FEW)
    assert bad.exit_code == 1
    assert re.search(r"check_gate_is_causal +fail", bad.output)
    assert "again: check_gate_is_causal(Peeks(), PartInputs(" in bad.output


def test_a_check_that_needs_a_failed_one_is_not_run() -> None:
    needs = ("--only", "check_gate_packed_is_one_by_one")
    result = run("check", "gate", "mine:Peeks", *FEW, *needs)
    assert result.exit_code == 1
    line = r"check_gate_packed_is_one_by_one +not run +needs check_gate_is_causal, which fails"
    assert re.search(line, result.output)
    assert "0 passed, 1 failed, 1 not applicable, 1 not run" in result.output
    assert run("check", "gate", "mine:Peeks", *needs).exit_code == 1


def test_json_is_all_there_is_on_stdout() -> None:
    result = run("check", "gate", "mine:Peeks", "--json", "--profile", "ci", "--seed", "2", *FEW)
    assert result.exit_code == 1
    (told,) = json.loads(result.stdout)
    assert (told["kind"], told["part"], told["profile"], told["seed"], told["failed"]) == (
        "gate",
        "Peeks()",
        "ci",
        2,
        1,
    )
    outcomes = {one["check"]: one["outcome"] for one in told["results"]}
    assert outcomes == {
        "check_gate_is_causal": "fail",
        "check_gate_is_built_once": "not applicable",
    }
    assert "check_gate_is_causal" in told["results"][0]["reason"]


def test_the_line_of_a_failure_repeats_it() -> None:
    result = run("check", "gate", "mine:Peeks", "--only", "check_gate_is_causal", "--json")
    line = json.loads(result.stdout)[0]["results"][0]["reason"].split("again: ")[1]
    import torch

    from hamblocks import testing

    names = {
        name: getattr(testing, name) for name in ("check_gate_is_causal", "PartInputs", "LayerDims")
    }
    import mine

    with pytest.raises(testing.CheckFailed, match="check_gate_is_causal"):
        eval(line, {"torch": torch, **vars(mine), **names})


def test_sizes_and_dtypes_of_parts_that_take_one_only() -> None:
    wrong = run("check", "gate", "mine:Fixed", "--only", "check_gate_is_causal")
    assert wrong.exit_code == 1
    right = ("--dims", "6,2,1,3", "--dtypes", "float32")
    result = run("check", "gate", "mine:Fixed", *right)
    assert result.exit_code == 0, result.output
    layer = run(
        "check", "layer", "mine:Plain", "--dims", "6,1,1,6", "--only", "check_layer_is_causal"
    )
    assert layer.exit_code == 0, layer.output


def test_ops_of_ones_own_and_of_ours() -> None:
    few = (
        "--only",
        "check_op_seeing_nothing_is_zero",
        "--only",
        "check_op_float32_is_the_reference",
    )
    assert run("check", "op", "mine:attend", "--like", "selected_attention", *few).exit_code == 0
    late = run("check", "op", "mine:late", "--like", "selected_attention", *few[:2])
    assert late.exit_code == 1
    assert (
        "again: check_op_seeing_nothing_is_zero(OpImplementation(selected_attention, late), "
        in late.output
    )
    ours = run("check", "op", "hamblocks.ops:select_topk", "--only", "check_op_is_causal")
    assert ours.exit_code == 0
    one = run(
        "check", "op", "hamblocks.ops:selected_attention", "--impl", "gather", "--json", *few[:2]
    )
    assert [told["part"] for told in json.loads(one.stdout)] == [
        "OpImplementation(selected_attention, impl='gather')"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gate"], "expected both"),
        (["gait", "mine:Written"], "kind: expected one of gate"),
        (["gate", "mine"], "target: expected package.module:expression"),
        (["gate", "nowhere:Written"], "target: expected a module that can be imported"),
        (
            ["gate", "mine:Missing"],
            "target: expected an expression that makes a part in mine (NameError",
        ),
        (
            ["gate", "mine:Written", "--only", "check_it"],
            "only: expected names of checks of a gate",
        ),
        (
            ["gate", "mine:Written", "--profile", "fast"],
            "profile: expected one of dev, ci, nightly",
        ),
        (["gate", "mine:Written", "--dims", "8"], "dims: expected hidden_size,num_heads"),
        (["gate", "mine:Written", "--dtypes", "float31"], "dtypes: expected names of torch dtypes"),
        (["gate", "mine:Written", "--impl", "gather"], "impl: expected None for a gate"),
        (["op", "mine:attend", "--like", "attention"], "like: expected the name of an op"),
        (["op", "mine:attend"], "like: expected one of gated_delta_rule"),
        (
            ["op", "hamblocks.ops:selected_attention", "--impl", "quick"],
            "impl: expected one of triton, gather",
        ),
        (["layer", "mine:Plain"], "dims: expected the sizes of a layer"),
        (["--against", "missing.json"], "against: expected a file that hamblocks record wrote"),
        (["--against", "mine.py"], "against: expected a file that hamblocks record wrote"),
    ],
)
def test_bad_usage_is_told_in_one_line(arguments: list[str], message: str) -> None:
    result = run("check", *arguments)
    assert result.exit_code == 2, result.output
    flat = " ".join(result.output.replace("│", " ").split())
    assert message in flat
    assert "Traceback" not in result.output


def test_names_that_a_module_imports_when_they_are_used(monkeypatch) -> None:
    # as in a new process, where nothing has used them yet
    for name in ("SharedGate", "KeyNorm"):
        monkeypatch.delitem(vars(hamblocks), name, raising=False)
    target = "hamblocks:[SharedGate(part()) for part in (lambda: (KeyNorm,))()][0]"
    result = run("check", "gate", target, "--only", "check_gate_is_causal")
    assert result.exit_code == 0, result.output


PARTS = [
    ("gate", "mine:Written"),
    ("gate", "hamblocks:LearnedRouter()"),
    ("memory", "hamblocks:GatedDeltaMemory()"),
    ("selector", "hamblocks:TopK(3) | Window(2)"),
    ("controller", "hamblocks:TargetFraction(0.3)"),
    ("attention", "hamblocks:SelectedAttention()"),
    ("combiner", "hamblocks:GatedSum"),
    ("layer", "hamblocks:HAMLayer(8, 2, selector=TopK(3))"),
    ("op", "hamblocks.ops:select_topk"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "target"), PARTS, ids=[target for _, target in PARTS])
def test_what_was_recorded_is_what_is_said_again(tmp_path: Path, kind: str, target: str) -> None:
    path = tmp_path / "golden.json"
    recorded = run("record", kind, target, "--out", str(path))
    assert recorded.exit_code == 0, recorded.output
    assert path.stat().st_size < 60_000
    again = run("check", "--against", str(path))
    assert again.exit_code == 0, again.output
    assert "every result is as it was" in " ".join(again.output.split())


def changed(value: Any) -> Any:
    """Another number, which differs by more than rounding."""
    return (
        7
        if isinstance(value, int)
        else value + abs(value) + 1
        if isinstance(value, float)
        else "nan"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "target"), PARTS, ids=[target for _, target in PARTS])
def test_every_result_that_changes_is_told(tmp_path: Path, kind: str, target: str) -> None:
    path = tmp_path / "golden.json"
    run("record", kind, target, "--out", str(path))
    told = json.loads(path.read_text())
    for number, case in enumerate(told["cases"]):
        for name, result in case["results"].items():
            if not result["values"]:
                continue
            other = json.loads(json.dumps(told))
            values = other["cases"][number]["results"][name]["values"]
            at = max(
                range(len(values)),
                key=lambda i: abs(values[i]) if isinstance(values[i], (int, float)) else 0,
            )
            values[at] = changed(values[at])
            path.write_text(json.dumps(other))
            result = run("check", "--against", str(path), "--json")
            assert result.exit_code == 1
            (difference,) = json.loads(result.stdout)["differences"]
            assert name in difference
        if number == 2:
            break


def test_a_later_version_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    run("record", "gate", "mine:Scaled", "--out", str(path))
    assert run("check", "gate", "mine:Scaled", "--against", str(path)).exit_code == 0
    result = run("check", "gate", "mine:Double", "--against", str(path))
    assert result.exit_code == 1
    assert "score" in result.output
    assert "3 results differ" not in result.output  # bfloat16 has no third digit
    other = run("check", "gate", "mine:Written", "--against", str(path))
    assert "weights: expected ['weight'], got []" in other.output
    assert run("check", "memory", "hamblocks:DeltaMemory()", "--against", str(path)).exit_code == 2


def test_ops_are_recorded_by_implementation(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    both = run("record", "op", "hamblocks.ops:selected_attention", "--out", str(path))
    assert both.exit_code == 2
    assert "impl: expected one of triton, gather, flash, flex-compact, flex, reference" in " ".join(
        both.output.replace("│", " ").split()
    )
    assert (
        run(
            "record",
            "op",
            "hamblocks.ops:selected_attention",
            "--impl",
            "gather",
            "--out",
            str(path),
        ).exit_code
        == 0
    )
    assert run("check", "--against", str(path)).exit_code == 0
    assert run("check", "op", "mine:attend", "--against", str(path)).exit_code == 0
    late = run("check", "op", "mine:late", "--against", str(path))
    assert late.exit_code == 1
    assert "out" in late.output


def test_too_many_weights_for_a_small_file(tmp_path: Path) -> None:
    target = "hamblocks:HAMLayer(256, 4, selector=TopK(3))"
    result = run("record", "layer", target, "--out", str(tmp_path / "golden.json"))
    assert result.exit_code == 2
    assert "at most 20000 weights" in " ".join(result.output.replace("│", " ").split())
