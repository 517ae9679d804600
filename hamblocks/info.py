"""What is installed, and which implementation each op takes here: the text of `hamblocks info`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

from hamblocks_ops import OPS
from hamblocks_ops.declare import OpWithChoice

PACKAGES = ("torch", "triton", "flash-linear-attention", "flash-attn", "transformers")
CASES = (
    ("training in bfloat16", torch.bfloat16, True, 64),
    ("training in float32", torch.float32, True, 64),
    ("decoding in bfloat16", torch.bfloat16, False, 1),
)
"""What is asked for, the dtype, whether there is a gradient, and the number of tokens."""


def machine() -> dict[str, str]:
    """Versions of Python, hamblocks and the packages it may use, and the GPU."""
    found = {"hamblocks": _version("hamblocks"), "python": platform.python_version()}
    found |= {package: _version(package) for package in PACKAGES}
    found["torch"] = torch.__version__
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(0).total_memory
        found["GPU"] = (
            f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {memory / 2**30:.0f} GiB"
        )
    else:
        found["GPU"] = "none"
    return found


def choices() -> dict[str, dict[str, dict[str, str]]]:
    """Every implementation's answer in some cases, at a head size of 64, on the GPU if there is one.

    Returns:
        For every case, for every op that has a choice and a call in this case: each implementation
        with its answer, in the order of `auto`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        case: _answers(
            torch.zeros(1, tokens, 2, 64, dtype=dtype, device=device, requires_grad=learns)
        )
        for case, dtype, learns, tokens in CASES
    }


class Answer(NamedTuple):
    """What an implementation answers in one or more cases.

    Attributes:
        op: name of the op.
        impl: name of the implementation.
        text: "yes", or the reason why not.
        taken: whether `auto` takes it.
        cases: the cases; empty for all in which the op has a call.
    """

    op: str
    impl: str
    text: str
    taken: bool
    cases: list[str]


def summary() -> list[Answer]:
    """`choices`, with equal answers of an implementation told once."""
    ops: dict[str, dict[str, dict[str, str]]] = {}
    for case, answered in choices().items():
        for op, answers in answered.items():
            ops.setdefault(op, {})[case] = answers
    found = []
    for op, cases in ops.items():
        chosen = {
            case: next((impl for impl, answer in answers.items() if answer == "yes"), None)
            for case, answers in cases.items()
        }
        for impl in next(iter(cases.values())):
            told: dict[tuple[str, bool], list[str]] = {}
            for case, answers in cases.items():
                told.setdefault((answers[impl], chosen[case] == impl), []).append(case)
            for (text, taken), where in told.items():
                shown = [] if len(told) == 1 else where
                found.append(Answer(op, impl, text, taken, shown))
    return found


def _answers(x: torch.Tensor) -> dict[str, dict[str, str]]:
    answers = {}
    for op in OPS:
        if isinstance(op, OpWithChoice) and (call := op.example(x)) is not None:
            given, named = call
            answers[op.__name__] = dict(op.explain(*given, **named))
    return answers


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
