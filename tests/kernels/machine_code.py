"""Compiles kernels to machine code for GPUs that need not be there, and tells what each takes: one JSON on stdout.

    python tests/kernels/machine_code.py

Run without TRITON_INTERPRET. Registers and spills come from cuobjdump in Triton's own package.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hamblocks_ops.selected_attention import triton as attention

CHIPS = (80, 90, 100)
WIDTHS = (64, 128, 256)
TYPES = {
    "bf16": ("q", "k", "v", "k_list", "v_list", "wanted", "out", "dq", "dk", "dv"),
    "fp32": ("bias_list", "exact", "lse", "delta", "bias", "dbias"),
}
SCALARS = {"scale": "fp32"}


class Build(NamedTuple):
    """One kernel at one size."""

    kernel: Any
    width: int
    constants: dict[str, Any]
    warps: int
    stages: int
    multiplies: bool = True


def builds(chip: int) -> Iterator[Build]:
    for width in WIDTHS:
        forward, of_queries, of_keys = attention.configs(width, torch.bfloat16, chip // 10)
        sizes = {"HEADS": 16, "KV_HEADS": 16, "DIM": width, "WIDTH": width, "HAS_BIAS": False}
        for kernel, config, more in (
            (attention.forward_kernel, forward, {"KEEP": True}),
            (attention.queries_grad_kernel, of_queries, {}),
            (attention.keys_grad_kernel, of_keys, {}),
        ):
            tile = {"BLOCK_M": config.queries, "BLOCK_N": config.keys}
            yield Build(kernel, width, sizes | tile | more, config.warps, config.stages)
        copy = {"HEADS": 16, "DIM": width, "WIDTH": width, "BLOCK": forward.keys, "HAS_BIAS": False}
        yield Build(attention.copy_kernel, width, copy, 4, 3, multiplies=False)


def typed(name: str, constants: dict[str, Any]) -> str:
    """Type of an argument by its name: bf16 and fp32 tensors, int32 tensors, integers."""
    if name in constants:
        return "constexpr"
    for kind, names in TYPES.items():
        if name in names:
            return f"*{kind}"
    if name in SCALARS:
        return SCALARS[name]
    sizes = ("queries", "tokens", "slots")
    return "i32" if name in sizes or re.fullmatch(r"[qkv]_[bth]", name) else "*i32"


def compiled(build: Build, chip: int) -> dict[str, Any]:
    """What one kernel takes on one chip."""
    names = build.kernel.arg_names
    signature = {name: typed(name, build.constants) for name in names}
    # what a launch finds out of its arguments: pointers, strides and lengths are multiples of 16
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if signature[name][0] in ("*", "i")
    }
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=build.constants, attrs=aligned)
    options = {"num_warps": build.warps, "num_stages": build.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    ptx = binary.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    spilled = sum(map(int, re.findall(r"LOCAL:(\d+)", usage))) + stack
    matrix = [name for name in ("wgmma", "tcgen05.mma", "mma.sync") if name in ptx]
    return {
        "kernel": build.kernel.__name__.removesuffix("_kernel"),
        "head": build.width,
        "chip": f"sm_{chip}",
        "tile": [build.constants.get("BLOCK_M"), build.constants.get("BLOCK_N", build.constants.get("BLOCK"))],
        "warps": build.warps,
        "registers": registers,
        "spilled": spilled,
        "shared": binary.metadata.shared,
        "multiplies": build.multiplies,
        "tensor_cores": matrix[0] if matrix else None,
    }


if __name__ == "__main__":
    json.dump([compiled(build, chip) for chip in CHIPS for build in builds(chip)], sys.stdout, indent=1)
