"""The checks in pytest suites of users: tests of a part, expected failures, options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from users_parts import GATES

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.slow  # each runs a pytest of its own

PART = GATES + "from hamblocks.testing import parametrize_with_checks\n"


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.delenv("CI", raising=False)
    pytester.makeini(
        "[pytest]\naddopts = --strict-markers -p no:cacheprovider -m 'not hamblocks_slow'\n"
    )
    return pytester


def test_three_lines_check_a_part(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        PART + "\n@parametrize_with_checks(gates=[Written()])\ndef test_mine(check):\n    check()\n"
    )
    result = suite.runpytest("-v")
    counts = result.parseoutcomes()
    assert set(counts) == {"passed", "deselected"}
    assert counts["passed"] > 10
    result.stdout.fnmatch_lines(["*::test_mine[[]Written(...)-check_gate_is_causal] PASSED*"])


def test_the_three_lines_of_the_guide(suite: pytest.Pytester) -> None:
    guide = (Path(__file__).parents[2] / "docs/guide/testing.md").read_text(encoding="utf-8")
    part, test = re.findall(r"^```python\n(.*?)^```$", guide, re.M | re.S)[:2]
    code = [
        [line for line in block.splitlines() if line and "import" not in line]
        for block in (part, test)
    ]
    assert len(code[0]) <= 8
    assert len(code[1]) == 3
    suite.makepyfile(part + test)
    counts = suite.runpytest().parseoutcomes()
    assert set(counts) == {"passed", "deselected"}


def test_a_failure_names_the_check_and_shows_one_line_that_repeats_it(
    suite: pytest.Pytester,
) -> None:
    suite.makepyfile(
        PART + "\n@parametrize_with_checks(gates=[Peeks()])\ndef test_mine(check):\n    check()\n"
    )
    result = suite.runpytest()
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "*CheckFailed: check_gate_is_causal: Peeks(...)",
            "*results before position * changed with the inputs from it on: score*",
            "*law: Changing inputs from position t on changes no result before t.",
            "*again: check_gate_is_causal(Peeks(...), PartInputs(*",
        ]
    )


def test_a_failure_shows_the_line_of_the_test_and_no_code_of_the_checks(
    suite: pytest.Pytester,
) -> None:
    suite.makepyfile(
        PART + "from hamblocks.testing import check_gate, check_gate_is_causal\n"
        "@parametrize_with_checks(gates=[Peeks()])\n"
        "def test_mine(check):\n    check()\n"
        "def test_all():\n    check_gate(Peeks())\n"
        "def test_one():\n    check_gate_is_causal(Peeks())\n"
    )
    result = suite.runpytest("--tb=long")
    assert result.parseoutcomes()["failed"] == 3
    shown = result.stdout.str()
    for line in ("check()", "check_gate(Peeks())", "check_gate_is_causal(Peeks())"):
        result.stdout.re_match_lines(
            [f">       {re.escape(line)}", "E .*CheckFailed: check_gate_is"], consecutive=True
        )
    for file in ("hamblocks/testing", "check.py:", "suite.py:", "laws.py:", "/hypothesis/"):
        assert file not in shown
    assert "direct cause" not in shown
    assert "During handling" not in shown


RAISES = """
class Raises:
    def __call__(self, x, trace):
        return self.score(x)
