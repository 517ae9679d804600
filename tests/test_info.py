"""`hamblocks info`: what is installed and what each op takes."""

import json

from typer.testing import CliRunner

import hamblocks as hb
from hamblocks.cli import app
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
    run = CliRunner().invoke(app, ["info"], env={"COLUMNS": "120"})
    assert run.exit_code == 0, run.output
    lines = run.stdout.splitlines()
    assert any("selected_attention" in line and "triton" in line for line in lines)
    assert (
        sum("yes, taken" in line for line in lines) == 4 + 4 + 5
    )  # ops, paged attention when decoding
