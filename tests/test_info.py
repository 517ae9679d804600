"""`hamblocks info`: what is installed and what each op takes."""

import json
from itertools import groupby

from typer.testing import CliRunner

import hamblocks as hb
from hamblocks.cli import app
from hamblocks.info import CASES, choices, summary
from hamblocks.ops import implementations
from hamblocks.testing.ops import OPS


def test_every_op_with_a_choice_is_told_with_all_its_implementations():
    run = CliRunner().invoke(app, ["info", "--json"])
    assert run.exit_code == 0, run.output
    told = json.loads(run.stdout)
    assert told["machine"]["hamblocks"] == hb.__version__
    assert {"torch", "triton", "flash-linear-attention", "flash-attn", "GPU"} <= told[
        "machine"
    ].keys()
    seen = {}
    for ops in told["ops"].values():
        for op, answers in ops.items():
            assert "yes" in answers.values()
            seen[op] = tuple(answers)
    assert seen == {op.__name__: implementations(op) for op in OPS if implementations(op)}


def test_the_table_tells_what_is_taken_and_why_not_the_others():
    run = CliRunner().invoke(app, ["info"], env={"COLUMNS": "400"})
    assert run.exit_code == 0, run.output
    lines = [line for line in run.stdout.splitlines() if "│" in line]
    # wide enough for one line for each answer; where cases differ, the line names them
    told = {(answer.op, answer.impl, *answer.cases) for answer in summary()}
    assert len(lines) == len(told) == len(summary())
    cases = {case for case, *_ in CASES}
    answered = choices()
    for op, given in groupby(summary(), lambda answer: answer.op):
        called = {case for case in answered if op in answered[case]}
        taken = []
        for answer in given:
            where = answer.cases or called
            assert all(answered[case][op][answer.impl] == answer.text for case in where)
            taken += where if answer.taken else []
        assert sorted(taken) == sorted(called)
    assert sum("yes, taken" in line for line in lines) == sum(x.taken for x in summary())
    named = [line for line in lines if any(f"{case}: " in line for case in cases)]
    assert len(named) == sum(bool(answer.cases) for answer in summary()) > 0
