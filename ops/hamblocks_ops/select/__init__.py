"""Scores to lifetimes: until when attention may read each token, one int32 `evict_at`."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from hamblocks_ops.arguments import (
    check_cu_seqlens,
    check_floating,
    check_integer,
    check_tensor,
    values_are_checked,
    wrong,
)
from hamblocks_ops.declare import Hints, op
from hamblocks_ops.packing import NEVER, int32, no_padding, positions, sequence_of, unpadded
from hamblocks_ops.precision import wide
from hamblocks_ops.select.topk import topk

__all__ = ["NEVER", "select_first", "select_threshold", "select_topk", "select_window"]

BY_TOKEN = ("score", "position")


@op(Hints(by_token=BY_TOKEN, threshold="tau"))
def select_threshold(
    score: Tensor,
    tau: float | Tensor,
    *,
    position: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Stores a token for good iff score >= tau, and nothing when tau = +inf.

    Args:
        score: `[B, T, H]`, floating; NaN is never stored.
        tau: a number, or a floating tensor `[]` or `[H]`; compared in the wider of float32 and
            score's dtype.
        position: int `[B, T]` or `[B, T, H]`, where the tokens stand within their sequences; -1
            marks padding, which gets evict_at = -1. None: counted from 0.
        cu_seqlens: int32 `[N+1]`, borders of packed sequences.

    Returns:
        evict_at, int32 `[B, T, H]`: NEVER or the token's own position.

    Raises:
        ValueError: a bad argument; NaN is a bad `tau`.
    """
    where = _by_token(score, position, cu_seqlens)
    stored = reaches(score, tau)
    if not no_padding(where):
        stored = stored & (where >= 0)
    return where.masked_fill(stored, NEVER)


