"""Compiles kernels to machine code for GPUs that need not be there, and tells what each takes: one
JSON on stdout.

    python tests/kernels/machine_code.py [sm_90 ...]      what each kernel takes
    python tests/kernels/machine_code.py specialised      whether each compiles however it is launched

Run without TRITON_INTERPRET. Registers and spills come from cuobjdump in Triton's own package,
tensor-core instructions from the PTX.
"""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from every_kernel import named
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from hamblocks_ops.append import triton as append
from hamblocks_ops.compact import triton as lists
from hamblocks_ops.decode import triton as decode
from hamblocks_ops.gated_delta_rule import triton as steps
from hamblocks_ops.gated_delta_rule.triton import residual as delta
from hamblocks_ops.paged_attention import triton as paged
from hamblocks_ops.selected_attention.triton.backward import keys_grad_kernel, queries_grad_kernel
from hamblocks_ops.selected_attention.triton.forward import forward_kernel
from hamblocks_ops.selected_attention.triton.keys import copy_kernel
from hamblocks_ops.selected_attention.triton.listing import count_kernel, write_kernel
from hamblocks_ops.selected_attention.triton.moments import shift_kernel, span_kernel
from hamblocks_ops.selected_attention.triton.plan import plan_kernel
from hamblocks_ops.selected_attention.triton.sizes import configs
from hamblocks_ops.selected_attention.triton.stored import COUNTS, MOMENTS, TOKENS, WARPS
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
    macs: int = 0
    """Multiplications of all products that stand in the kernel's code, each counted once."""
    name: str = ""


def builds(chip: int) -> Iterator[Build]:
    for width in WIDTHS:
        yield from of_attention(width, chip, groups=1, bias=False)
        yield from of_attention(width, chip, groups=4, bias=True)
        yield from of_pages(width)
        yield from of_rows(width)
        yield of_beta(width)
        yield of_steps(width)
        yield from of_heads(width)
    yield from of_append()
    yield from of_stored(chip)
    yield from of_lists()


def typed(kinds: dict[str, str]) -> dict[str, str]:
    """{"*bf16": "q k"} -> {"q": "*bf16", "k": "*bf16"}."""
    return {name: kind for kind, names in kinds.items() for name in names.split()}


OF_ATTENTION = typed(
    {
        BF16: "q k v k_list v_list wanted out dq dk dv",
        FP32: "bias_list exact lse delta bias dbias",
        INT64: "spans shifts",
        "fp32": "scale factor",
        "i32": "queries tokens slots units streams heads sequences steps rows blocks programs "
        "q_b q_t q_h k_b k_t k_h v_b v_t v_h b_b b_t b_h p_b p_t p_h e_b e_t e_h",
    }
)


