"""What benchmarks/gpu.py says of a GPU: the shape of its result, its floors and its verdicts, by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def importable():
    """As when the script is run."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def result():
    import gpu

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    saved = []
    sizes = gpu.SMALL._replace(op_tokens=(128,), layer_tokens=(64,), contexts=(64,))
    result = gpu.measure(sizes, list(gpu.PARTS), 2, lambda result: saved.append(json.dumps(result)))
    torch.set_num_threads(threads)
    assert json.loads(saved[-1]) == json.loads(json.dumps(result))
    assert len(saved) == 4
    return result


def measured(result, part):
    return {
        (row.get("pass"), row["case"])
        for row in result["rows"]
        if row["part"] == part and "seconds" in row
    }


FORWARD, TRAINING = "forward", "forward and backward"


@pytest.mark.slow
def test_it_runs_at_a_small_size(result):
    both = {FORWARD, TRAINING}
    assert measured(result, "delta") == {
        (which, case) for which in both for case in ("score", "residual")
    }
    assert measured(result, "attention") == {(which, "gather") for which in both}
    assert measured(result, "layer") == {(TRAINING, "selected"), (TRAINING, "everything")}
    assert measured(result, "decode") == {
        (None, "a dense cache, attention alone"),
        (None, "one layer"),
    }
    modes = [row["mode"] for row in result["rows"] if row["part"] == "layer" and "seconds" in row]
    assert sorted(modes) == ["compiled", "compiled", "eager", "eager"]
    for row in result["rows"]:
        if "seconds" in row:
            assert 0 < row["lower"] <= row["seconds"] <= row["upper"]
            assert row["floor"] > 0
            assert "checked" in row or row["case"] == "a dense cache, attention alone"
    assert {"torch", "triton", "GPU"} <= set(result["machine"])
    assert all(rate > 0 for rate in result["ceilings"].values())


@pytest.mark.slow
def test_what_a_cpu_has_not_is_left_out_with_its_reason(result):
    reasons = {row["case"]: row["reason"] for row in result["rows"] if "reason" in row}
    assert all(text.startswith("NotHereError: ") for text in reasons.values())
    names = (
        "fla",
        "fla once more",
        "flash",
        "cudnn",
        "flash-3",
        "triton",
        "flex",
        "everything by FlashAttention",
    )
    assert set(reasons) == set(names)
    assert {x["met"] for x in result["targets"]} == {None}
    assert all(x["reason"] for x in result["targets"])


@pytest.mark.slow
def test_half_is_kept_and_counted(result):
    (kept,) = {
        row["kept"]
        for row in result["rows"]
        if row["part"] == "layer" and row["case"] == "selected"
    }
    assert kept == pytest.approx(0.5, abs=0.01)
    shares = {
        row["fraction"]: row["kept"]
        for row in result["rows"]
        if row["part"] == "attention"
        if "fraction" in row
    }
    assert shares == pytest.approx({0.5: 0.5, 0.25: 0.25, 0.1: 0.1}, abs=0.08)


@pytest.mark.slow
def test_the_tables_can_be_printed(result, capsys):
    from measuring import report

    report.show(result["rows"], result["targets"])
    printed = capsys.readouterr().out
    assert "Times" in printed
    assert printed.count("not measured") == len(result["targets"])


def test_a_floor_is_the_larger_of_two_times():
    from measuring.floors import Ceilings, Work

    assert Work(100, 30).floor(Ceilings(10, 10)) == 10
    assert Work(100, 300).floor(Ceilings(10, 10)) == 30


def test_floor_of_the_delta_rule():
    from measuring import floors

    def work(**options):
        given = {"residual": False, "score": False, "learns": False}
        return floors.delta_rule(2, 3, 128, item=2, **given | options)

    # C = 64, D = 128: 10 C D = 81920, 6 D D = 98304, C C / 3 = 1365.33
    assert work().operations == pytest.approx(6 * (81920 + 98304 + 4096 / 3))
    assert work().bytes == 6 * (4 * 256 + 8)
    assert work(residual=True).bytes == 6 * (5 * 256 + 8)
    assert work(score=True).bytes == 6 * (4 * 256 + 12)
    # 28 C D = 229376, 16 D D = 262144, 4 C C = 16384
    assert work(learns=True).operations - work().operations == pytest.approx(
        6 * (229376 + 262144 + 16384)
    )
    assert work(learns=True).bytes - work().bytes == 6 * (7 * 256 + 16)


