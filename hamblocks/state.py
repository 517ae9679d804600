"""What a layer remembers between two calls, and what can be done with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamblocks.cache import KVCache
from hamblocks_ops.arguments import check_integer, check_range, check_tensor, wrong


class Checkpoint(NamedTuple):
    """A point that a state can `crop` back to.

    Attributes:
        key: name of the point, or None.
        state: the state there, without checkpoints.
    """

    key: int | None
    state: HAMState


class HAMState(NamedTuple):
    """All that a layer remembers between two calls: explicit, in and out.

    A state begins empty and takes dtype, device and shapes from the first tokens. A call that is
    given a state spends it: the cache changes in place, and only the returned state may go on. Fork
    a state to go on from it twice. A call without a token returns the state that it was given.

    Attributes:
        position: int32 `[N]`, tokens seen so far.
        memory: the state of the memory, a tree of tuples, lists, dicts and tensors `[N, ...]`; None
            before the first token and in a layer without a memory.
        ledger: the selector's ledger, a tree of the same kind; None before the first token and for
            a selector that never revises a lifetime.
        cache: what is stored for attention; None in a layer without attention.
        checkpoints: points to `crop` back to, oldest first.
    """

    position: Tensor
    memory: Any = None
    ledger: Any = None
    cache: KVCache | None = None
    checkpoints: tuple[Checkpoint, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes in use: memory, ledger, pages and tables of the cache. Checkpoints come on top."""
        trees = self.position, self.memory, self.ledger
        stored = 0 if self.cache is None else self.cache.nbytes
        return stored + sum(tensor.nbytes for tensor in leaves(trees))

    def fork(self) -> HAMState:
        """A second state to go on from; both share all pages until one of them changes a page."""
        cache = None if self.cache is None else self.cache.fork()
        points = tuple(Checkpoint(key, state.fork()) for key, state in self.checkpoints)
        return self._replace(cache=cache, checkpoints=points)

    def reorder(self, index: Tensor) -> HAMState:
        """The state of sequences index[0], index[1], ..., as beam search wants; this one is spent.

        Args:
            index: int `[K]`, of sequences; any may come several times or not at all.

        Raises:
            ValueError: no such sequence.
        """
        check_tensor("index", index, "[K]", [None])
        check_integer("index", index)
        check_range("index", index, 0, len(self.position) - 1)
        cache = None if self.cache is None else self.cache.reorder(index)
        trees = self.position, self.memory, self.ledger
        position, memory, ledger = tree_map(lambda x: x.index_select(0, index.to(x.device)), trees)
        points = tuple(Checkpoint(key, state.reorder(index)) for key, state in self.checkpoints)
        return HAMState(position, memory, ledger, cache, points)

    def checkpoint(self, key: int | None = None) -> HAMState:
        """This state with a record of itself, to `crop` back to; it goes on where this one is.

        Args:
            key: a name for the point, for `crop(key=key)`.
        """
        point = Checkpoint(key, self._replace(checkpoints=()).fork())
        return self._replace(checkpoints=(*self.checkpoints, point))

    def crop(self, position: int | Tensor | None = None, *, key: int | None = None) -> HAMState:
        """The state as it was at a recorded checkpoint; the newest one counts.

        A recurrence and evictions cannot be undone to any other point.

        Args:
            position: tokens seen there, of all sequences alike or int `[N]`.
            key: the name of the checkpoint, in place of the position.

        Raises:
            ValueError: no checkpoint was recorded there.
        """
        for last, point in reversed(list(enumerate(self.checkpoints))):
            if point.key == key if position is None else _is_at(point.state, position):
                earlier = self.checkpoints[: last + 1]
                points = tuple(Checkpoint(name, state.fork()) for name, state in earlier)
                back = point.state.fork()
                return HAMState(back.position, back.memory, back.ledger, back.cache, points)
        if position is None:
            recorded = ", ".join(str(point.key) for point in self.checkpoints) or "none"
            raise wrong("key", f"that of a checkpoint ({recorded})", f"{key}")
        places = [str(point.state.position.tolist()) for point in self.checkpoints]
        wanted = position.tolist() if isinstance(position, Tensor) else position
        recorded = ", ".join(places) or "none"
        raise wrong("position", f"one that checkpoint() recorded ({recorded})", f"{wanted}")

    def reserve(self, steps: int) -> None:
        """Takes the cache's pages for `steps` more tokens per sequence (see `KVCache.reserve`)."""
        if self.cache is not None:
            self.cache.reserve(steps)

    def to(self, device: torch.device | str) -> HAMState:
        """A copy of its own on a device."""
        trees = self.position, self.memory, self.ledger
        position, memory, ledger = tree_map(lambda x: x.to(device), trees)
        cache = None
        if self.cache is not None:
            cache = KVCache.load(self.cache.state_dict(), device)
        points = tuple(Checkpoint(key, state.to(device)) for key, state in self.checkpoints)
        return HAMState(position, memory, ledger, cache, points)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, lists and plain tuples, for `torch.save` and `HAMLayer.load_state`.

        Checkpoints are left out.
        """
        return {
            "position": self.position,
            "memory": plain(self.memory),
            "ledger": list(leaves(self.ledger)),
            "cache": None if self.cache is None else self.cache.state_dict(),
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> HAMState:
        return self.to(self.position.device)


def _is_at(state: HAMState, position: int | Tensor) -> bool:
    return bool((state.position == position).all())


def leaves(tree: Any) -> Iterator[Tensor]:
    """All tensors of a tree of tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from leaves(list(tree.values()))
    elif isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from leaves(branch)


def tree_map(change: Callable[..., Tensor], tree: Any, *others: Any) -> Any:
    """The tree with every tensor changed, beside those of other trees of the same form."""
    if isinstance(tree, Tensor):
        return change(tree, *others)
    if isinstance(tree, dict):
        return {
            name: tree_map(change, branch, *(other[name] for other in others))
            for name, branch in tree.items()
        }
    if isinstance(tree, (tuple, list)):
        branches = [tree_map(change, *beside) for beside in zip(tree, *others, strict=True)]
        return type(tree)(*branches) if hasattr(tree, "_fields") else type(tree)(branches)
    return tree


def plain(tree: Any) -> Any:
    """The tree with plain tuples in place of NamedTuples, which a file cannot hold."""
    if isinstance(tree, dict):
        return {name: plain(branch) for name, branch in tree.items()}
    if isinstance(tree, (tuple, list)):
        return (tuple if isinstance(tree, tuple) else list)(plain(branch) for branch in tree)
    return tree