"""


def test_an_exception_of_a_part_is_shown_with_its_place(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        PART + RAISES + "from hamblocks.testing import check_gate\n"
        "def test_all():\n    check_gate(Raises())\n"
    )
    result = suite.runpytest()
    result.stdout.fnmatch_lines(
        [
            "*CheckFailed: check_gate_can_be_called: Raises(...)",
            "*AttributeError: *score* (*test_an_exception*.py:14, in __call__)",
        ]
    )


@pytest.mark.parametrize(
    ("make", "failing"),
    [
        ("Raises", "check_gate_can_be_called"),
        ("Peeks", "check_gate_is_causal"),
        ("Dithers", "check_gate_same_call_same_bits"),
    ],
)
def test_a_part_that_fails_for_one_reason_fails_one_test(
    suite: pytest.Pytester, make: str, failing: str
) -> None:
    suite.makepyfile(
        PART + RAISES + "import torch\n"
        "class Dithers:\n"
        "    def __call__(self, x, trace):\n"
        "        return hb.GateOutput(torch.rand(*x.shape[:2], 1))\n"
        f"@parametrize_with_checks(gates=[{make}()])\ndef test_mine(check):\n    check()\n"
    )
    result = suite.runpytest("-rsf")
    counts = result.parseoutcomes()
    assert result.ret == 1
    assert counts["failed"] == 1
    assert counts["skipped"] >= 4
    result.stdout.fnmatch_lines(
        [f"SKIPPED*: needs {failing}, which fails", f"FAILED *{make}(...)-{failing}*"]
    )


def test_a_check_alone_fails_whatever_it_needs(suite: pytest.Pytester) -> None:
    """Else a run that selects it alone would be green."""
    suite.makepyfile(
        PART + "\n@parametrize_with_checks(gates=[Peeks()])\ndef test_mine(check):\n    check()\n"
    )
    result = suite.runpytest("-k", "split")
    counts = result.parseoutcomes()
    assert (counts["failed"], "skipped" in counts) == (1, False)


def test_checks_that_run_before_what_they_need_are_skipped_too(suite: pytest.Pytester) -> None:
    """As under pytest-xdist, where another process may run the check that is needed."""
    suite.makepyfile(
        PART + "\n@parametrize_with_checks(gates=[Peeks()])\ndef test_mine(check):\n    check()\n"
    )
    suite.makeconftest("def pytest_collection_modifyitems(items):\n    items.reverse()\n")
    counts = suite.runpytest().parseoutcomes()
    assert counts["failed"] == 1
    assert counts["skipped"] >= 4


EXPECTED = """
KNOWN = {name: "looks one token ahead" for name in (
    "check_gate_is_causal", "check_gate_packed_is_one_by_one",
    "check_gate_any_split_is_one_pass", "check_gate_works_in_a_layer",
)}
"""


def test_expected_failures_fail_as_expected(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        PART + EXPECTED + "\n@parametrize_with_checks(gates=[Peeks()], expected_failures=KNOWN)\n"
        "def test_mine(check):\n    check()\n"
    )
    counts = suite.runpytest().parseoutcomes()
    assert counts["xfailed"] == 4
    assert "failed" not in counts


def test_an_expected_failure_that_passes_is_an_error(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        PART + "\n@parametrize_with_checks("
        "gates=[Written()], expected_failures={'check_gate_is_causal': 'why'})\n"
        "def test_mine(check):\n    check()\n"
    )
    result = suite.runpytest()
    assert result.parseoutcomes()["failed"] == 1
    result.stdout.fnmatch_lines(["*XPASS(strict)*why*"])


def test_an_expected_failure_with_another_error_is_an_error(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        PART + EXPECTED + "\n@parametrize_with_checks(gates=[Peeks()], expected_failures=KNOWN)\n"
        "def test_mine(check):\n    raise RuntimeError('something else')\n"
    )
    counts = suite.runpytest().parseoutcomes()
    assert "xfailed" not in counts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "gates=[Written()], expected_failures={'check_gate_is_casual': 'why'}",
            "check_gate_is_casual",
        ),
        (
            "gates=[Written()], expected_failures={'check_gate_is_built_once': 'why'}",
            "it has no build",
        ),
        (
            "gates=[Written()], expected_failures={'check_layer_is_causal': 'why'}",
            "check_layer_is_causal",
        ),
        ("", "parts: expected at least one"),
        ("layers=[Written()]", "dims: expected the sizes of a layer"),
    ],
)
def test_bad_arguments_are_told_at_collection(
    suite: pytest.Pytester, arguments: str, message: str
) -> None:
    suite.makepyfile(
        PART + f"\n@parametrize_with_checks({arguments})\ndef test_mine(check):\n    check()\n"
    )
    result = suite.runpytest()
    assert result.ret == 2
    result.stdout.fnmatch_lines([f"*ValueError*{message}*"])


def test_expected_failures_may_depend_on_the_part(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        PART
        + EXPECTED
        + "\n@parametrize_with_checks(gates={'peeks': Peeks(), 'written': Written()},\n"
        "    expected_failures=lambda part: KNOWN if isinstance(part, Peeks) else {})\n"
        "def test_mine(check):\n    check()\n"
    )
    result = suite.runpytest("-v")
    counts = result.parseoutcomes()
    assert counts["xfailed"] == 4
    assert "failed" not in counts
    result.stdout.fnmatch_lines(["*test_mine[[]written-check_gate_is_causal] PASSED*"])


OPS = """
import pytest
from hamblocks.ops import selected_attention
from hamblocks.testing import parametrize_with_checks

