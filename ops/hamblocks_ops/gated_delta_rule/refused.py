"""Which calls fla's kernels and that of Triton cannot run, and why.

Neither fla nor Triton is imported for the answer.
"""

from __future__ import annotations

import functools
import importlib.metadata

import torch

from hamblocks_ops.dispatch import installed, interpreted, interpreting, without_triton
from hamblocks_ops.gated_delta_rule.call import DeltaRuleCall, learns
from hamblocks_ops.surprise import MAX_COLUMNS

SUPPORTED = "0.6.0"
"""The release whose inner functions `fla.py` calls: not public, they move between releases."""

STEPS_MAX_TOKENS = 16
"""Most tokens for which one kernel, token by token, takes less time than chunks do. A packed batch of
one token for each sequence may have more."""

STEPS_MAX_KEY_DIM = 1024
"""Largest K of the kernel that runs token by token."""

MAX_KEY_DIM = 256
"""Largest K that fla's kernels hold."""

MAX_STREAMS = 65535
"""Most streams of the kernels for chunks, which have them in the second dimension of their grids."""


def refused_steps(call: DeltaRuleCall) -> str | None:
    """Why the kernel that runs token by token cannot run this call, or None when it can."""
    reason = without_triton(call.q)
    if reason is None and learns(call):
        reason = "it has no gradient"
    key_dim = call.k.shape[3]
    if reason is None and not 1 <= key_dim <= STEPS_MAX_KEY_DIM:
        reason = f"a tile holds keys of 1 to {STEPS_MAX_KEY_DIM} entries, not {key_dim}"
    if reason is None and call.metric is not None and call.v.shape[3] > MAX_COLUMNS:
        reason = f"a tile holds vectors of up to {MAX_COLUMNS} entries, not {call.v.shape[3]}"
    return reason


def passed_over_steps(call: DeltaRuleCall) -> str | None:
    """Why "auto" passes over the kernel that runs token by token."""
    tokens, most = call.v.shape[1], max(STEPS_MAX_TOKENS, call.initial_state.shape[0])
    if tokens > most:
        return f"token by token it is slower than chunks for more than {most} tokens"
    return interpreted(call)


def refused(call: DeltaRuleCall) -> str | None:
    """Why fla cannot run this call, or None when it can."""
    # the device first: what follows compares sizes, which traced code would be specialised by
    return (
        not_supported()
        or without_triton(call.q)
        or _by_dtype(call)
        or _by_size(call)
        or (wrong_on_hopper(call.q.device) if learns(call) else None)
    )


def _by_dtype(call: DeltaRuleCall) -> str | None:
    if call.v.dtype == torch.float64:
        return "it computes in float32 at the most"
    if call.v.dtype == torch.float32:
        return (
            "flash-linear-attention computes products of float32 in TF32 and decays as differences "
            "of sums: not float32's precision"
        )
    if call.v.dtype == torch.float16 and (call.output_residual or call.metric is not None):
        return "it keeps beta * residual in float16, which cannot hold it for a small beta"
    return None


def _by_size(call: DeltaRuleCall) -> str | None:
    key_dim, value_dim = call.k.shape[3], call.v.shape[3]
    if not 1 <= key_dim <= MAX_KEY_DIM:
        return f"its kernels hold keys of 1 to {MAX_KEY_DIM} entries, not {key_dim}"
    if not interpreting() and (key_dim % 2 or value_dim % 2):
        sizes = f"{key_dim}, {value_dim}"
        return f"Triton miscompiles its kernels for an odd size of keys or values: {sizes}"
    streams = call.v.shape[0] * call.v.shape[2]
    if streams > MAX_STREAMS:
        return f"its grids hold up to {MAX_STREAMS} streams (batch rows * heads), not {streams}"
    if call.metric is not None and value_dim > MAX_COLUMNS:
        return f"a tile holds vectors of up to {MAX_COLUMNS} entries, not {value_dim}"
    return None


def not_supported() -> str | None:
    """Why the fla that is installed, if any, cannot be used."""
    if not installed("fla"):
        return "flash-linear-attention is not installed (pip install hamblocks[gpu])"
    found = _release()
    if found != SUPPORTED:
        return (
            f"flash-linear-attention {found} is installed, {SUPPORTED} is supported "
            "(pip install hamblocks[gpu])"
        )
    return None


@functools.cache
def _release() -> str:
    # cached, because decoding asks at every token and the answer reads files
    for package in ("fla-core", "flash-linear-attention"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of an unknown release"


def wrong_on_hopper(device: torch.device) -> str | None:
    """Why fla's backward pass cannot run on a GPU with this Triton, in fla's words."""
    if interpreting() or installed("tilelang") or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    parts = importlib.metadata.version("triton").split("+")[0].split(".")
    if not (3, 4, 0) <= tuple(int(part) for part in parts[:3] if part.isdigit()) < (3, 7, 1):
        return None
    return (
        "Triton >= 3.4.0 and < 3.7.1 on Hopper GPUs produces incorrect results for gated "
        "chunk_bwd_dqkwg (see #640 of flash-linear-attention). Please upgrade Triton to >= 3.7.1 "
        "or install tilelang: `pip install tilelang`"
    )


# torch.compile takes the answer as a constant; see the same loop in dispatch
for _constant in (not_supported, wrong_on_hopper):
    setattr(_constant, "_dynamo_marked_constant", True)  # noqa: B010
