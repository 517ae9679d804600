"""The order of checks: which ones must pass before another one says something new.

A gate that raises on every call would fail each of its checks for that one reason. So each check
names the checks that it needs. When one of those fails, it is not run, and its outcome says why.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hamblocks.testing.check import Check

STAGES = (
    ("names_a_known_metric",),
    ("can_be_called",),
    ("has_its_shapes", "tau_is_a_number"),
    ("float64_is_the_reference",),
    ("float32_is_the_reference",),
    ("nothing_given_changes",),  # a part that changes its inputs also fails to repeat itself,
    ("same_call_same_bits",),  # and one that does not repeat itself fails every comparison
    ("strides_do_not_matter",),  # most comparisons run slices of the same tensors
)
"""Laws, by the ends of their names: every law needs those of all earlier stages."""

NEEDS = {
    "gradients_are_causal": ("is_causal",),
    "gradients_are_right": ("gradients_are_causal",),
    # the last tokens of a piece, or of a packed sequence, would see what comes after it
    "packed_is_one_by_one": ("is_causal", "gradients_are_causal"),
    "any_split_is_one_pass": (
        "is_causal",
        "only_lowers",
        "ledger_does_not_grow",
        "padding_is_ignored",
    ),
    # a part without a state fails in pieces for what it also fails for in a packed batch: it looks
    # at its neighbours, or at the place of a token in the tensor
    "gate_any_split_is_one_pass": ("packed_is_one_by_one",),
    "query_gate_any_split_is_one_pass": ("packed_is_one_by_one",),
    "combiner_any_split_is_one_pass": ("packed_is_one_by_one",),
    "padding_is_ignored": ("is_causal",),
    "threshold_is_reached_by_equal_scores": ("is_causal", "raising_tau_never_keeps_more"),
    "score_is_the_surprise_of_the_residual": ("predicts_before_it_writes",),
    "fresh_state_is_zero": ("packed_is_one_by_one",),
    "packed_states_are_one_by_one": ("packed_is_one_by_one", "any_split_is_one_pass"),
    "packed_pieces_are_one_pass": ("packed_is_one_by_one", "any_split_is_one_pass"),
    "state_has_sequences_first": ("any_split_is_one_pass",),
    "stores_what_it_decided": ("any_split_is_one_pass",),
    "forks_go_on_alone": ("any_split_is_one_pass",),
    "low_precision_streams": ("is_always_finite",),
    "works_in_a_layer": ("any_split_is_one_pass",),
}
"""What else a law needs, for every kind or, with the kind in front, for one kind."""


def needs(check: Check) -> tuple[str, ...]:
    """Names of the checks that this one needs, in the order in which they run.

    Those that its needs need are among them. A name of a check that its kind does not have stands
    for nothing.
    """
    laws: list[str] = []
    _collect(check.kind, check.law, laws)
    return tuple(f"check_{check.kind}_{law}" for law in laws)


def _collect(kind: str, law: str, found: list[str]) -> None:
    stage = next((i for i, laws in enumerate(STAGES) if law in laws), len(STAGES))
    earlier = [needed for laws in STAGES[:stage] for needed in laws]
    for needed in (*earlier, *NEEDS.get(law, ()), *NEEDS.get(f"{kind}_{law}", ())):
        if needed not in found:
            _collect(kind, needed, found)
            found.append(needed)


def ordered(checks: Sequence[Check]) -> list[Check]:
    """The checks, each behind those that it needs, else in the order given."""
    by_name = {check.name: check for check in checks}
    found: dict[str, Check] = {}
    for check in checks:
        for name in (*needs(check), check.name):
            if name in by_name:
                found[name] = by_name[name]
    return list(found.values())


def blocker(check: Check, failed: Collection[str]) -> str | None:
    """The first check that this one needs and that failed; None: it can be run."""
    return next((name for name in needs(check) if name in failed), None)


def not_run(name: str) -> str:
    """Why a check was not run, for tables and skips."""
    return f"needs {name}, which fails"
