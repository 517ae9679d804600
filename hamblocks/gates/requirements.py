"""What gates that read the memory's error need from a trace."""

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
