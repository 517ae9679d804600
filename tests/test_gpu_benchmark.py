"""benchmarks/gpu.py: the form of its result, and floors and verdicts computed by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def importable():
    """The folder of the script, as when it runs."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def result():
    import gpu
    from measuring import clock
    from measuring.chips import H100

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    saved = []
    patch = pytest.MonkeyPatch()
    patch.setattr(clock, "chip_of", lambda _: H100)  # what a CPU takes then stands beside estimates
    sizes = gpu.SMALL._replace(op_tokens=(128,), layer_tokens=(64,), contexts=(64,))
    result = gpu.measure(sizes, list(gpu.PARTS), 2, lambda result: saved.append(json.dumps(result)))
    torch.set_num_threads(threads)
    patch.undo()
    assert json.loads(saved[-1]) == json.loads(json.dumps(result))
    assert len(saved) == len(result["measurements"])
    return result


def measured(result, part):
    return {
        (one.get("pass"), one["case"])
        for one in result["measurements"]
        if one["part"] == part and "seconds" in one
    }


FORWARD, TRAINING = "forward", "forward and backward"


@pytest.mark.slow
def test_it_runs_at_a_small_size(result):
    from measuring import attend

    both = {FORWARD, TRAINING}
    assert measured(result, "delta") == {
        (which, case) for which in both for case in ("score", "residual")
    }
    assert measured(result, "attention") == {(which, "gather") for which in both}
    variants = {
        one.get("variant")
        for one in result["measurements"]
        if one["part"] == "attention" and "seconds" in one
    }
    assert variants == {None, *attend.VARIANTS}
    smoke = [one for one in result["measurements"] if one["part"] == "smoke"]
    right = {one["case"] for one in smoke if "checked" in one}
    # in the interpreter kernels of Triton run too
    assert right >= {
        "selected_attention gather",
        "gated_delta_rule chunked",
        "paged_attention pages",
    }
    assert all(("checked" in one) != ("reason" in one) for one in smoke)
    assert not [one for one in smoke if "WrongResult" in one.get("reason", "")]
    assert measured(result, "layer") == {(TRAINING, "selected"), (TRAINING, "everything")}
    assert measured(result, "decode") == {
        (None, "a dense cache, attention alone"),
        (None, "one layer"),
    }
    modes = [
        one["mode"] for one in result["measurements"] if one["part"] == "layer" and "seconds" in one
    ]
    assert sorted(modes) == ["compiled", "compiled", "eager", "eager"]
    for one in result["measurements"]:
        if "seconds" in one:
            assert 0 < one["lower"] <= one["seconds"] <= one["upper"]
            assert one["host_seconds"] > 0
            assert one["floor"] > 0
            assert ("estimate" in one) == (one["case"] != "gather")
            if "estimate" in one:
                assert one["of_estimate"] == one["seconds"] / one["estimate"]
            assert one["case"] == "a dense cache, attention alone" or (
                "checked" in one and one["torch_ops"] > 0
            )
    assert {"torch", "triton", "GPU"} <= set(result["machine"])
    assert all(rate > 0 for rate in result["ceilings"].values())
    assert result["chip"]["name"] == "H100"


@pytest.mark.slow
def test_what_a_cpu_has_not_is_left_out_with_its_reason(result):
    reasons = {
        one["case"]: one["reason"]
        for one in result["measurements"]
        if "reason" in one and one["part"] != "smoke"
    }
    late = {case: text for case, text in reasons.items() if not text.startswith("NotHereError: ")}
    assert not late
    names = (
        "fla",
        "fla once more",
        "flash",
        "cudnn",
        "flash-3",
        "triton",
        "flex-compact",
        "flex",
        "everything by FlashAttention",
        "one layer",  # from a CUDA graph
        "all",  # launches of Triton kernels
    )
    assert set(reasons) == set(names)
    assert {x["met"] for x in result["targets"]} == {None}
    assert all(x["reason"] for x in result["targets"])


@pytest.mark.slow
def test_half_is_kept_and_counted(result):
    (kept,) = {
        one["kept"]
        for one in result["measurements"]
        if one["part"] == "layer" and one["case"] == "selected"
    }
    assert kept == pytest.approx(0.5, abs=0.01)
    shares = {
        one["fraction"]: one["kept"]
        for one in result["measurements"]
        if one["part"] == "attention"
        if "fraction" in one and "variant" not in one
    }
    assert shares == pytest.approx({0.5: 0.5, 0.25: 0.25, 0.1: 0.1}, abs=0.08)