@parametrize_with_checks(ops=[selected_attention])
def test_ops(check):
    pass

@pytest.mark.hamblocks_op("selected_attention")
def test_mine(hamblocks_impl):
    assert hamblocks_impl in ("gather", "reference")
"""


def test_a_suite_runs_over_chosen_implementations(suite: pytest.Pytester) -> None:
    suite.makepyfile(OPS)
    every = suite.runpytest("-v")
    every.stdout.fnmatch_lines(["*test_mine[[]gather]*", "*test_mine[[]reference]*"])
    for choice in ("gather", "selected_attention=gather"):
        chosen = suite.runpytest("-v", "--hamblocks-impl", choice)
        assert chosen.ret == 0
        assert 0 < chosen.parseoutcomes()["passed"] < every.parseoutcomes()["passed"]
        chosen.stdout.fnmatch_lines(["*impl='gather'*"])
        chosen.stdout.no_fnmatch_line("*impl='reference'*")
        chosen.stdout.no_fnmatch_line("*test_mine[[]reference]*")
    other = suite.runpytest("--hamblocks-impl", "gated_delta_rule=chunked")
    assert other.parseoutcomes() == every.parseoutcomes()


def test_an_implementation_that_does_not_exist_is_an_error(suite: pytest.Pytester) -> None:
    suite.makepyfile(OPS)
    result = suite.runpytest("--hamblocks-impl", "quick")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*--hamblocks-impl*quick*"])


PROFILES = """
import hypothesis
from hypothesis import given, strategies as st
from hamblocks.testing import settings

def test_told():
    name, seed = settings.profile_of().name, settings.chosen().seed
    print("told", name, seed, hypothesis.settings().max_examples)
"""


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "told dev None 100"),
        (["--hamblocks-profile", "nightly"], "told nightly None 500"),
        (["--hamblocks-profile", "ci", "--hamblocks-seed", "3"], "told ci 3 20"),
        (["--hypothesis-profile", "hamblocks-dev"], "told dev None 10"),
    ],
)
def test_profiles_and_seeds(suite: pytest.Pytester, options: list[str], told: str) -> None:
    suite.makepyfile(PROFILES)
    suite.runpytest_subprocess("-s", *options).stdout.fnmatch_lines([f"*{told}*"])


def test_poisoned_memory(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        "import torch\n"
        "def test_poison(hamblocks_poisoned_memory):\n"
        "    assert torch.empty(3).isnan().all()\n"
        "    assert torch.empty(3, dtype=torch.int32).eq(2**31 - 1).all()\n"
        "def test_after():\n"
        "    assert not torch.are_deterministic_algorithms_enabled()\n"
    )
    assert suite.runpytest_subprocess().parseoutcomes() == {"passed": 2}


def test_hamblocks_impl_needs_its_mark(suite: pytest.Pytester) -> None:
    suite.makepyfile("def test_mine(hamblocks_impl):\n    pass\n")
    suite.runpytest().stdout.fnmatch_lines(
        ["*hamblocks_impl needs @pytest.mark.hamblocks_op(name)*"]
    )
