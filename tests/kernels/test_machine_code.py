"""Every kernel compiles for the GPUs that users have, without one, however it is launched: no spills,
within shared memory, on tensor cores, and no product computed twice.

`make triton36` runs this file with Triton 3.6.0 instead of the one of the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from every_kernel import every_kernel, named

ROOT = Path(__file__).parents[2]
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Shared memory that one block may have, bytes (CUDA C++ Programming Guide, compute capabilities).
"""
TENSOR_CORES = {"sm_80": {"mma.sync"}, "sm_90": {"wgmma"}, "sm_100": {"tcgen05.mma", "mma.sync"}}
TABLE_OF = "3.7.1"
"""The Triton whose numbers stand in the docs."""
DECODING = {"mma.sync"}
"""A tile of 16 queries is too small for what later chips have."""


def machine_code(*arguments: str) -> list[dict[str, Any]]:
    """What machine_code.py tells, in a process whose Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [sys.executable, str(Path(__file__).parent / "machine_code.py"), *arguments]
    run = subprocess.run(script, check=False, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found: list[dict[str, Any]] = json.loads(run.stdout)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| kernel | head size | chip | tile | warps | stages | registers | spilled bytes | shared bytes "
        "| blocks | products |"
    ]
    lines.append("|---|--:|---|---|--:|--:|--:|--:|--:|--:|---|")
    for row in rows:
        tile = " x ".join(map(str, row["tile"]))
        cells = (
            row["kernel"],
            row["head"] or "any",
            row["chip"],
            tile,
            row["warps"],
            row["stages"],
            row["registers"],
            row["spilled"],
            row["shared"],
            row["blocks"],
        )
        lines.append("| " + " | ".join(map(str, (*cells, row["tensor_cores"] or "none"))) + " |")
    return "\n".join(lines)


@pytest.mark.slow
def test_what_kernels_take_as_the_docs_say() -> None:
    built = machine_code()
    print(table(built))
    for row in built:
        told = f"{row}"
        assert row["shared"] <= SHARED[row["chip"]], told
        none, few = (0, 256) if version("triton") == TABLE_OF else (16, 272)
        assert row["spilled"] <= (none if row["head"] <= 128 else few), told
        # every product once: warps that compute the same tile again would double it. A product of
        # tcgen05 is issued by one thread for the whole block, and stands once more where a loop is
        # entered or left.
        once = row["tensor_cores"] != "tcgen05.mma"
        assert row["done"] == row["needed"] if once else row["done"] >= row["needed"], told
        if row["needed"]:
            decoding = row["kernel"].endswith("of pages")
            expected = DECODING if decoding else TENSOR_CORES[row["chip"]]
            assert row["tensor_cores"] in expected, told
    if version("triton") == TABLE_OF:  # another compiler gives other numbers, within the limits
        assert table(built) in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_kernel_compiles_however_it_is_launched() -> None:
    """With sizes and strides of 1, which Triton makes constants, and without any alignment."""
    results = machine_code("specialised")
    failed = [result for result in results if result["error"]]
    assert not failed, failed
    assert {result["kernel"] for result in results} == set(map(named, every_kernel()))
