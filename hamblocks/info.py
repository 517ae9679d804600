"""What is installed, and which implementation each op takes here: the text of `hamblocks info`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from hamblocks_ops import OPS
from hamblocks_ops.declare import OpWithChoice

PACKAGES = ("torch", "triton", "flash-linear-attention", "flash-attn", "transformers")
CASES = (
    ("training in bfloat16", torch.bfloat16, True, 64),
    ("training in float32", torch.float32, True, 64),
    ("decoding one token in bfloat16", torch.bfloat16, False, 1),
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
    """Every implementation's answer in some cases, at a head size of 64.

    Returns:
        For every case, for every op that has a choice and a call in this case: each implementation
        with its answer, in the order of `auto`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        f"{case}, on {device}": _answers(
            torch.zeros(1, tokens, 2, 64, dtype=dtype, device=device, requires_grad=learns)
        )
        for case, dtype, learns, tokens in CASES
    }


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