def test_floor_of_attention():
    from measuring import floors

    assert floors.causal_pairs(4) == 10
    work = floors.attention(4, 2, 8, pairs=20, kept=5, item=2, learns=False)
    assert work == (4 * 8 * 20, 2 * (8 + 5) * 16 + 64)
    training = floors.attention(4, 2, 8, pairs=20, kept=5, item=2, learns=True)
    assert training == (3.5 * 4 * 8 * 20, work.bytes + (48 + 10) * 16 + 32)


def test_floor_of_a_layer():
    from measuring import floors

    given = {"pairs": 20, "kept": 5, "item": 2}
    work = floors.layer(4, 16, 2, 8, **given)
    weights = 4 * 16 * 16 + 4 * 2 * 16
    delta = floors.delta_rule(4, 2, 8, item=2, residual=False, score=True, learns=True)
    assert work.operations == pytest.approx(6 * 4 * weights + delta.operations + 3.5 * 4 * 8 * 20)
    assert work.bytes == 2 * (5 * 4 * 16 + 3 * weights)


def test_what_attention_sees_is_counted():
    from measuring.attend import seen

    from hamblocks_ops.packing import NEVER

    evict_at = torch.tensor([NEVER, 1, 4, 3], dtype=torch.int32)[None, :, None]
    # token 0 by four queries, 1 never stored, 2 by queries 2 and 3, 3 never stored
    assert seen(evict_at) == (6, 2)


def rows_of(seconds):
    """Rows as the parts write them; times made up."""
    delta = {"part": "delta", "tokens": 16384, "pass": FORWARD}
    attention = {"part": "attention", "tokens": 16384, "pass": TRAINING}
    layer = {"part": "layer", "tokens": 8192, "pass": TRAINING, "mode": "eager"}
    rows = {
        "fla": delta,
        "score": delta,
        "residual": delta,
        "flash": attention,
        "triton": {**attention, "fraction": 0.5},
        "flex": {**attention, "fraction": 0.5},
        "everything": layer,
        "selected": layer,
    }
    return [{**row, "case": case, "seconds": seconds[case]} for case, row in rows.items()]


MET = {
    "fla": 1,
    "score": 1.05,
    "residual": 1.12,
    "flash": 1,
    "triton": 0.62,
    "flex": 1,
    "everything": 1,
    "selected": 0.9,
}


def test_targets_that_are_met():
    from measuring.targets import judge

    judged = judge(rows_of(MET))
    assert [x["ratio"] for x in judged] == pytest.approx([1.05, 1.12, 0.62, 1 / 0.62, 0.9])
    assert [x["bound"] for x in judged] == [1.05, 1.12, 0.62, 1.6, 1]
    assert [x["met"] for x in judged] == [True] * 5


@pytest.mark.parametrize(
    ("case", "seconds", "missed"),
    [
        ("score", 1.06, [0]),
        ("residual", 1.13, [1]),
        ("triton", 0.63, [2, 3]),
        ("flex", 0.9, [3]),
        ("selected", 1.0, [4]),
    ],
)
def test_targets_that_are_not(case, seconds, missed):
    from measuring.targets import judge

    judged = judge(rows_of({**MET, case: seconds}))
    assert [i for i, x in enumerate(judged) if not x["met"]] == missed


def test_bounds_follow_the_fraction_and_the_pass():
    from measuring.targets import targets

    row = {"part": "attention", "tokens": 16384, "case": "triton"}
    bounds = {
        (which, fraction): [
            target.bound for target in targets({**row, "pass": which, "fraction": fraction})
        ]
        for which in (FORWARD, TRAINING)
        for fraction in (0.5, 0.25, 0.1)
    }
    assert bounds == {
        (FORWARD, 0.5): [0.58, 1.6],
        (FORWARD, 0.25): [0.33],
        (FORWARD, 0.1): [0.18],
        (TRAINING, 0.5): [0.62, 1.6],
        (TRAINING, 0.25): [0.37],
        (TRAINING, 0.1): [0.22],
    }


