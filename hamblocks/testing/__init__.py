"""Property-based tests for parts: the checks that the parts of hamblocks pass, for yours too.

From Python, raising at the first failure:

    from hamblocks.testing import check_gate

    check_gate(MyGate())

In a pytest suite, one test per check:

    from hamblocks.testing import parametrize_with_checks

    @parametrize_with_checks(gates=[MyGate()], selectors=[TopK(8)])
    def test_parts(check):
        check()

From a shell: `hamblocks check gate package.module:MyGate`.

It needs `pip install 'hamblocks[test]'`. Every check can be imported by its name. It is called with
a part, or with a part and one case, as the message of a failure does.
"""

# ruff: noqa: E402 - without its extra, this package must fail before it imports the rest of itself
from hamblocks.extras import require

require("test", "hamblocks.testing", "hypothesis", "pytest")

from hamblocks.protocols import LayerDims
from hamblocks.testing.budget import Problem, assert_close, assert_close_to_reference, assert_same
from hamblocks.testing.check import Check, CheckFailed, NotApplicableError, Options, Result
from hamblocks.testing.inputs.attention import AttentionInputs, EvictAt, attention_inputs, evict_at
from hamblocks.testing.inputs.delta_rule import DeltaRuleInputs, delta_rule_inputs
from hamblocks.testing.inputs.draw import Draw, dtypes, layouts, lengths, ragged_lengths, seeds
from hamblocks.testing.inputs.paged import PagedInputs, paged_inputs
from hamblocks.testing.inputs.parts import PartInputs, packed_part_inputs, part_inputs
from hamblocks.testing.inputs.rows import RowInputs, row_inputs
from hamblocks.testing.inputs.scores import ScorePieces, Scores, score_pieces, scores
from hamblocks.testing.ops import OpImplementation
from hamblocks.testing.parametrize import parametrize_with_checks
from hamblocks.testing.settings import PROFILES, Profile
from hamblocks.testing.suite import (
    BY_NAME,
    CHECKS,
    check_attention,
    check_combiner,
    check_controller,
    check_gate,
    check_layer,
    check_memory,
    check_op,
    check_query_gate,
    check_selector,
    run_checks,
)
from hamblocks.testing.uninitialised import FilledMemory

__all__ = [
    "CHECKS",
    "PROFILES",
    "AttentionInputs",
    "Check",
    "CheckFailed",
    "DeltaRuleInputs",
    "Draw",
    "EvictAt",
    "FilledMemory",
    "LayerDims",
    "NotApplicableError",
    "OpImplementation",
    "Options",
    "PagedInputs",
    "PartInputs",
    "Problem",
    "Profile",
    "Result",
    "RowInputs",
    "ScorePieces",
    "Scores",
    "assert_close",
    "assert_close_to_reference",
    "assert_same",
    "attention_inputs",
    "check_attention",
    "check_combiner",
    "check_controller",
    "check_gate",
    "check_layer",
    "check_memory",
    "check_op",
    "check_query_gate",
    "check_selector",
    "delta_rule_inputs",
    "dtypes",
    "evict_at",
    "layouts",
    "lengths",
    "packed_part_inputs",
    "paged_inputs",
    "parametrize_with_checks",
    "part_inputs",
    "ragged_lengths",
    "row_inputs",
    "run_checks",
    "score_pieces",
    "scores",
    "seeds",
]


def __getattr__(name: str) -> Check:
    """Every check by its name."""
    if name in BY_NAME:
        return BY_NAME[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *BY_NAME})
