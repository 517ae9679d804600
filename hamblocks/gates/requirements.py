"""What gates need from a trace: the memory's error, or what attention stores."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hamblocks.protocols import MemoryTrace
from hamblocks_ops.arguments import wrong
from hamblocks_ops.precision import wide


class Write(NamedTuple):
    """What a delta rule wrote: `beta_t k_t r_t^T`. float32 or wider, without gradients.

    Attributes:
        k: `[B, T, H, D]`, keys.
        beta: `[B, T, H]`, write strength.
        residual: `[B, T, H, D]`, value minus prediction.
    """

    k: Tensor
    beta: Tensor
    residual: Tensor


class StoredToken(NamedTuple):
    """What attention stores of a token. float32 or wider, without gradients.

    Attributes:
        k: `[B, T, Hkv, D]`.
        v: `[B, T, Hkv, D]`.
    """

    k: Tensor
    v: Tensor


def check_memory(gate: object, trace: MemoryTrace) -> None:
    """Checks that a trace comes from a memory.

    Raises:
        ValueError: the layer has no memory.
    """
    if trace.beta is None:
        raise wrong(
            "gate",
            "a gate that reads no prediction, for a layer without a memory "
            "(such as RandomGate, PeriodicGate or LearnedRouter)",
            f"{gate!r}, which needs a memory",
        )


def write_of(gate: object, trace: MemoryTrace) -> Write:
    """The write of every token.

    Raises:
        ValueError: the layer has no memory, or the trace has no residual.
    """
    check_memory(gate, trace)
    beta, residual = trace.beta, trace.residual
    if beta is None or residual is None:
        expected = f"a residual for {gate!r} (a gate with metric=None gets one)"
        raise wrong("trace", expected, "none")
    k, beta, residual = trace.k.detach(), beta.detach(), residual.detach()
    return Write(k.to(wide(k)), beta.to(wide(beta)), residual.to(wide(residual)))


def stored_of(gate: object, trace: MemoryTrace) -> StoredToken:
    """The keys and values that attention stores.

    Raises:
        ValueError: the trace has none.
    """
    k, v = trace.stored_k, trace.stored_v
    if k is None or v is None:
        raise wrong("trace", f"stored_k and stored_v for {gate!r} (a layer fills them)", "none")
    k, v = k.detach(), v.detach()
    return StoredToken(k.to(wide(k)), v.to(wide(v)))
