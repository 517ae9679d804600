"""Which ratio of two times each thing measured should reach, and whether it does."""

from __future__ import annotations

from typing import Any, NamedTuple

FORWARD, TRAINING = "forward", "forward and backward"


class Target(NamedTuple):
    """A bound on the ratio of the time of a row and that of another; `least`: on the inverse, from below."""

    text: str
    other: tuple[Any, ...]
    bound: float
    least: bool = False


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells the rows of a result apart."""
    return tuple(row.get(name) for name in ("part", "tokens", "pass", "mode", "case", "fraction"))


def targets(row: dict[str, Any]) -> list[Target]:
    """Those that are set for a row."""
    part, tokens, which, mode, case, fraction = key(row)

    def other(case: str, fraction: float | None = None) -> tuple[Any, ...]:
        return part, tokens, which, mode, case, fraction

    if part == "delta" and case in ("score", "residual"):
        bound = {"score": 1.05, "residual": 1.12}[case]
        return [Target(f"delta rule with {case}: at most {bound} x fla's", other("fla"), bound)]
    if part == "attention" and case == "triton":
        bound = round(fraction + {FORWARD: 0.08, TRAINING: 0.12}[which], 3)
        found = [
            Target(
                f"attention, {fraction} kept: at most {bound} x FlashAttention",
                other("flash"),
                bound,
            )
        ]
        if fraction == 0.5:
            text = f"attention, {fraction} kept: at least 1.6 x faster than flex"
            found.append(Target(text, other("flex", fraction), 1.6, least=True))
        return found
    if part == "layer" and case == "selected" and tokens >= 8192:
        return [
            Target("layer: faster than with attention over everything", other("everything"), 1.0)
        ]
    return []


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every target with its ratio and whether it is met; None, with the reason, where a time is missing."""
    by_key = {key(row): row for row in rows}
    judged = []
    for row in rows:
        for target in targets(row):
            where = {name: row[name] for name in ("part", "tokens", "pass", "mode") if name in row}
            verdict = {
                **where,
                "target": target.text,
                "bound": target.bound,
                "ratio": None,
                "met": None,
            }
            other = by_key.get(target.other, {"reason": "nothing to compare with was measured"})
            missing = [x for x in (row, other) if "seconds" not in x]
            if missing:
                verdict["reason"] = "; ".join(x.get("reason", "not measured") for x in missing)
            else:
                ratio = row["seconds"] / other["seconds"]
                ratio = 1 / ratio if target.least else ratio
                # "faster" is not "as fast"
                reached = ratio < 1 if target.bound == 1 else ratio <= target.bound
                verdict |= {
                    "ratio": ratio,
                    "met": ratio >= target.bound if target.least else reached,
                }
            judged.append(verdict)
    return judged
