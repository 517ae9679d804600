"""The example of pretraining goes on from its checkpoints as if nothing had stopped it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tensorboard")
pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/pretrain"


def config(folder: Path, steps: int, context: int) -> Path:
    text = (EXAMPLE / "tiny.toml").read_text()
    changes = {
        "tokens = 256": "tokens = 37",
        "hidden_size = 64": "hidden_size = 16",
        "steps = 60": f"steps = {steps}",
        "checkpoint_every = 20": "checkpoint_every = 3",
        "context = 1": f"context = {context}",
        '"out/pretrain"': f'"{folder}"',
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path = folder.with_suffix(".toml")
    path.write_text(text)
    return path


def start(path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(EXAMPLE / "train.py"), "--config", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes]) -> None:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output.decode()


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "losses.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start(config(whole, 12, context=2)))
    running = start(config(parts, 12, context=2))
    while not (parts / "losses.jsonl").exists() and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)  # torchrun hands it on
    running.communicate(timeout=600)
    stopped = len(losses(parts))
    assert 1 <= stopped <= 12
    finish(start(config(parts, 12, context=2)))
    assert losses(parts) == losses(whole)
    assert len(losses(whole)) == 12
    # ranks that share out the batch, not its sequences, compute the same: until a threshold moves,
    # because slices have another sample of scores
    finish(start(config(tmp_path / "batch", 1, context=1)))
    assert losses(tmp_path / "batch")[1] == pytest.approx(losses(whole)[1], rel=1e-5)
