"""The state of a layer between two calls, and the operations on it."""

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
        state: the state at that point, without checkpoints.
    """

    key: int | None
    state: HAMState


class HAMState(NamedTuple):
    """The state of a layer between two calls. Calls take it as an argument and return the next one.

    A state is empty at first and takes dtype, device and shapes from the first tokens. A call
    spends the state that it is given: the cache changes in place, so only the returned state can be
    used afterwards. To continue from the same state twice, `fork` it before the call. A call
    without tokens returns the given state.

    Attributes:
        position: int32 `[N]`, tokens seen so far.
        memory: the state of the memory, a tree of tuples, lists, dicts and tensors `[N, ...]`; None
            before the first token and in a layer without a memory.
        attention: the state of the attention part (see `hamblocks.protocols.PreparesTokens`), a
            tree of the same kind; None before the first token and for a part without a state.
        ledger: the selector's ledger, a tree of the same kind; None before the first token and for
            a selector that never lowers a lifetime later.
        cache: keys and values that are stored for attention; None in a layer without attention.
        checkpoints: points to `crop` back to, oldest first.
    """

    position: Tensor
    memory: Any = None
    attention: Any = None
    ledger: Any = None
    cache: KVCache | None = None
    checkpoints: tuple[Checkpoint, ...] = ()

    @property
    def trees(self) -> tuple[Tensor, Any, Any, Any]:
        """All but the cache and the checkpoints: position, and the states of the parts."""
        return self.position, self.memory, self.attention, self.ledger

    @property
    def nbytes(self) -> int:
        """Bytes in use: states of parts, pages and tables of the cache, without checkpoints."""
        stored = 0 if self.cache is None else self.cache.nbytes
        return stored + sum(tensor.nbytes for tensor in leaves(self.trees))

    def fork(self) -> HAMState:
        """A second, independent state; a page is shared until one of the two states changes it."""
        cache = None if self.cache is None else self.cache.fork()
        points = tuple(Checkpoint(key, state.fork()) for key, state in self.checkpoints)
        return self._replace(cache=cache, checkpoints=points)

    def reorder(self, index: Tensor) -> HAMState:
        """The state of sequences index[0], index[1], ..., for beam search; this state is spent.

        Args:
            index: int `[K]`, indices of sequences; repeated and missing ones are allowed.

        Raises:
            ValueError: an index is out of range.
        """
        check_tensor("index", index, "[K]", [None])
        check_integer("index", index)
        check_range("index", index, 0, len(self.position) - 1)
        cache = None if self.cache is None else self.cache.reorder(index)
        state = self._mapped(lambda x: x.index_select(0, index.to(x.device)))
        points = tuple(Checkpoint(key, state.reorder(index)) for key, state in self.checkpoints)
        return state._replace(cache=cache, checkpoints=points)

    def checkpoint(self, key: int | None = None) -> HAMState:
        """This state with a checkpoint of itself added, to `crop` back to later.

        The returned state takes the place of this one; the position does not change.

        Args:
            key: name of the checkpoint, for `crop(key=key)`.
        """
        point = Checkpoint(key, self._replace(checkpoints=()).fork())
        return self._replace(checkpoints=(*self.checkpoints, point))

    def crop(self, position: int | Tensor | None = None, *, key: int | None = None) -> HAMState:
        """The state as it was at a checkpoint; the newest one if several match.

        Only checkpoints can be restored, because a recurrence and evictions cannot be undone.

        Args:
            position: tokens seen at the checkpoint: one int for all sequences, or int `[N]`.
            key: name of the checkpoint, instead of the position.

        Raises:
            ValueError: no checkpoint was recorded there.
        """
        for last, point in reversed(list(enumerate(self.checkpoints))):
            if point.key == key if position is None else _is_at(point.state, position):
                earlier = self.checkpoints[: last + 1]
                points = tuple(Checkpoint(name, state.fork()) for name, state in earlier)
                back: HAMState = point.state.fork()
                return back._replace(checkpoints=points)
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

    def check(self) -> None:
        """Checks that the state can be continued. Waits for the device.

        Call it after replays of a CUDA graph, which no other check of the host sees.

        Raises:
            ValueError: the state is spent, or a replayed CUDA graph went past the steps that
                `reserve` took pages for.
        """
        if self.cache is not None:
            self.cache.check_reserve()

    def to(self, device: torch.device | str) -> HAMState:
        """An independent copy on a device."""
        cache = None
        if self.cache is not None:
            cache = KVCache.load(self.cache.state_dict(), device)
        points = tuple(Checkpoint(key, state.to(device)) for key, state in self.checkpoints)
        state = self._mapped(lambda x: x.to(device))
        return state._replace(cache=cache, checkpoints=points)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> HAMState:
        """This state with every tensor outside the cache changed."""
        position, memory, attention, ledger = tree_map(change, self.trees)
        return HAMState(position, memory, attention, ledger)

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors, numbers, lists and plain tuples, without checkpoints.

        `torch.save` can store it, and `HAMLayer.load_state` takes it.
        """
        return {
            "position": self.position,
            "memory": plain(self.memory),
            "attention": plain(self.attention),
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
    """Applies `change` to every tensor of a tree, and to those at the same place in `others`."""
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
    """The tree with plain tuples for NamedTuples, which `torch.load(weights_only=True)` refuses."""
    if isinstance(tree, dict):
        return {name: plain(branch) for name, branch in tree.items()}
    if isinstance(tree, (tuple, list)):
        return (tuple if isinstance(tree, tuple) else list)(plain(branch) for branch in tree)
    return tree
