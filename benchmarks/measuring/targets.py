"""Targets for ratios of two measured times, and whether they are met."""

from __future__ import annotations

from typing import Any, NamedTuple

FORWARD, TRAINING = "forward", "forward and backward"
MAX_DELTA = {"score": 1.05, "residual": 1.12}
"""Time of our delta rule relative to fla's function, by what it returns beside its output."""
DENSE = ("flash", "cudnn", "flash-3")
"""Cases of causal attention over everything, the fastest of which is what users would run."""
EXTRA_ATTENTION = {FORWARD: 0.08, TRAINING: 0.12}
"""Time allowed beyond the keep fraction, relative to FlashAttention over everything, by pass."""
MIN_FLEX_SPEEDUP = 1.6
"""How much faster than flex attention must be at half of the tokens."""
LAYER_MIN_TOKENS = 8192
"""Sequence length from which a layer that selects must be faster than one that does not."""

MIN_DECODE_SPEEDUP, DECODE_FRACTION, DECODE_MIN_TOKENS = 5, 0.1, 131072
"""How much faster a token must be decoded if this fraction is stored than if everything is, after
this many tokens."""


class Target(NamedTuple):
    """A bound on the ratio of one measured time to another.

    Attributes:
        text: the target in words.
        others: keys of measurements, with the fastest of which this one is compared.
        bound: the largest ratio, or with `least` the smallest speedup (the inverse ratio).
        least: whether `bound` is a speedup.
    """

    text: str
    others: list[tuple[Any, ...]]
    bound: float
    least: bool = False


def key(measured: dict[str, Any]) -> tuple[Any, ...]:
    """What distinguishes the measurements of a result."""
    names = ("part", "tokens", "pass", "mode", "case", "fraction", "variant")
    return tuple(measured.get(name) for name in names)


def targets(measured: dict[str, Any]) -> list[Target]:
    """The targets of a measurement."""
    part, tokens, which, mode, case, fraction, variant = key(measured)

    def other(case: str, fraction: float | None = None) -> list[tuple[Any, ...]]:
        return [(part, tokens, which, mode, case, fraction, variant)]

    if part == "delta" and case in MAX_DELTA:
        bound = MAX_DELTA[case]
        return [Target(f"delta rule with {case}: at most {bound} x fla's", other("fla"), bound)]
    if part == "attention" and case == "triton" and variant != "packed":
        kept = variant or f"{fraction} kept"
        text = f"attention, {kept}: faster than the fastest dense attention"
        fastest = Target(text, [one for dense in DENSE for one in other(dense)], 1.0)
        if variant is not None:
            return [fastest]
        bound = round(fraction + EXTRA_ATTENTION[which], 3)
        text = f"attention, {fraction} kept: at most {bound} x FlashAttention"
        found = [Target(text, other("flash"), bound), fastest]
        if fraction == 0.5:
            text = f"attention, {fraction} kept: at least {MIN_FLEX_SPEEDUP} x faster than flex"
            found.append(Target(text, other("flex", fraction), MIN_FLEX_SPEEDUP, least=True))
        return found
    if part == "layer" and case == "selected" and tokens >= LAYER_MIN_TOKENS:
        text = "layer: faster than with attention over everything"
        return [Target(text, other("everything"), 1.0)]
    if (part, fraction) == ("decode", DECODE_FRACTION) and tokens >= DECODE_MIN_TOKENS:
        text = f"decode, {fraction} kept: at least {MIN_DECODE_SPEEDUP} x faster than all"
        return [Target(text, other(case, 1.0), MIN_DECODE_SPEEDUP, least=True)]
    return []


def judge(measurements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every target, its ratio and whether it is met; None and the reason if a time is missing."""
    by_key = {key(measured): measured for measured in measurements}
    return [
        verdict(measured, target, by_key)
        for measured in measurements
        for target in targets(measured)
    ]


def verdict(
    measured: dict[str, Any], target: Target, by_key: dict[tuple[Any, ...], dict[str, Any]]
) -> dict[str, Any]:
    """One target of one measurement, with its ratio and whether it is met."""
    where = {
        name: measured[name] for name in ("part", "tokens", "pass", "mode") if name in measured
    }
    found = {**where, "target": target.text, "bound": target.bound, "ratio": None, "met": None}
    none = {"reason": "nothing to compare with was measured"}
    others = [by_key[one] for one in target.others if one in by_key]
    other = min(others, key=lambda one: one.get("seconds", float("inf")), default=none)
    missing = [one for one in (measured, other) if "seconds" not in one]
    if missing:
        return found | {"reason": "; ".join(one.get("reason", "not measured") for one in missing)}
    ratio = measured["seconds"] / other["seconds"]
    found["against"] = other["case"]
    if target.least:
        return found | {"ratio": 1 / ratio, "met": 1 / ratio >= target.bound}
    # a bound of 1 means "faster", and as fast is not faster
    return found | {
        "ratio": ratio,
        "met": ratio < 1 if target.bound == 1 else ratio <= target.bound,
    }