def test_layers_are_judged_from_8192_tokens_on_and_in_their_own_mode():
    from measuring.targets import judge

    def rows(tokens, mode, selected):
        row = {"part": "layer", "tokens": tokens, "pass": TRAINING, "mode": mode}
        return [
            {**row, "case": "selected", "seconds": selected},
            {**row, "case": "everything", "seconds": 1},
        ]

    judged = judge([*rows(4096, "eager", 2), *rows(8192, "eager", 0.5), *rows(8192, "compiled", 2)])
    assert [(x["tokens"], x["mode"], x["met"]) for x in judged] == [
        (8192, "eager", True),
        (8192, "compiled", False),
    ]


def test_a_time_that_is_missing_meets_nothing():
    from measuring.targets import judge

    row = {"part": "delta", "tokens": 16384, "pass": FORWARD}
    judged = judge(
        [
            {**row, "case": "score", "seconds": 1},
            {**row, "case": "fla", "reason": "OutOfMemoryError"},
        ]
    )
    assert [(x["ratio"], x["met"], x["reason"]) for x in judged] == [
        (None, None, "OutOfMemoryError")
    ]


def test_a_wrong_result_is_not_timed():
    from measuring.checks import within
    from measuring.clock import Clock, Contender, race
    from measuring.floors import Ceilings, Work

    calls = []
    clock = Clock("cpu", 2)

    def contender(case, size):
        def check():
            return within("the truth", {"out": size}, {"out": 0.1})

        return Contender({"case": case}, lambda: calls.append(case), check, Work(1, 1))

    contenders = [contender("right", 0.1), contender("wrong", 0.2), contender("nan", float("nan"))]
    right, wrong, nan = race(contenders, clock, Ceilings(1, 1), {"part": "made up"})
    assert set(calls) == {"right"}
    assert right["floor"] == 1
    assert right["checked"]["errors"] == {"out": 0.1}
    assert "seconds" in right
    for row in (wrong, nan):
        assert "seconds" not in row
        assert row["reason"].startswith("WrongResultError: out: error ")


def test_calls_take_turns_and_one_that_fails_stops_no_other():
    from measuring.clock import Clock

    calls = []

    def fails():
        calls.append("b")
        if len(calls) > 4:
            raise torch.OutOfMemoryError("no more")

    timings, reasons = Clock("cpu", 2).turns(
        {"a": lambda: calls.append("a"), "b": fails}, warm_up=1
    )
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert list(timings) == ["a"]
    assert reasons == {"b": "OutOfMemoryError: no more"}


@pytest.mark.parametrize("learns", [False, True])
def test_sampled_attention_tells_right_from_wrong(learns):
    from measuring.attend import scattered
    from measuring.checks import SampledAttention, WrongResultError

    from hamblocks.ops import selected_attention

    torch.manual_seed(0)
    q, k, v, cotangent = (torch.randn(1, 300, 2, 8) for _ in range(4))
    evict_at = scattered(0.3, 300, 2, "cpu")
    sample = SampledAttention(q, k, v, evict_at, cotangent)
    checked = sample.check(
        lambda *qkv: selected_attention(*qkv, evict_at, impl="reference").out, learns
    )
    assert max(checked["errors"].values()) < 1e-5
    assert len(checked["errors"]) == (4 if learns else 1)
    other = evict_at.clone()
    other[0, 7, 1] = 8 if other[0, 7, 1] == 7 else 7
    other[0, 0, 0] = 1 if other[0, 0, 0] == 0 else 0
    with pytest.raises(WrongResultError):
        sample.check(lambda *qkv: selected_attention(*qkv, other, impl="reference").out, learns)


@pytest.mark.slow
def test_it_measures_on_a_cpu_and_writes_nothing(tmp_path):
    command = [
        sys.executable,
        str(BENCHMARKS / "gpu.py"),
        "--device",
        "cpu",
        "--contexts",
        "128",
        "--out",
        str(tmp_path),
    ]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = re.findall(r"context +128  keep ([\d.]+) +([\d,]+) tokens/s +([\d,]+) bytes", run.stdout)
    assert [float(keep) for keep, _, _ in rows] == pytest.approx([1, 0.5, 0.25, 0.1], abs=0.1)
    sizes = [int(nbytes.replace(",", "")) for _, _, nbytes in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so():
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py")], check=False, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert run.stderr == "benchmarks/gpu.py: expected a CUDA device, got none\n"