@pytest.mark.slow
def test_the_tables_can_be_printed(result, capsys):
    from measuring import report

    report.show(result["measurements"], result["targets"])
    printed = capsys.readouterr().out
    assert "Times" in printed
    assert "x estimate" in " ".join(printed.split())
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
    from measuring.visits import seen

    from hamblocks_ops.packing import NEVER

    evict_at = torch.tensor([NEVER, 1, 4, 3], dtype=torch.int32)[None, :, None]
    # token 0 by four queries, 1 never stored, 2 by queries 2 and 3, 3 never stored
    assert seen(evict_at) == (6, 2)


def measurements_of(seconds):
    """Measurements as the parts return them, with made-up times."""
    delta = {"part": "delta", "tokens": 16384, "pass": FORWARD}
    attention = {"part": "attention", "tokens": 16384, "pass": TRAINING}
    layer = {"part": "layer", "tokens": 8192, "pass": TRAINING, "mode": "eager"}
    found = {
        "fla": delta,
        "score": delta,
        "residual": delta,
        "flash": attention,
        "cudnn": attention,
        "triton": {**attention, "fraction": 0.5},
        "flex": {**attention, "fraction": 0.5},
        "everything": layer,
        "selected": layer,
    }
    return [{**one, "case": case, "seconds": seconds[case]} for case, one in found.items()]


MET = {
    "fla": 1,
    "score": 1.05,
    "residual": 1.12,
    "flash": 1,
    "cudnn": 0.63,
    "triton": 0.62,
    "flex": 1,
    "everything": 1,
    "selected": 0.9,
}


def test_targets_that_are_met():
    from measuring.targets import judge

    judged = judge(measurements_of(MET))
    assert [x["ratio"] for x in judged] == pytest.approx(
        [1.05, 1.12, 0.62, 0.62 / 0.63, 1 / 0.62, 0.9]
    )
    assert [x["bound"] for x in judged] == [1.05, 1.12, 0.62, 1, 1.6, 1]
    assert [x["met"] for x in judged] == [True] * 6
    assert [x["against"] for x in judged] == ["fla", "fla", "flash", "cudnn", "flex", "everything"]


@pytest.mark.parametrize(
    ("case", "seconds", "missed"),
    [
        ("score", 1.06, [0]),
        ("residual", 1.13, [1]),
        ("triton", 0.63, [2, 3, 4]),
        ("cudnn", 0.6, [3]),
        ("flex", 0.9, [4]),
        ("selected", 1.0, [5]),
    ],
)
def test_targets_that_are_not(case, seconds, missed):
    from measuring.targets import judge

    judged = judge(measurements_of({**MET, case: seconds}))
    assert [i for i, x in enumerate(judged) if not x["met"]] == missed


def test_bounds_follow_the_fraction_and_the_pass():
    from measuring.targets import targets

    one = {"part": "attention", "tokens": 16384, "case": "triton"}
    bounds = {
        (which, fraction): [
            target.bound for target in targets({**one, "pass": which, "fraction": fraction})
        ]
        for which in (FORWARD, TRAINING)
        for fraction in (0.5, 0.25, 0.1)
    }
    assert bounds == {
        (FORWARD, 0.5): [0.58, 1, 1.6],
        (FORWARD, 0.25): [0.33, 1],
        (FORWARD, 0.1): [0.18, 1],
        (TRAINING, 0.5): [0.62, 1, 1.6],
        (TRAINING, 0.25): [0.37, 1],
        (TRAINING, 0.1): [0.22, 1],
    }
    variant = {**one, "pass": FORWARD, "variant": "Window"}
    assert [target.bound for target in targets(variant)] == [1]
    assert targets({**variant, "variant": "packed", "fraction": 0.25}) == []


def test_the_fastest_dense_attention_is_one_that_was_measured():
    from measuring.targets import judge

    one = {"part": "attention", "tokens": 16384, "pass": FORWARD, "variant": "TopK"}
    dense = [
        {**one, "case": "flash", "seconds": 2},
        {**one, "case": "cudnn", "seconds": 1},
        {**one, "case": "flash-3", "reason": "not installed"},
        {**one, "case": "cudnn", "variant": "Window", "seconds": 0.1},
    ]
    (judged,) = judge([*dense, {**one, "case": "triton", "seconds": 1.5}])
    assert (judged["against"], judged["ratio"], judged["met"]) == ("cudnn", 1.5, False)
    (judged,) = judge([dense[2], {**one, "case": "triton", "seconds": 1.5}])
    assert (judged["met"], judged["reason"]) == (None, "not installed")


def test_layers_are_judged_from_8192_tokens_on_and_in_their_own_mode():
    from measuring.targets import judge

    def both_layers(tokens, mode, selected):
        one = {"part": "layer", "tokens": tokens, "pass": TRAINING, "mode": mode}
        return [
            {**one, "case": "selected", "seconds": selected},
            {**one, "case": "everything", "seconds": 1},
        ]

    judged = judge(
        [
            *both_layers(4096, "eager", 2),
            *both_layers(8192, "eager", 0.5),
            *both_layers(8192, "compiled", 2),
        ]
    )
    assert [(x["tokens"], x["mode"], x["met"]) for x in judged] == [
        (8192, "eager", True),
        (8192, "compiled", False),
    ]


