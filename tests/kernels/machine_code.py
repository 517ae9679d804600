"""Compiles kernels to machine code for GPUs that need not be there, and tells what each takes: one
JSON on stdout.

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

from hamblocks_ops.compact import triton as lists
from hamblocks_ops.gated_delta_rule import triton as delta
from hamblocks_ops.paged_attention import triton as paged
from hamblocks_ops.selected_attention.triton.backward import keys_grad_kernel, queries_grad_kernel
from hamblocks_ops.selected_attention.triton.forward import forward_kernel
from hamblocks_ops.selected_attention.triton.keys import copy_kernel
from hamblocks_ops.selected_attention.triton.sizes import configs
from hamblocks_ops.surprise import triton as scores
from hamblocks_ops.tiles.rows import launch

CHIPS = (80, 90, 100)
WIDTHS = (64, 128, 256)
BF16, FP32, INT64 = "*bf16", "*fp32", "*i64"


class Build(NamedTuple):
    """One kernel at one size. `types` are those of its arguments; of the others pointers are to
    int32."""

    kernel: Any
    width: int
    constants: dict[str, Any]
    types: dict[str, str]
    tile: tuple[int, ...]
    warps: int = 4
    stages: int = 3
    multiplies: bool = True
    name: str = ""


def builds(chip: int) -> Iterator[Build]:
    for width in WIDTHS:
        yield from of_attention(width, chip, groups=1, bias=False)
        yield from of_attention(width, chip, groups=4, bias=True)
        yield from of_pages(width)
        yield from of_rows(width)
        yield of_beta(width)
    yield from of_lists()


def named(kinds: dict[str, str]) -> dict[str, str]:
    """{"*bf16": "q k"} -> {"q": "*bf16", "k": "*bf16"}."""
    return {name: kind for kind, names in kinds.items() for name in names.split()}


def of_attention(width: int, chip: int, *, groups: int, bias: bool) -> Iterator[Build]:
    types = named(
        {
            BF16: "q k v k_list v_list wanted out dq dk dv",
            FP32: "bias_list exact lse delta bias dbias",
            "fp32": "scale",
            "i32": "queries tokens slots q_b q_t q_h k_b k_t k_h v_b v_t v_h",
        }
    )
    forward, of_queries, of_keys = configs(width, torch.bfloat16, chip // 10, loaded=bias)
    kv = {"KV_HEADS": 16 // groups, "HAS_BIAS": bias}
    sizes = {"HEADS": 16, "DIM": width, "WIDTH": width, **kv}
    suffix = " with bias, grouped" if bias else ""
    for kernel, config, more in (
        (forward_kernel, forward, {"KEEP": True}),
        (queries_grad_kernel, of_queries, {}),
        (keys_grad_kernel, of_keys, {}),
    ):
        tile = {"BLOCK_M": config.queries, "BLOCK_N": config.keys}
        yield Build(
            kernel,
            width,
            sizes | tile | more,
            types,
            tuple(tile.values()),
            config.warps,
            config.stages,
            name=suffix,
        )
    if not bias:
        copy = {"HEADS": 16, "DIM": width, "WIDTH": width, "BLOCK": forward.keys, "HAS_BIAS": False}
        yield Build(copy_kernel, width, copy, types, (forward.keys,), multiplies=False)


def of_pages(width: int) -> Iterator[Build]:
    """Pages of 16 slots, groups of 4 query heads."""
    strides = "k_p k_s k_w v_p v_s v_w begin pages columns queries per_share first_share shares"
    types = named({BF16: "q k v", FP32: "out lse parts sums bias", "fp32": "scale", "i32": strides})
    config = paged.config(width, torch.bfloat16)
    sizes = {
        "STREAMS": 4,
        "TOGETHER": 1,
        "GROUP": 4,
        "PAGE": 16,
        "DIM": width,
        "WIDTH": width,
        "HAS_BIAS": False,
    }
    tile = {"BLOCK_M": 16, "BLOCK_N": config.slots}
    yield Build(
        paged.share_kernel,
        width,
        sizes | tile,
        types,
        tuple(tile.values()),
        config.warps,
        config.stages,
        name=" of pages",
    )
    block = 1024 // width
    constants = {"DIM": width, "WIDTH": width, "BLOCK": block}
    merged = types | {"out": BF16}
    yield Build(
        paged.merge_kernel, width, constants, merged, (block,), multiplies=False, name=" of pages"
    )


def of_rows(width: int) -> Iterator[Build]:
    constants = launch(width, "cosine", torch.float32)
    types = named(
        {BF16: "residual v v_new d_residual dv", FP32: "score wanted beta", "i32": "rows"}
    )
    tile = (constants["BLOCK"],)
    for kernel in (scores.surprise_kernel, scores.surprise_grad_kernel):
        yield Build(kernel, width, constants, types, tile, multiplies=False)
    more = {"LEAST": 2.0**-64, "HALF": 2.0**-8, "WRITES": True}
    yield Build(delta.residual_kernel, width, constants | more, types, tile, multiplies=False)


def of_beta(width: int) -> Build:
    types = named(
        {
            BF16: "k dh v_new local dr",
            FP32: "g beta dbeta",
            INT64: "cu_seqlens chunk_indices",
            "i32": "tokens",
        }
    )
    tiles = {"BK": 64, "BV": 64}
    sizes = {
        "HEADS": 16,
        "VALUE_HEADS": 16,
        "K": width,
        "V": width,
        "CHUNK": 64,
        "LEAST": 2.0**-64,
        "PACKED": False,
    }
    return Build(delta.beta_grad_kernel, width, sizes | tiles, types, (64, 64))


def of_lists() -> Iterator[Build]:
    strides = "e_b e_t e_h p_b p_t p_h tokens heads blocks capacity"
    types = named({INT64: "position", "i32": strides})
    sizes = {"TOKENS": lists.TOKENS, "HEADS": 16}
    for kernel, more in ((lists.count_kernel, {}), (lists.write_kernel, {"COUNTS": lists.COUNTS})):
        yield Build(
            kernel,
            0,
            sizes | more,
            types,
            (lists.TOKENS, 16),
            8,
            multiplies=False,
            name=" of lists",
        )


def compiled(build: Build, chip: int) -> dict[str, Any]:
    """What one kernel takes on one chip."""
    names = build.kernel.arg_names
    signature = {
        name: "constexpr" if name in build.constants else build.types.get(name, "*i32")
        for name in names
    }
    # what a launch finds out of its arguments: pointers, strides and lengths are multiples of 16
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name][0] in ("*", "i")
    }
    source = ASTSource(
        fn=build.kernel, signature=signature, constexprs=build.constants, attrs=aligned
    )
    options = {"num_warps": build.warps, "num_stages": build.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    ptx = binary.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
        usage = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    spilled = sum(map(int, re.findall(r"LOCAL:(\d+)", usage))) + stack
    matrix = [name for name in ("wgmma", "tcgen05.mma", "mma.sync") if name in ptx]
    return {
        "kernel": build.kernel.__name__.removesuffix("_kernel") + build.name,
        "head": build.width,
        "chip": f"sm_{chip}",
        "tile": build.tile,
        "warps": build.warps,
        "registers": registers,
        "spilled": spilled,
        "shared": binary.metadata.shared,
        "multiplies": build.multiplies,
        "tensor_cores": matrix[0] if matrix else None,
    }


if __name__ == "__main__":
    json.dump(
        [compiled(build, chip) for chip in CHIPS for build in builds(chip)], sys.stdout, indent=1
    )
