"""What a layer remembers between two calls, and what can be done with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamblocks.cache import KVCache
from hamblocks_ops.arguments import wrong


class HAMState(NamedTuple):
    """All that a layer remembers between two calls: explicit, in and out.

    A call that is given a state spends it: the cache is changed in place, and only the returned state may go on. Fork a
    state to go on from it twice. The state of a memory and the ledger of a selector are trees of tuples, lists, dicts
    and tensors whose first dimension are the sequences.

    Attributes:
        position: int32 `[N]`, tokens seen so far.
        memory: the memory's own state, convolution included; None before the first call.
        ledger: the selector's ledger, None for one that never revises a lifetime.
        cache: what is stored for attention.
        marks: states to `crop` back to, oldest first.
    """

    position: Tensor
    memory: Any
    ledger: Any
    cache: KVCache
    marks: tuple[HAMState, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes in use: memory, ledger, the cache's pages and lists; those of recorded checkpoints come on top."""
        trees = self.position, self.memory, self.ledger
        return self.cache.nbytes + sum(tensor.nbytes for tensor in leaves(trees))

    def fork(self) -> HAMState:
        """A second state to go on from, which shares all pages until one of the two changes them."""
        return self._replace(
            cache=self.cache.fork(), marks=tuple(mark.fork() for mark in self.marks)
        )

    def reorder(self, index: Tensor) -> HAMState:
        """The state of sequences index[0], index[1], ..., as beam search wants; this state is spent.

        Args:
            index: int `[K]`, of sequences; any may come several times or not at all.

        Raises:
            ValueError: no such sequence.
        """
        cache = self.cache.reorder(index)  # checks it
        trees = self.position, self.memory, self.ledger
        position, memory, ledger = tree_map(lambda x: x.index_select(0, index), trees)
        marks = tuple(mark.reorder(index) for mark in self.marks)
        return HAMState(position, memory, ledger, cache, marks)

    def checkpoint(self) -> HAMState:
        """This state with a record of itself, to `crop` back to; it goes on where this one is."""
        return self._replace(marks=(*self.marks, self._replace(cache=self.cache.fork(), marks=())))

    def crop(self, position: int | Tensor) -> HAMState:
        """The state as it was at a recorded checkpoint; a recurrence and evictions cannot be undone to any other point.

        Args:
            position: tokens seen, of all sequences alike or int `[N]`.

        Raises:
            ValueError: no checkpoint was recorded there.
        """
        for last, mark in reversed(list(enumerate(self.marks))):
            if bool((mark.position == position).all()):
                back = mark.fork()
                marks = tuple(earlier.fork() for earlier in self.marks[: last + 1])
                return HAMState(back.position, back.memory, back.ledger, back.cache, marks)
        recorded = ", ".join(str(mark.position.tolist()) for mark in self.marks) or "none"
        wanted = position.tolist() if isinstance(position, Tensor) else position
        raise wrong("position", f"one that checkpoint() recorded ({recorded})", f"{wanted}")

    def reserve(self, steps: int) -> None:
        """Takes the cache's pages for `steps` more tokens per sequence (see `KVCache.reserve`)."""
        self.cache.reserve(steps)

    def to(self, device: torch.device | str) -> HAMState:
        """A copy of its own on a device."""
        position, memory, ledger = tree_map(
            lambda x: x.to(device), (self.position, self.memory, self.ledger)
        )
        marks = tuple(mark.to(device) for mark in self.marks)
        return HAMState(position, memory, ledger, self.cache.to(device), marks)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and lists, for `torch.save` and `HAMLayer.load_state`; checkpoints are left out."""
        memory = None if self.memory is None else list(leaves(self.memory))
        ledger = list(leaves(self.ledger))
        return {
            "position": self.position,
            "memory": memory,
            "ledger": ledger,
            "cache": self.cache.state_dict(),
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> HAMState:
        return self.to(self.cache.device)


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
    """The tree with `change` made to every tensor, beside those of other trees of the same form."""
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