def of_attention(width: int, chip: int, *, groups: int, bias: bool) -> Iterator[Build]:
    forward, of_queries, of_keys = configs(width, torch.bfloat16, chip // 10, loaded=bias)
    kv = {"KV_HEADS": 16 // groups, "HAS_BIAS": bias}
    sizes = {"HEADS": 16, "DIM": width, "WIDTH": width, **kv}
    suffix = " with bias, grouped" if bias else ""
    # products of a tile, and how often the code has them: with and without a mask
    for kernel, config, more, products in (
        (forward_kernel, forward, {"KEEP": True}, 2 * 2),
        (queries_grad_kernel, of_queries, {}, 3 * 2),
        (keys_grad_kernel, of_keys, {}, 4),
    ):
        tile = {"BLOCK_M": config.queries, "BLOCK_N": config.keys}
        yield Build(
            kernel,
            width,
            sizes | tile | more,
            OF_ATTENTION,
            tuple(tile.values()),
            config.warps,
            config.stages,
            macs=products * config.queries * config.keys * width,
            name=suffix,
        )
    if not bias:
        unit = min(forward.keys, of_queries.keys, of_keys.keys)
        copy = {"HEADS": 16, "DIM": width, "WIDTH": width, "UNIT": unit, "HAS_BIAS": False}
        yield Build(copy_kernel, width, copy, OF_ATTENTION, (unit,))


def of_stored(chip: int) -> Iterator[Build]:
    """The kernels that make lists and plans of selected attention, for packed sequences."""
    three = configs(128, torch.bfloat16, chip // 10)
    unit, align = (found(one.keys for one in three) for found in (min, max))
    tokens = {"HEADS": 16, "TOKENS": TOKENS, "PACKED": True}
    tiles = zip(
        ("M", "N", "QM", "QN", "KM", "KN"), (x for one in three for x in one[:2]), strict=True
    )
    for kernel, sizes, tile in (
        (span_kernel, {"BLOCK": MOMENTS, "PACKED": True}, (MOMENTS,)),
        (shift_kernel, {"BLOCK": MOMENTS}, (MOMENTS,)),
        (count_kernel, tokens, (TOKENS,)),
        (write_kernel, tokens | {"COUNTS": COUNTS, "ALIGN": align}, (TOKENS,)),
        (plan_kernel, {"HEADS": 16, "UNIT": unit, **dict(tiles), "KEEP": True}, (16, 64)),
    ):
        warps = WARPS if kernel in (write_kernel, plan_kernel) else 4
        yield Build(kernel, 0, sizes, OF_ATTENTION, tile, warps, name=" of stored keys")


def of_pages(width: int) -> Iterator[Build]:
    """Pages of 16 slots, groups of 4 query heads."""
    strides = "k_p k_s k_w v_p v_s v_w begin pages columns queries per_share first_share shares"
    types = typed({BF16: "q k v", FP32: "out lse parts sums bias", "fp32": "scale", "i32": strides})
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
        macs=2 * 16 * config.slots * width,
        name=" of pages",
    )
    block = 1024 // width
    constants = {"DIM": width, "WIDTH": width, "BLOCK": block}
    merged = types | {"out": BF16}
    yield Build(paged.merge_kernel, width, constants, merged, (block,), name=" of pages")


def of_rows(width: int) -> Iterator[Build]:
    constants = launch(width, "cosine", torch.float32)
    types = typed(
        {BF16: "residual v v_new d_residual dv", FP32: "score wanted beta", "i32": "rows"}
    )
    tile = (constants["BLOCK"],)
    for kernel in (scores.surprise_kernel, scores.surprise_grad_kernel):
        yield Build(kernel, width, constants, types, tile)
    more = {"LEAST": 2.0**-64, "HALF": 2.0**-8, "WRITES": True}
    yield Build(delta.residual_kernel, width, constants | more, types, tile)


def of_beta(width: int) -> Build:
    types = typed(
        {
            BF16: "k dh v_new local dr",
            FP32: "g beta dbeta",
            INT64: "cu_seqlens chunk_indices",
            "i32": "tokens chunks",
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
    macs = 64 * 64 * (width + width) + 64 * width * width
    return Build(delta.beta_grad_kernel, width, sizes | tiles, types, (64, 64), macs=macs)


def of_steps(width: int) -> Build:
    """Decoding: one token of each sequence, with the score and without the residual."""
    finfo = torch.finfo(torch.float32)
    types = typed(
        {
            BF16: "q k v out residual",
            FP32: "beta g state score final_state",
            "fp32": "scale",
            "i32": "tokens q_b q_t q_h k_b k_t k_h v_b v_t v_h",
        }
    )
    rows, columns, warps = steps.tile(width, width)
    sizes = {"HEADS": 16, "GROUP": 1, "K": width, "V": width, "BK": rows, "BV": columns}
    metric = "cosine" if columns == width else None
    more = {"METRIC": metric, "TINY": finfo.tiny, "MOST": finfo.max, "WRITES": metric is None}
    constants = sizes | more | {"PACKED": False}
    return Build(steps.step_kernel, width, constants, types, (rows, columns), warps)


def of_heads(width: int) -> Iterator[Build]:
    """Decoding: queries, keys and values of the memory and of attention, and the sum of reads."""
    strides = "x0_n x0_h x1_n x1_h x2_n x2_h s_n s_t channels entries"
    types = typed(
        {
            BF16: "x0 x1 x2 y0 y1 y2 weight0 weight1 weight2 taps state after first second weight1 "
            "weight2 logits out a b a_log dt_bias",
            FP32: "frequency g beta",
            "fp32": "factor most",
            "i32": strides,
        }
    )
    part = {"HEADS": 16, "DIM": width, "WIDTH": width, "REPEAT": 1, "EPS": 0.0}

    def parts(*own: dict[str, Any]) -> dict[str, Any]:
        return {f"{n}{i}": x for i, one in enumerate(own) for n, x in (part | one).items()}

    memory, attention = (
        parts(
            *(
                {"CHANNEL": i * 16 * width, "SILU": True, "NORM": int(i < 2), "TURNS": False}
                for i in range(3)
            )
        ),
        parts(
            {"CHANNEL": -1, "SILU": False, "NORM": 2, "TURNS": True, "EPS": 1e-6},
            {"CHANNEL": 0, "SILU": False, "NORM": 2, "TURNS": True, "EPS": 1e-6},
            {
                "CHANNEL": -1,
                "SILU": False,
                "NORM": 0,
                "TURNS": False,
                "HEADS": 0,
                "DIM": 1,
                "WIDTH": 1,
            },
        ),
    )
    wide = {"WIDE": triton.language.float32}
    for name, constants in (
        (" of the memory", memory | wide | {"TAPS": 4, "PAIRS": 0}),
        (" of attention", attention | wide | {"TAPS": 2, "PAIRS": width // 2}),
    ):
        yield Build(decode.heads_kernel, width, constants, types, (width,), 1, name=name)
    norms = {"DIM": width, "WIDTH": width, "EPS": 1e-6, "NORM1": True, "NORM2": True}
    yield Build(decode.mix_kernel, width, norms | wide, types, (width,), 1)
    if width == WIDTHS[0]:
        competing = typed({FP32: "score scores scores_after", "i32": "slots s_n s_h n_n n_h"})
        block = {"HEADS": 16, "BLOCK": 1024}
        yield Build(decode.compete_kernel, 0, block, competing, (1024,))
        yield Build(decode.decay_kernel, 0, {"HEADS": 16, "BLOCK": 256}, types, (256,))


def of_append() -> Iterator[Build]:
    """Decoding: one token of 8 streams of 128 entries, in pages of 32 slots."""
    scalars = "columns width pages begin p_r e_r b_r"
    types = typed(
        {BF16: "keys values k v", FP32: "bias bias_of", INT64: "most_pages", "i32": scalars}
    )
    block = append.SCANNED
    sizes = {"STREAMS": 8, "PAGE": 32, "BLOCK": block, "LOWERED": True}
    more = {"ENTRIES": 128, "WIDTH": 128, "SLOTS": 32, "FIRST": True, "HAS_BIAS": False}
    for kernel, constants in (
        (append.plan_kernel, sizes),
        (append.find_kernel, {"BLOCK": block}),
        (append.append_kernel, sizes | more),
    ):
        yield Build(kernel, 0, constants, types, (block,), name=" of new tokens")
    scalars = "columns width listed w_n w_l w_h e_n e_l e_h"
    constants = {"STREAMS": 8, "PAGE": 32, "BLOCK": block, "STEPS": 10}
    yield Build(append.lower_kernel, 0, constants, typed({"i32": scalars}), (block,))
    constants = {"PAGE": 32, "BLOCK": block}
    yield Build(append.show_kernel, 0, constants, typed({"i32": "columns width"}), (block,))


def of_lists() -> Iterator[Build]:
    strides = "e_b e_t e_h p_b p_t p_h tokens heads blocks programs capacity"
    types = typed({INT64: "position", "i32": strides})
    sizes = {"TOKENS": lists.TOKENS, "HEADS": 16}
    for kernel, more in ((lists.count_kernel, {}), (lists.write_kernel, {"COUNTS": lists.COUNTS})):
        yield Build(
            kernel,
            0,
            sizes | more,
            types,
            (lists.TOKENS, 16),
            8,
            name=" of lists",
        )


def source_of(build: Build, ones: Collection[str] = (), *, aligned: bool = True) -> Any:
    """A kernel as Triton specialises it for a launch.

    Args:
        build: the kernel.
        ones: integer arguments that are 1, which Triton makes constants.
        aligned: whether pointers, strides and lengths are multiples of 16.
    """
    names = build.kernel.arg_names
    constants = build.constants | dict.fromkeys(ones, 1)
    signature = {
        name: "constexpr" if name in constants else build.types.get(name, "*i32") for name in names
    }
    divisible = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name][0] in ("*", "i") and aligned
    }
    return ASTSource(fn=build.kernel, signature=signature, constexprs=constants, attrs=divisible)


def integers(build: Build) -> list[str]:
    """Names of the integer arguments of a kernel."""
    free = [name for name in build.kernel.arg_names if name not in build.constants]
    return [name for name in free if build.types.get(name) == "i32"]


def binary_of(build: Build, chip: int, **specialised: Any) -> Any:
    """The compiled kernel."""
    options = {"num_warps": build.warps, "num_stages": build.stages}
    target = GPUTarget("cuda", chip, 32)
    return triton.compile(source_of(build, **specialised), target=target, options=options)


def multiplied(ptx: str, warps: int) -> tuple[str | None, int]:
    """The kind of tensor-core instructions, and the multiplications that a block does by them.

    Every warp (of `wgmma` every four warps) of a block runs each instruction once.
    """
    wgmma = re.findall(r"wgmma\.mma_async\S*\.m(\d+)n(\d+)k(\d+)", ptx)
    if wgmma:
        return "wgmma", warps // 4 * sum(math.prod(map(int, one)) for one in wgmma)
    if "tcgen05.mma." in ptx:
        return "tcgen05.mma", sum(map(tensor_memory_macs, tcgen05_descriptors(ptx)))
    sync = re.findall(r"mma\.sync\S*\.m(\d+)n(\d+)k(\d+)", ptx)
    return ("mma.sync" if sync else None), warps * sum(math.prod(map(int, one)) for one in sync)


def tcgen05_descriptors(ptx: str) -> list[int]:
    """The instruction descriptors of all tcgen05.mma, which are constants in registers."""
    held = {name: int(value) for name, value in re.findall(r"mov\.b32\s+(%r\d+), (-?\d+);", ptx)}
    operands = re.findall(r"tcgen05\.mma\.\S+ ([^;]*);", ptx)
    return [held[next(x for x in one.split(", ")[3:] if x.startswith("%r"))] for one in operands]


def tensor_memory_macs(descriptor: int) -> int:
    """M * N * 16 of a tcgen05.mma of 16-bit operands (PTX ISA, instruction descriptor)."""
    return (descriptor >> 24 & 31) * 16 * (descriptor >> 17 & 63) * 8 * 16


REGISTERS, THREADS, BLOCKS = 64 * 1024, 2048, 32
MULTIPROCESSOR_SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
"""What a multiprocessor has (CUDA C++ Programming Guide, compute capabilities)."""


def blocks_at_once(chip: int, registers: int, shared: int, warps: int) -> int:
    """How many blocks a multiprocessor holds; each takes 1 KiB of shared memory more."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = MULTIPROCESSOR_SHARED[chip] // (shared + 1024)
    return min(by_registers, by_shared, THREADS // (32 * warps), BLOCKS)


def compiled(build: Build, chip: int) -> dict[str, Any]:
    """What one kernel takes on one chip."""
    binary = binary_of(build, chip)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
        usage = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    spilled = sum(map(int, re.findall(r"LOCAL:(\d+)", usage))) + stack
    unit, macs = multiplied(binary.asm["ptx"], build.warps)
    return {
        "kernel": build.kernel.__name__.removesuffix("_kernel") + build.name,
        "head": build.width,
        "chip": f"sm_{chip}",
        "tile": build.tile,
        "warps": build.warps,
        "stages": build.stages,
        "registers": registers,
        "spilled": spilled,
        "shared": binary.metadata.shared,
        "blocks": blocks_at_once(chip, registers, binary.metadata.shared, build.warps),
        "needed": build.macs,
        "done": macs,
        "tensor_cores": unit,
    }


def checked_by_front_end(build: Build, ones: Collection[str]) -> None:
    """Makes Triton's first intermediate code of a kernel, where all errors of types show."""
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": build.warps, "num_stages": build.stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    source_of(build, ones).make_ir(target, options, functions, modules, context)


def specialised() -> list[dict[str, str]]:
    """Compiles every kernel with integer arguments that are 1, and without any alignment.

    Triton makes an argument of 1 a constant, which has no methods of a tensor. Each size alone, and
    all strides, go through the front end; all together, without alignment, to machine code.
    """
    results, done = [], set()
    for build in builds(90):
        if build.width > WIDTHS[0] or (build.kernel in done and not build.name):
            continue
        done.add(build.kernel)
        names = integers(build)
        strides = [name for name in names if re.fullmatch("[a-z]_[a-z]", name)]
        groups = {name: [name] for name in names if name not in strides}
        variants: list[tuple[str, Any]] = [
            (which, functools.partial(checked_by_front_end, build, ones))
            for which, ones in (groups | ({"strides": strides} if strides else {})).items()
        ]
        machine = functools.partial(binary_of, build, 90, ones=names, aligned=False)
        for which, compile_it in (*variants, ("all, to machine code", machine)):
            error = ""
            try:
                compile_it()
            except Exception as failure:  # whatever it is, it is what a launch would meet
                error = f"{type(failure).__name__}: {failure}"
            results.append({"kernel": named(build.kernel), "one": which, "error": error})
    return results


if __name__ == "__main__":
    if sys.argv[1:] == ["specialised"]:
        json.dump(specialised(), sys.stdout, indent=1)
    else:
        chips = [int(name.removeprefix("sm_")) for name in sys.argv[1:]] or CHIPS
        told = [compiled(build, chip) for chip in chips for build in builds(chip)]
        json.dump(told, sys.stdout, indent=1)
