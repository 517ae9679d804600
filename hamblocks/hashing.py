"""Numbers that a hash draws: the same on every rank, on every device and after every restart."""

from __future__ import annotations

from torch import Tensor


def unit_hash(word: Tensor) -> Tensor:
    """A number in [0, 1) that depends on 32-bit words alone.

    Args:
        word: int64, of any shape; its lowest 32 bits count.

    Returns:
        float64, of the same shape, a multiple of 2^-32.
    """
    return mix(word & 0xFFFFFFFF).double() * 2.0**-32


def mix(word: Tensor) -> Tensor:
    """Mixes the bits of 32-bit words, held in int64: the finalizer of MurmurHash3, a bijection."""
    word = word ^ (word >> 16)
    word = (word * 0x85EBCA6B) & 0xFFFFFFFF
    word = word ^ (word >> 13)
    word = (word * 0xC2B2AE35) & 0xFFFFFFFF
    return word ^ (word >> 16)