def test_decoding_is_judged_after_many_tokens():
    from measuring.targets import judge

    def token(tokens, fraction, seconds):
        one = {"part": "decode", "tokens": tokens, "case": "one layer", "mode": "graphed"}
        return {**one, "fraction": fraction, "seconds": seconds}

    judged = judge(
        [
            *(token(32768, fraction, 1) for fraction in (1.0, 0.1)),
            *(token(131072, fraction, seconds) for fraction, seconds in ((1.0, 6), (0.1, 1))),
        ]
    )
    assert [(x["tokens"], x["ratio"], x["bound"], x["met"]) for x in judged] == [
        (131072, 6, 5, True)
    ]


def test_a_time_that_is_missing_meets_nothing():
    from measuring.targets import judge

    one = {"part": "delta", "tokens": 16384, "pass": FORWARD}
    judged = judge(
        [
            {**one, "case": "score", "seconds": 1},
            {**one, "case": "fla", "reason": "OutOfMemoryError"},
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
    for one in (wrong, nan):
        assert "seconds" not in one
        assert one["reason"].startswith("WrongResultError: out: error ")


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


def test_a_part_whose_time_is_over_leaves_the_rest_with_that_reason(monkeypatch):
    """Time is what the calls say it is: each lasts a minute."""
    import gpu
    from measuring import clock as timing
    from measuring.clock import Contender, race
    from measuring.floors import Work

    now, saved = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    class Part:
        @staticmethod
        def shapes(sizes):
            return 1, 2

        @staticmethod
        def measure(shape, sizes, clock, ceilings):
            for case in "abcd":
                yield from race([contender(case)], clock, ceilings, {"part": "it", "tokens": shape})

    def contender(case):
        def call():
            now[0] += 60

        return Contender({"case": case}, call, dict, Work(1, 1))

    monkeypatch.setattr(timing.Clock, "ceilings", lambda *_: timing.Ceilings(1, 1))
    monkeypatch.setattr(gpu, "PARTS", {"it": Part, "next": Part})
    result = gpu.measure(gpu.SMALL, ["next", "it"], 2, lambda x: saved.append(len(str(x))), 10)
    found = [(x["case"], x.get("reason", "")[:14]) for x in result["measurements"]]
    # one call to count, three to warm up, two to time: six minutes a case
    late = "OutOfTimeError"
    begun = [("a", ""), ("b", ""), ("c", late), ("d", late), ("all", late)]
    assert found == begun * 2
    assert len(saved) == len(found)
    assert result["measurements"][0]["seconds"] == 60
    assert result["measurements"][0]["host_seconds"] == 60


def test_a_result_replaces_the_one_before_it_whole(tmp_path):
    import gpu

    path = tmp_path / "gpu.json"
    for number in (1, 2):
        gpu.written(path, {"measurements": [number]})
        assert json.loads(path.read_text()) == {"measurements": [number]}
    with pytest.raises(TypeError):
        gpu.written(path, {"measurements": [torch.float32]})
    assert json.loads(path.read_text()) == {"measurements": [2]}
    assert list(tmp_path.iterdir()) == [path]


def test_costs_on_a_gpu_are_counted(monkeypatch):
    """The device is a stand-in: it holds 100 bytes, a call takes 50 more and launches two kernels."""
    from measuring import costs

    class Event:
        def __init__(self, name, device_type):
            self.name, self.device_type = name, device_type

    class Profile:
        def __init__(self, activities):
            self.activities = activities

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def events(self):
            kinds = costs.DeviceType
            launched = [Event("kernel", kinds.CUDA), Event("copy", kinds.CUDA)]
            return [Event("aten::mm", kinds.CPU), *launched, Event("kernel", kinds.CUDA)]

    # zeros calls empty and zero_, which are not counted
    assert costs.costs(lambda: torch.zeros(2) + 1, gpu=False) == {"torch_ops": 2}
    held, peak = [100], [1000]
    monkeypatch.setattr(costs, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, held[0]))

    def call():
        peak[0] = held[0] + 50

    assert costs.costs(call, gpu=True) == {"peak_bytes": 50, "launches": 3}
    assert costs.launched(Profile([])) == {"kernel": 2, "copy": 1}


def test_the_sweep_pastes_the_fastest_launch_of_every_kernel(monkeypatch):
    """The device and the clock are stand-ins: of every kernel one launch is fastest, one fails."""
    from measuring import sweep
    from measuring.chips import H100
    from measuring.floors import Ceilings
    from measuring.sizes import SMALL

    kernels = import_module(sweep.TUNED)
    wanted = {"forward": (64, 64, 4, 2), "queries_grad": (128, 32, 8, 1)}
    base = kernels.configs_of(torch.zeros(1, 1, 1, 128), torch.zeros(1, 1, 1, 128), None)
    launched = []

    def race(contenders, clock, ceilings, common):
        found = []
        for one in contenders:
            launched.clear()
            one.call()
            place = sweep.KERNELS.index(one.names["case"].split()[0])
            assert one.estimate.seconds > one.estimate.floor
            # the launch that is tried stands in its place, and the others are as they were
            assert launched == [
                (*base[:place], type(base[0])(*one.names["launch"]), *base[place + 1 :])
            ]
            seconds = 1 if wanted.get(sweep.KERNELS[place]) == one.names["launch"] else 2
            time = {"reason": "out of registers"} if place == 2 else {"seconds": seconds}
            found.append({**common, **one.names, **time})
        return found

    def attend(q, k, v):
        launched.append(kernels.configs_of(q, k, None))
        return q + k + v

    monkeypatch.setattr(sweep, "race", race)
    monkeypatch.setattr(sweep, "selected", lambda *_: attend)
    monkeypatch.setattr(type(SMALL), "gpu", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    said = []
    clock = type("Clock", (), {"say": lambda self, text: said.append(text), "chip": H100})()
    found = list(sweep.measure(192, SMALL._replace(head_dim=128), clock, Ceilings(1, 1)))
    line = "SM90: 128: (Config(64, 64, 4, 2), Config(128, 32, 8, 1), Config{}),"
    assert said == [line.format(tuple(base[2]))] == [found[-1]["line"]]
    tried = {one["launch"] for one in found if one["case"].startswith("forward")}
    assert len(tried) == len([one for one in found if one["case"].startswith("forward")])
    assert tuple(base[0]) in tried


@torch.no_grad()
def test_a_graphed_step_is_the_eager_one(monkeypatch):
    """A recording of the ops stands for a CUDA graph."""
    from host_graph import HostGraph
    from measuring import decode
    from measuring.checks import WrongResultError
    from measuring.sizes import SMALL

    sizes = SMALL._replace(decode_batch=2, decode_piece=32)

    def capture(step):
        with monkeypatch.context() as patch:
            # argument checks do not read values while torch is compiling, as in a capture
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            return HostGraph(step).replay

    for capturing, fails in ((capture, False), (lambda step: step() or (lambda: None), True)):
        layer, state = decode.prefilled(40, 0.5, sizes)
        x = torch.randn(2, sizes.hidden)
        if fails:  # nothing is replayed, so the first step stands for the second
            with pytest.raises(WrongResultError, match="graphed step"):
                decode.graphed(layer, x, state, 6, capturing)
            continue
        replay = decode.graphed(layer, x, state, 6, capturing)
        replay()


@pytest.mark.parametrize("learns", [False, True])
def test_grouped_and_packed_candidates_are_what_the_sample_says(learns):
    from measuring import attend
    from measuring.checks import SampledAttention, WrongResultError

    torch.manual_seed(0)
    q, cotangent = (torch.randn(1, 120, 8, 8) for _ in range(2))
    for variant in attend.VARIANTS:
        heads = 2 if variant == "grouped queries" else 8
        k, v = (torch.randn(1, 120, heads, 8) for _ in range(2))
        ours = [
            one for one in attend.variant_candidates(variant, q, k) if one.names["case"] == "gather"
        ]
        assert len(ours) == (2 if variant == "packed" else 1)
        for one in ours:
            sample = SampledAttention(q, k, v, one.evict_at, cotangent)
            assert max(sample.check(one.attend, learns)["errors"].values()) < 1e-5
            pairs, kept = attend.seen(one.evict_at)
            assert 0 < kept <= one.evict_at.numel()
            assert pairs < heads * 120 * 121 // 2
        other = torch.full_like(one.evict_at, 2**31 - 1)
        with pytest.raises(WrongResultError):
            SampledAttention(q, k, v, other, cotangent).check(one.attend, learns)


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
        "--only",
        "decode",
        "--contexts",
        "128",
        "--out",
        str(tmp_path),
    ]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = re.findall(
        r"context +128  keep ([\d.]+) +eager +([\d,]+) tokens/s +([\d,]+) bytes", run.stdout
    )
    assert [float(keep) for keep, _, _ in lines] == pytest.approx([1, 0.5, 0.25, 0.1], abs=0.1)
    sizes = [int(nbytes.replace(",", "")) for _, _, nbytes in lines]
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
