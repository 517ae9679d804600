"""benchmarks/gpu.py runs: nobody wants to find that out on a GPU."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_it_measures_on_a_cpu_and_writes_nothing(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--contexts", "128", "--out", str(tmp_path)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = re.findall(r"context +128  keep ([\d.]+) +([\d,]+) tokens/s +([\d,]+) bytes", run.stdout)
    assert [float(keep) for keep, _, _ in rows] == pytest.approx([1, 0.5, 0.25, 0.1], abs=0.1)
    sizes = [int(nbytes.replace(",", "")) for _, _, nbytes in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so():
    run = subprocess.run([sys.executable, str(SCRIPT)], check=False, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "benchmarks/gpu.py: expected a CUDA device, got none\n"
