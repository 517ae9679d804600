"""Keys that order the tokens of a batch in time, also across packed sequences and padding."""

from __future__ import annotations

from torch import Tensor

from hamblocks_ops.packing import sequence_of

FAR = 2**32
"""Distance between the keys of consecutive packed sequences; above the sum of two positions."""


def time_keys(
    position: Tensor, cu_seqlens: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    """Keys that ascend along the tokens, so that one search serves all packed sequences.

    Args:
        position: int32 `[B, T, H]`, ascending within a sequence; -1 for padding.
        cu_seqlens: borders of packed sequences.
        at: int32 `[B, T, H]`, times within the sequence of each token, such as lifetimes.

    Returns:
        int64 `[B, H, T]`, contiguous. Without `at` the keys of the tokens, where padding has the
        key of the token before it; else the keys of those times.
    """
    key = (position if at is None else at).mT.long()
    if cu_seqlens is not None:
        key = key + FAR * sequence_of(cu_seqlens, position.shape[1])
    return (key.cummax(2).values if at is None else key).contiguous()
