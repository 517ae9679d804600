"""Prints what `benchmarks/gpu.py` should measure: estimates of every phase, and of every target.

    PYTHONPATH=.:ops python benchmarks/estimate.py [--write]

No GPU is needed. The tables are those of docs/estimates.md, into which --write writes them, and a
test compares them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import decode, estimates
from measuring.attend import KEEP_FRACTIONS, scattered
from measuring.chips import CHIPS, H100, Chip
from measuring.delta import OURS
from measuring.estimates import Estimate
from measuring.layer import CASES
from measuring.sizes import Sizes
from measuring.targets import DENSE, FORWARD, TRAINING, judge
from torch import Tensor

PAGE = Path(__file__).parents[1] / "docs" / "estimates.md"
SIZES = Sizes()
FRACTIONS = (1.0, *KEEP_FRACTIONS)
LISTS = ("positions", "span", "count", "write", "copy", "plan")
"""Kernels before the forward kernel."""
MODES = ("eager", "compiled")
Lifetimes = dict[tuple[int, float], Tensor]


def lifetimes() -> Lifetimes:
    """Lifetimes that store a fraction at random, by length and fraction; 1 stores everything."""
    torch.manual_seed(0)
    lengths = sorted({*SIZES.op_tokens, *SIZES.layer_tokens})
    # uniform numbers lie below 1, so 1 stores everything
    return {
        (tokens, fraction): scattered(fraction, tokens, SIZES.heads, "cpu")
        for tokens in lengths
        for fraction in FRACTIONS
    }


def measurements(chip: Chip, lived: Lifetimes) -> list[dict[str, Any]]:
    """The estimates as measurements, in the form in which `benchmarks/gpu.py` writes its times."""
    found = []

    def add(estimate: Estimate | None, **names: Any) -> None:
        if estimate is not None:
            found.append({**names, "seconds": estimate.seconds})

    size = SIZES.heads, SIZES.head_dim
    for tokens, which in itertools.product(SIZES.op_tokens, (FORWARD, TRAINING)):
        common = {"part": "attention", "tokens": tokens, "pass": which}
        learns = which == TRAINING
        for case in DENSE:
            whole = lived[tokens, 1.0]
            add(estimates.of_case(case, chip, whole, *size, learns=learns), **common, case=case)
        for fraction, case in itertools.product(KEEP_FRACTIONS, ("triton", "flex")):
            estimate = estimates.of_case(case, chip, lived[tokens, fraction], *size, learns=learns)
            add(estimate, **common, case=case, fraction=fraction)
    for tokens, case, mode in itertools.product(SIZES.layer_tokens, CASES, MODES):
        estimate = layer(chip, lived, tokens, case, mode)
        common = {"part": "layer", "tokens": tokens, "pass": TRAINING}
        add(estimate, **common, case=case, mode=mode)
    for context, fraction, mode in itertools.product(
        SIZES.contexts, decode.KEEP_FRACTIONS, decode.MODES
    ):
        estimate = decode.estimated(chip, context, fraction, mode, SIZES)
        common = {"part": "decode", "tokens": context, "case": "one layer"}
        add(estimate, **common, fraction=fraction, mode=mode)
    for tokens, which in itertools.product(SIZES.op_tokens, (FORWARD, TRAINING)):
        common = {"part": "delta", "tokens": tokens, "pass": which}
        for case in ("fla", *OURS):
            add(delta_rule(chip, tokens, case, which == TRAINING), **common, case=case)
    return found


def layer(chip: Chip, lived: Lifetimes, tokens: int, case: str, mode: str) -> Estimate:
    """One of the layers that `benchmarks/gpu.py` measures."""
    return estimates.layer(
        chip,
        tokens,
        SIZES.hidden,
        SIZES.heads,
        SIZES.head_dim,
        attends=CASES[case],
        evict_at=lived[tokens, 0.5 if case == "selected" else 1.0],
        mode=mode,
    )


def delta_rule(chip: Chip, tokens: int, case: str, learns: bool) -> Estimate:
    """One of the delta rules that `benchmarks/gpu.py` measures."""
    returned = {"residual": case == "residual", "score": case == "score"}
    return estimates.delta_rule(
        chip, tokens, SIZES.heads, SIZES.head_dim, learns=learns, **returned
    )


def rows(header: str, cells: list[list[str]]) -> str:
    """A table in Markdown; columns whose cells start with a number are set to the right."""
    names = header.split(", ")
    numbers = [
        all(not cell or cell[0].isdigit() for cell in column) for column in zip(*cells, strict=True)
    ]
    line = ["--:" if number else "---" for number in numbers]
    return "\n".join("| " + " | ".join(row) + " |" for row in (names, line, *cells))


def told(x: float) -> str:
    """A number with as many digits as a reader needs."""
    return f"{x:.3f}" if x < 10 else f"{x:,.1f}" if x < 1000 else f"{x:,.0f}"


def of_phases(where: str, found: list[tuple[list[str], Estimate]]) -> list[str]:
    """Two tables with the same rows: times, then counts. Both fit the width of a phone."""
    times, counts = [], []
    for place, one in found:
        name = [*place, one.name]
        waves = "" if one.waves is None else told(one.waves)
        sizes = [told(one.bytes / 1e6), told(one.operations / 1e9), waves]
        times.append([*name, told(1e3 * one.seconds), told(1e3 * one.floor), one.bound])
        counts.append([*name, str(one.launches), *sizes])
    return [
        rows(f"{where}, phase, estimate (ms), floor (ms), bound", times),
        rows(f"{where}, phase, launches, MB, 10⁹ operations, waves", counts),
    ]


def aims(lived: Lifetimes) -> str:
    """Every target, the ratio that follows from the estimates of each chip, and whether it is met."""
    judged = [judge(measurements(chip, lived)) for chip in CHIPS]
    found = []
    for same in zip(*judged, strict=True):
        one = same[0]
        where = " ".join(one[name] for name in ("pass", "mode") if name in one)
        ratios = [f"{x['ratio']:.3f}" + ("" if x["met"] else ", missed") for x in same]
        found.append([one["target"], where, f"{one['tokens']:,}", f"{one['bound']:g}", *ratios])
    return rows("target, pass, T, bound, " + ", ".join(chip.name for chip in CHIPS), found)


def phases(lived: Lifetimes) -> list[str]:
    """Attention at every length and fraction, on the first chip, beside FlashAttention."""
    found = []
    size = SIZES.heads, SIZES.head_dim
    for tokens, fraction in itertools.product(SIZES.op_tokens, FRACTIONS):
        where = [f"{tokens:,}", f"{fraction:g}"]
        one = estimates.attention(H100, lived[tokens, fraction], *size, learns=True)
        before = [part for part in one.parts if part.name in LISTS]
        floor = sum(part.floor for part in before)
        parts = [estimates.together("lists", before, floor), *one.parts[len(before) :]]
        found += [(where, part) for part in (*parts, one._replace(name="all"))]
    for tokens, learns in itertools.product(SIZES.op_tokens, (False, True)):
        one = estimates.dense(H100, "flash", tokens, *size, learns=learns)
        name = "flash attention, " + (TRAINING if learns else FORWARD)
        found.append(([f"{tokens:,}", "1"], one._replace(name=name)))
    return of_phases("T, kept", found)


def parts_of(make: Callable[[], Iterator[tuple[str, str, Estimate]]]) -> list[str]:
    """The parts of phases, and their sums."""
    found = []
    for what, kept, one in make():
        for part in (*one.parts, one._replace(name="all")):
            found.append(([what, kept], part))
    return of_phases("of, kept", found)


def others(lived: Lifetimes) -> Iterator[tuple[str, str, Estimate]]:
    """List building in detail, the delta rule, the layer and a decoded token, on the first chip."""
    tokens, fraction = SIZES.op_tokens[0], 0.25
    attention = estimates.attention(
        H100, lived[tokens, fraction], SIZES.heads, SIZES.head_dim, learns=True
    )
    before = [part for part in attention.parts if part.name in LISTS]
    lists = estimates.together("lists", before, sum(part.floor for part in before))
    yield f"lists, T = {tokens:,}", f"{fraction:g}", lists
    for learns, which in ((False, FORWARD), (True, TRAINING)):
        yield f"delta rule, {which}", "", delta_rule(H100, tokens, "score", learns)
    for case, kept in (("selected", "0.5"), ("everything", "1")):
        yield "layer, T = 8,192, eager", kept, layer(H100, lived, 8192, case, "eager")
    for share in (1.0, 0.1):
        context = SIZES.contexts[-1]
        one = estimates.decode(
            H100,
            share * context,
            SIZES.decode_batch,
            SIZES.hidden,
            SIZES.heads,
            SIZES.head_dim,
            graphed=True,
        )
        yield f"one token after {context:,}, graphed, one slab", f"{share:g}", one
    for share, mode in itertools.product((1.0, 0.1), decode.MODES):
        one = decode.estimated(H100, context, share, mode, SIZES)._replace(parts=())
        yield f"the same as the benchmark decodes it, {mode}", f"{share:g}", one


def tables() -> list[str]:
    """All tables of docs/estimates.md."""
    lived = lifetimes()
    return [aims(lived), *phases(lived), *parts_of(lambda: others(lived))]


def written(page: str, found: list[str]) -> str:
    """The page with its tables replaced, each by the one with the same header."""
    for table in found:
        header = table.split("\n", 1)[0]
        before, old = page.split(header, 1)
        # a table ends with the first empty line
        after = old.split("\n\n", 1)
        page = before + table + "\n" + "".join(f"\n{rest}" for rest in after[1:])
    return page


if __name__ == "__main__":
    made = tables()
    print("\n\n".join(made))
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