@select_threshold.check
def _check_threshold(
    score: Tensor,
    tau: float | Tensor,
    *,
    position: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    _check_score(score, position, cu_seqlens)
    if not isinstance(tau, Tensor):
        if not isinstance(tau, numbers.Real) or tau != tau:
            raise wrong("tau", "a number that is not NaN", tau)
        return
    check_floating("tau", tau)
    if tau.dim() > 1 or (tau.dim() == 1 and tau.shape[0] != 1 and tau.shape[0] != score.shape[2]):
        raise wrong("tau", f"shape [] or [H] = [{score.shape[2]}]", tau)
    if tau.device != score.device:
        raise wrong("tau", f"device {score.device}", tau)
    if values_are_checked(tau) and bool(tau.isnan().any()):
        raise wrong("tau", "values that are not NaN", "NaN")


@op(Hints(by_token=BY_TOKEN))
def select_topk(
    score: Tensor, k: int, *, position: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Keeps the k largest scores seen so far; of equal scores, the earlier token stays.

    When more than k tokens have been seen, the token with the smallest score leaves. evict_at[j] is
    the first position at which k seen tokens beat j: a larger score, or an equal one that came
    earlier. O(T log T) for any k (HOLA, arXiv 2607.02303, keeps its cache this way).

    Args:
        score: `[B, T, H]`, floating; NaN counts as -inf.
        k: how many tokens of a sequence and head are stored at any time, >= 0.
        position: as in `select_threshold`, ascending within a sequence; `evict_at` is one of these
            positions or NEVER.
        cu_seqlens: int32 `[N+1]`, borders of packed sequences.

    Returns:
        evict_at, int32 `[B, T, H]`.

    Raises:
        ValueError: a bad argument.
    """
    where, sequence = placed(score, position, cu_seqlens)
    return topk(score, min(k, NEVER), where, sequence).to(torch.int32)


@select_topk.check
def _check_topk(
    score: Tensor, k: int, *, position: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> None:
    _check_score(score, position, cu_seqlens)
    check_count("k", k)


@op(Hints(by_token=BY_TOKEN))
def select_window(
    score: Tensor, width: int, *, position: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Sliding window: the queries j ... j + width - 1 see token j; with width = 1 itself alone.

    Args:
        score: `[B, T, H]`, floating; only its shape and device are used.
        width: in tokens, >= 0; j + width is clamped to NEVER.
        position: as in `select_threshold`.
        cu_seqlens: int32 `[N+1]`, borders of packed sequences.

    Returns:
        evict_at, int32 `[B, T, H]`: j + width.

    Raises:
        ValueError: a bad argument.
    """
    where = _by_token(score, position, cu_seqlens)
    # clamped before the sum, which would overflow
    until = where.clamp(max=NEVER - min(width, NEVER)) + min(width, NEVER)
    if not no_padding(where):
        until = torch.where(where < 0, where, until)
    return until.expand(score.shape)


@select_window.check
def _check_window(
    score: Tensor, width: int, *, position: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> None:
    _check_score(score, position, cu_seqlens)
    check_count("width", width)


@op(Hints(by_token=BY_TOKEN))
def select_first(
    score: Tensor, n: int, *, position: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Stores the first n tokens of every sequence for good (attention sinks, arXiv 2309.17453).

    Args:
        score: `[B, T, H]`, floating; only its shape and device are used.
        n: in tokens, >= 0.
        position: as in `select_threshold`.
        cu_seqlens: int32 `[N+1]`, borders of packed sequences.

    Returns:
        evict_at, int32 `[B, T, H]`: NEVER or the token's own position.

    Raises:
        ValueError: a bad argument.
    """
    where, _ = placed(score, position, cu_seqlens)
    return torch.where((where >= 0) & (where < min(n, NEVER)), NEVER, where).to(torch.int32)


@select_first.check
def _check_first(
    score: Tensor, n: int, *, position: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> None:
    _check_score(score, position, cu_seqlens)
    check_count("n", n)


def reaches(score: Tensor, tau: float | Tensor) -> Tensor:
    """Where scores of any shape reach tau, bool; nowhere if tau is +inf.

    Compared in the wider of float32 and the dtype of the scores: torch rounds a number, or a tensor
    `[]`, to the dtype of the tensor beside it.
    """
    dtype = wide(score)
    if not isinstance(tau, Tensor):
        tau = torch.tensor(tau, dtype=torch.float64, device=score.device)
    if tau.dim() == 0 and values_are_checked(tau):
        # a number: whether it is infinite is known without an op
        limit = tau.to(dtype).item()
        reached = score.to(dtype) >= limit
        return torch.zeros_like(reached) if limit == math.inf else reached
    return (score.to(dtype) >= tau.to(dtype)) & (tau < math.inf)


def _check_score(score: Tensor, position: Tensor | None, cu_seqlens: Tensor | None) -> None:
    check_tensor("score", score, "[B, T, H]", [None] * 3)
    check_floating("score", score)
    check_placed(score, position, cu_seqlens)


def check_placed(tokens: Tensor, position: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Checks positions `[B, T]` or `[B, T, H]`, and borders of packed sequences."""
    batch, length, heads = tokens.shape
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length, tokens)
    if position is None:
        return
    if not isinstance(position, Tensor) or position.dim() == 3:
        check_tensor("position", position, "[B, T, H]", [batch, length, heads], like=tokens)
    else:
        check_tensor("position", position, "[B, T]", [batch, length], like=tokens)
    check_integer("position", position)


def _by_token(tokens: Tensor, position: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Positions as int32, `[B, T, H]`, or `[B, T, 1]` where they are the same for all heads."""
    batch, length, _ = tokens.shape
    if position is None:
        position = positions(batch, length, device=tokens.device, cu_seqlens=cu_seqlens)
    by_token = position[..., None] if position.dim() == 2 else position
    if by_token.dtype != torch.int32:
        by_token = int32(by_token)
    return unpadded(by_token) if no_padding(position) else by_token


def placed(
    tokens: Tensor, position: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Positions as int64 `[B, T, H]`, and of a packed batch the sequence of every token `[T]`."""
    batch, length, heads = tokens.shape
    sequence = None if cu_seqlens is None else sequence_of(cu_seqlens, length)
    if position is None:
        position = positions(batch, length, device=tokens.device, cu_seqlens=cu_seqlens)
    if position.dim() == 2:
        position = position[..., None]
    return int32(position).long().expand(batch, length, heads), sequence


def check_count(name: str, value: object) -> None:
    """Checks an integer >= 0, of Python or numpy; a bool is none."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < 0:  # type: ignore[operator]
        raise wrong(name, "an integer >= 0", value)
