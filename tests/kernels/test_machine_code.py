"""Every kernel compiles for the GPUs that users have, without one: no spills, within shared memory,
tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Shared memory that one block may have, bytes (CUDA C++ Programming Guide, compute capabilities).
"""
TENSOR_CORES = {"sm_80": {"mma.sync"}, "sm_90": {"wgmma"}, "sm_100": {"tcgen05.mma", "mma.sync"}}
DECODING = {"mma.sync"}
"""A tile of 16 queries is too small for what later chips have."""


@pytest.fixture(scope="module")
def built() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [sys.executable, str(Path(__file__).parent / "machine_code.py")]
    run = subprocess.run(script, check=False, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found: list[dict[str, Any]] = json.loads(run.stdout)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| kernel | head size | chip | tile | warps | registers | spilled bytes | shared bytes | products |"
    ]
    lines.append("|---|--:|---|---|--:|--:|--:|--:|---|")
    for row in rows:
        tile = " x ".join(map(str, row["tile"]))
        cells = (
            row["kernel"],
            row["head"] or "any",
            row["chip"],
            tile,
            row["warps"],
            row["registers"],
            row["spilled"],
        )
        lines.append(
            "| "
            + " | ".join(map(str, (*cells, row["shared"], row["tensor_cores"] or "none")))
            + " |"
        )
    return "\n".join(lines)


@pytest.mark.slow
def test_what_kernels_take(built: list[dict[str, Any]]) -> None:
    print(table(built))
    for row in built:
        told = f"{row}"
        assert row["shared"] <= SHARED[row["chip"]], told
        assert row["spilled"] <= (0 if row["head"] <= 128 else 256), told
        if row["multiplies"]:
            decoding = row["kernel"].endswith("of pages")
            assert row["tensor_cores"] in (DECODING if decoding else TENSOR_CORES[row["chip"]]), (
                told
            )


@pytest.mark.slow
def test_the_table_stands_in_the_docs(built: list[dict[str, Any]]) -> None:
    assert table(built) in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
