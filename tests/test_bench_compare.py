"""`make bench-compare`: what is slower is found, what is as fast or wrong is told apart."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import compare  # noqa: E402


def times(scale, seed, rounds=15):
    """Pairs of times with load that both share, and noise of 2 % that they do not."""
    draw = random.Random(seed)
    load = [draw.uniform(1, 3) for _ in range(rounds)]
    own, base = ([one * draw.gauss(1, 0.02) for one in load] for _ in range(2))
    return [scale * one for one in own], base


@pytest.mark.parametrize("seed", range(5))
def test_only_what_is_slower_by_more_than_the_noise_is_slower(seed):
    ratio = compare.ratio_of(*times(1.2, seed))
    assert ratio.is_slower
    assert ratio.low < ratio.median < ratio.high
    assert 1.15 < ratio.median < 1.25
    for scale in (0.5, 1.0, 1.03):
        assert not compare.ratio_of(*times(scale, seed)).is_slower


@pytest.mark.slow
def test_a_tree_is_timed_against_another(tmp_path):
    for name in ("hamblocks", "ops"):
        shutil.copytree(ROOT / name, tmp_path / name)
    faster = tmp_path / "ops/hamblocks_ops/__init__.py"

    def run(only):
        command = [sys.executable, str(ROOT / "benchmarks/compare.py"), str(tmp_path)]
        options = ["--small", "--rounds", "5", "--only", only]
        return subprocess.run([*command, *options], capture_output=True, text=True, check=False)

    # the base finds an empty answer at once, so this tree is far slower; but that answer is wrong
    source = faster.read_text()
    faster.write_text(source + "\nselect_topk = lambda score, k, **_: score\n")
    ended = run("select_topk")
    assert ended.returncode == 0, ended.stderr
    assert "not timed (the base: " in ended.stdout
    faster.write_text(
        source
        + "\nimport time\nslow = select_topk\n"
        + "def select_topk(*args, **more):\n    time.sleep(0.02)\n    return slow(*args, **more)\n"
    )
    ended = run("select_topk")
    assert ended.returncode == 0, ended.stderr
    median = float(ended.stdout.splitlines()[1].split()[1])
    assert median < 0.7  # this tree does not sleep
    ended = run("nothing of that name")
    assert ended.returncode == 1
    assert "--only: expected a part of a name" in ended.stderr
