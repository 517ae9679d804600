"""Streaming top-k whose number of places grows, in O(T log T), without a loop over tokens.

Call a token better than j if it has a larger score, or an equal one and came earlier. Let B_s be
the number of tokens up to s that are better than j, k(s) the places at time s, and

    D_s = B_s - k(s)

Of the tokens better than j, min(m + 1, k(s)) are stored after one more came, or min(m, k(s)) after
a worse one, if m were before. Unrolled, these are B_s - max(0, max_{r <= s} D_r). They fill all
places where D_s reaches the largest D before. So j leaves at

    the first t >= j with D_t >= max(0, max_{s < j} D_s)

D depends on j only by how many tokens are better. A tree over the columns answers for all j at
once. A node covers n columns and holds n + 1 versions: version v is for the v best of its own
tokens. Every version knows the largest D in the node, counted from the node's first column, and
how many of its v tokens are in the left half, which are the versions of its two children.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hamblocks_ops import NEVER
from hamblocks_ops.lengths import is_symbolic
from hamblocks_ops.select.topk import ranks


class Level(NamedTuple):
    """All nodes of one size n; P columns, so P / n nodes in each of R streams.

    Attributes:
        size: n.
        left: int32 `[R, P / n * (n + 1)]`, how many of the v best tokens are in the left half.
        peak: int32 `[R, P / n * (n + 1)]`, the largest D of a version.
    """

    size: int
    left: Tensor
    peak: Tensor


def grown_topk(
    score: Tensor, places: Tensor, position: Tensor, sequence: Tensor | None = None
) -> Tensor:
    """Lifetimes if the worst token leaves whenever more tokens are stored than there are places.

    Args:
        score: `[B, T, H]`, floating; NaN counts as -inf.
        places: int64 `[B, T, H]`, k at each token, >= 1, never descending within a sequence. A
            number above T says that nothing leaves when this token comes.
        position: int64 `[B, T, H]`, ascending within a sequence; -1 for padding.
        sequence: int64 `[T]`, the sequence of every packed token.

    Returns:
        int64 `[B, T, H]`: one of the positions, or NEVER.
    """
    batch, tokens, heads = score.shape
    if tokens == 0:
        return position.clone()
    rank = ranks(score, position)
    if sequence is not None:
        # Tokens of later sequences count as better. They come later, so they change no D of the
        # own sequence, and tokens of earlier sequences do not count.
        rank = rank - tokens * sequence[:, None]
    room = places.masked_fill(position < 0, NEVER)
    # streams side by side
    rank, room = (x.mT.reshape(batch * heads, tokens) for x in (rank, room))
    leaves = _leaves_op(rank, room) if is_symbolic(tokens) else _leaves(rank, room)
    leaves = leaves.view(batch, heads, tokens).mT
    when = position.gather(1, leaves.clamp(max=tokens - 1))
    stays = leaves >= tokens
    if sequence is not None:
        stays |= sequence[leaves.clamp(max=tokens - 1)] != sequence[:, None]
    return torch.where(position < 0, position, torch.where(stays, NEVER, when))


def _leaves(rank: Tensor, room: Tensor) -> Tensor:
    """The column at which each token leaves; T or a later one if it stays.

    Args:
        rank: int64 `[R, T]`, ascending from the best token to the worst.
        room: int64 `[R, T]`, places at each column.

    Returns:
        int64 `[R, T]`.
    """
    tokens = rank.shape[1]
    width = 1 << (tokens - 1).bit_length()
    beyond = [0, width - tokens]
    many = 2 * width  # more places than tokens
    order = torch.nn.functional.pad(rank, beyond, value=tokens).argsort(dim=1, stable=True)
    room = torch.nn.functional.pad(room.clamp(max=many), beyond, value=many)
    column = torch.arange(width, device=rank.device).expand_as(order)
    better = torch.empty_like(order).scatter_(1, order, column)
    return _first_full(_levels(order, room), better, room)[:, :tokens].contiguous()


@torch.library.custom_op("hamblocks::grown_topk_leaves", mutates_args=())
def _leaves_op(rank: Tensor, room: Tensor) -> Tensor:
    """`_leaves` as one operator, where the tree over T columns cannot be unrolled."""
    return _leaves(rank, room)


@_leaves_op.register_fake
def _(rank: Tensor, _room: Tensor) -> Tensor:
    return rank.new_empty(rank.shape)


def _levels(order: Tensor, room: Tensor) -> list[Level]:
    """The tree, the root first and the leaves last.

    Args:
        order: int64 `[R, P]`, columns from the best token to the worst.
        room: int64 `[R, P]`, places at each column.
    """
    streams, width = order.shape
    lefts = []
    size, inside = width, order[:, None]  # columns counted from the first one of their node
    while size > 1:
        half = size // 2
        right = inside >= half
        before = torch.nn.functional.pad((~right).cumsum(2), [1, 0])  # of the v best, in the left
        lefts.append(before)
        # A stable partition: tokens of the left half keep their order, then those of the right.
        rank = torch.arange(size, device=order.device)
        place = torch.where(right, half + rank - before[..., :-1], before[..., :-1])
        inside = torch.empty_like(inside).scatter_(2, place, inside % half)
        inside = inside.view(streams, -1, half)
        size = half
    peak = torch.stack([-room, 1 - room], 2)  # a leaf without its token, and with it
    levels = [Level(1, torch.zeros_like(peak).flatten(1).int(), peak.flatten(1).int())]
    for left in reversed(lefts):
        size *= 2
        children = peak.view(streams, -1, 2, size // 2 + 1)
        version = torch.arange(size + 1, device=order.device)
        peak = torch.maximum(
            children[:, :, 0].gather(2, left), left + children[:, :, 1].gather(2, version - left)
        )
        levels.append(Level(size, left.flatten(1).int(), peak.flatten(1).int()))
    return levels[::-1]


def _first_full(levels: list[Level], better: Tensor, room: Tensor) -> Tensor:
    """The column at which each token leaves; P if it stays.

    Args:
        levels: the tree.
        better: int64 `[R, P]`, how many tokens are better than that of each column.
        room: int64 `[R, P]`, places at each column.
    """
    width = better.shape[1]
    column = torch.arange(width, device=better.device)
    # Down to the own leaf: `bar` is the largest D before it, `count` the better tokens before it.
    # Where the way goes left, the right half comes after the own leaf: its version is kept.
    bar, count, version = torch.zeros_like(better), torch.zeros_like(better), better
    later = []
    for level, child in pairwise(levels):
        node, half = column // level.size, child.size
        left = _at(level.left, node, level.size, version)
        is_right = column % level.size >= half
        peak = count + _at(child.peak, 2 * node, half, left)
        bar = torch.where(is_right, torch.maximum(bar, peak), bar)
        later.append((~is_right, version - left, count + left))
        count = torch.where(is_right, count + left, count)
        version = torch.where(is_right, version - left, left)
    found = count - room >= bar
    # Up again, to the smallest right half that reaches the bar.
    chosen = []
    for child, (is_left, right_version, right_count) in zip(
        reversed(levels[1:]), reversed(later), strict=True
    ):
        node = column // (2 * child.size) * 2 + 1
        reaches = right_count + _at(child.peak, node, child.size, right_version) >= bar
        chosen.append(is_left & reaches & ~found)
        found = found | chosen[-1]
    # Down from there, to the first column that reaches it.
    at = column.expand_as(better)
    inside = torch.zeros_like(found)
    for (level, child), (_, right_version, right_count), here in zip(
        pairwise(levels), later, reversed(chosen), strict=True
    ):
        node, half = at // level.size, child.size
        left = _at(level.left, node, level.size, version)
        goes_right = inside & (count + _at(child.peak, 2 * node, half, left) < bar)
        goes_left = inside & ~goes_right
        count = torch.where(here, right_count, torch.where(goes_right, count + left, count))
        version = torch.where(
            here,
            right_version,
            torch.where(goes_right, version - left, torch.where(goes_left, left, version)),
        )
        at = torch.where(here | goes_right, node * level.size + half, at)
        inside = inside | here
    return torch.where(found, at, width)


def _at(values: Tensor, node: Tensor, size: int, version: Tensor) -> Tensor:
    """Values `[R, P]` int64 of versions of nodes of a level."""
    return values.gather(1, node * (size + 1) + version).long()
