"""What is installed, and which implementation each op takes here: the text of `hamblocks info`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from hamblocks_ops import (
    compact,
    explain,
    gated_delta_rule,
    paged_attention,
    selected_attention,
    surprise,
)
from hamblocks_ops.paged_attention import Pages

PACKAGES = ("torch", "triton", "flash-linear-attention", "flash-attn", "transformers")


def machine() -> dict[str, str]:
    """Versions of what matters here, and the GPU."""
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
    """For one call of every op: each implementation and its answer, in the order of `auto`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        f"{case}, on {device}": {
            op.__name__: dict(explain(op, *given, **more))
            for op, given, more in _calls(device, dtype, learns, tokens)
        }
        for case, dtype, learns, tokens in (
            ("training in bfloat16", torch.bfloat16, True, 64),
            ("training in float32", torch.float32, True, 64),
            ("decoding one token in bfloat16", torch.bfloat16, False, 1),
        )
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _calls(
    device: str, dtype: torch.dtype, learns: bool, tokens: int
) -> list[tuple[Any, tuple[Any, ...], Any]]:
    """One call of every op that has a choice, at a head size of 64."""
    x = torch.zeros(1, tokens, 2, 64, dtype=dtype, device=device, requires_grad=learns)
    beta = torch.zeros(1, tokens, 2, device=device)
    evict_at = torch.ones(1, tokens, 2, dtype=torch.int32, device=device)
    calls: list[tuple[Any, tuple[Any, ...], Any]] = [
        (gated_delta_rule, (x, x, x), {"beta": beta, "metric": "cosine", "output_residual": False}),
        (surprise, (x, x), {}),
        (compact, (evict_at,), {"capacity": tokens}),
        (selected_attention, (x, x, x, evict_at), {}),
    ]
    if not learns:
        page = x.detach().new_zeros(1, 16, 1, 64)
        position = torch.zeros(1, 16, dtype=torch.int32, device=device)
        table = torch.zeros(1, 2, 1, dtype=torch.int32, device=device)
        asked = torch.zeros(1, tokens, dtype=torch.int32, device=device)
        pages = Pages(page, page, position, position, None)
        calls.append((paged_attention, (x, [pages], table), {"query_position": asked}))
    return calls
