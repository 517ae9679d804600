"""What parts offer so that the ranks of a group can share the heads of a layer (tensor parallel).

Rank r of R holds the r-th of R equal runs of query heads, of key/value heads and of heads of the
memory. It computes whatever concerns its own heads, and decides for its own key/value heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, Protocol, final, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

ScoreHeads = Literal["one", "own", "given"]
"""Heads of a gate's score. "one": one score for all heads. "own": one for each head of its trace.
"given": as many as `given_score` has."""


class Split(NamedTuple):
    """How a parameter is cut: each rank uses an equal run of every block along a dimension.

    Attributes:
        dim: the dimension that is cut.
        blocks: sizes of the blocks along it, which add up to its size.
        is_small: the parameter is held whole by every rank, because its blocks have different sizes
            and cutting it would save little.
    """

    dim: int
    blocks: Sequence[int]
    is_small: bool = False

    def of_rank(self, x: Tensor, rank: int, ranks: int) -> Tensor:
        """The entries of one rank, of a whole tensor.

        Where a block does not divide, the first ranks have more, as `torch.chunk` cuts.
        """
        pieces = []
        for block in x.split(list(self.blocks), self.dim):
            begin, end = run_of(block.shape[self.dim], rank, ranks)
            pieces.append(block.narrow(self.dim, begin, end - begin))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)


class OnFirstRank(NamedTuple):
    """A parameter, such as a bias, that is added to a sum over ranks: only rank 0 adds it."""


class NotTrained(NamedTuple):
    """A parameter that the module uses without a gradient: there is none to add over the ranks."""


How = Split | OnFirstRank | NotTrained
"""How the ranks hold a parameter."""


def under(name: str, splits: dict[str, Split]) -> dict[str, Split]:
    """The splits of a module inside a part, by name within the part."""
    return {f"{name}.{own}": split for own, split in splits.items()}


def run_of(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """Begin and end of a rank's run of `size` entries, as `torch.chunk` cuts them."""
    each = -(-size // ranks)
    return min(rank * each, size), min((rank + 1) * each, size)


@runtime_checkable
class SplitsHeads(Protocol):
    """A part that can work on some of its heads.

    A memory, an attention part and a combiner must offer it to be split. The others, and modules
    inside a part, offer it if they have parameters of single heads. What a combiner returns is
    summed over the ranks.
    """

    def split_heads(self, ranks: int) -> Mapping[str, How]:
        """Becomes a part with its share of heads: sizes that it has stored are now those of a rank.

        Called once, when its parameters are still whole.

        Args:
            ranks: how many ranks share the heads. It divides their number.

        Returns:
            How parameters and buffers are cut, by name within the part. Those without a name here
            are whole on every rank.
        """
        ...


@runtime_checkable
class HasScoreHeads(Protocol):
    """A gate that says which heads it scores. A gate or query gate must say so to be split."""

    score_heads: ScoreHeads


@runtime_checkable
class DecidesByHead(Protocol):
    """A selector that decides for each head by the scores of this head alone.

    A selector must say so, with `by_head = True`, to be split.
    """

    by_head: bool


def scores_once(gate: object, given_heads: int | None) -> bool:
    """Whether a gate has one score of a token for all heads of the layer.

    Args:
        gate: the gate; None scores every token 0.
        given_heads: heads of the caller's score; None: there is none.
    """
    heads = "one" if gate is None else getattr(gate, "score_heads", "own")
    return heads == "one" or (heads == "given" and given_heads == 1)


@final
class HeadShare:
    """Which heads a rank holds.

    Attributes:
        group: the process group; None: the default one.
        rank: this rank within the group.
        ranks: number of ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """Reads rank and size of the group."""
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: Any) -> HeadShare:
        return self  # a process group cannot be copied

    def own(self, heads: int) -> slice:
        """The heads of this rank, of `heads` in the layer."""
        return slice(*run_of(heads, self.rank, self.ranks))

    def gather(self, x: Tensor) -> Tensor:
        """All heads `[..., heads]` in order, from those of every rank; differentiable.

        The gradient is the sum over ranks, because every rank uses what it has gathered.
        """
        gathered: Tensor = _Gather.apply(x, self)  # type: ignore[no-untyped-call]
        return gathered


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: HeadShare) -> Tensor:
        ctx.share = share
        x = x.contiguous()
        every = [torch.empty_like(x) for _ in range(share.ranks)]
        dist.all_gather(every, x, group=share.group)
        return torch.cat(every, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed, group=ctx.share.group)
        return summed[..., ctx.share.own(summed.shape[-1])], None


class SharedCall(NamedTuple):
    """A call of a layer whose heads are split.

    Attributes:
        share: the heads of this rank.
        one_score: whether the scores are the same on all ranks, one for all heads.
    """

    share: HeadShare
    one_score: bool


_CALL: ContextVar[SharedCall | None] = ContextVar("hamblocks_shared_call", default=None)


def shared_call() -> SharedCall | None:
    """The call that the running part belongs to; None: its layer has all heads.

    None in compiled code, because layers whose heads are split run outside of it.
    """
    return None if torch.compiler.is_compiling() else _CALL.get()


@contextlib.contextmanager
def in_shared_call(call: SharedCall | None) -> Iterator[None]:
    """Context in which `shared_call()` returns `call`."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


@contextlib.contextmanager
def one_score() -> Iterator[None]:
    """Context in which controllers count a score once, because all ranks have the same."""
    call = _CALL.get()
    with in_shared_call(None if call is None else call._replace(one_score=True)):
        yield


def all_heads(x: Tensor) -> Tensor:
    """x `[..., heads]` gathered from all ranks; x itself where the layer has all heads."""
    call = shared_call()
    return x if call is None else call.share.gather(x)
