"""The state of a layer between two calls, and the operations on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamblocks.cache import KVCache
from hamblocks.protocols import check_count
from hamblocks_ops.arguments import check_integer, check_range, check_tensor, wrong

FORMAT = 1
"""Version of the format of `HAMState.state_dict()`; a change that older code would misread
increases it."""


class Checkpoint(NamedTuple):
    """A point that a state can `crop` back to.

    Attributes:
        key: name of the point, or None.
        state: the state at that point, without checkpoints.
    """

    key: int | None
    state: HAMState


class Ring(NamedTuple):
    """The states before the last tokens, which `HAMState.rollback` goes back to.

    `rollback` forks a state before it uses it. So these states never change, and several states may
    hold the same ones.

    Attributes:
        size: most states; so many of the last tokens can be taken back.
        states: oldest first, each without a ring of its own.
    """

    size: int
    states: tuple[HAMState, ...] = ()


class StateBytes(NamedTuple):
    """Bytes of a state, all in use; their sum is `HAMState.nbytes`.

    Attributes:
        memory: the state of the memory.
        attention: the state of the attention part.
        ledger: the selector's ledger.
        pages: keys, values, positions, lifetimes and biases in the pages that the state lists.
        tables: page tables, and the numbers of tokens seen.
    """

    memory: int
    attention: int
    ledger: int
    pages: int
    tables: int


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
        ledger: the selector's ledger: the tokens whose lifetimes it may still lower, a tree of the
            same kind; None before the first token and for a selector that never lowers one later.
        cache: keys and values that are stored for attention; None in a layer without attention.
        checkpoints: points to `crop` back to, oldest first.
        ring: the states before the last tokens, for `rollback`; None if the layer's `init_state`
            was not asked for it.
    """

    position: Tensor
    memory: Any = None
    attention: Any = None
    ledger: Any = None
    cache: KVCache | None = None
    checkpoints: tuple[Checkpoint, ...] = ()
    ring: Ring | None = None

    @property
    def trees(self) -> tuple[Tensor, Any, Any, Any]:
        """Position, and the states of memory, attention and selector, which are plain tensors."""
        return self.position, self.memory, self.attention, self.ledger

    @property
    def nbytes(self) -> int:
        """Bytes in use: states of parts, pages and tables of the cache.

        What only checkpoints and the ring hold is not counted; `cache.capacity_nbytes` has it.
        """
        return sum(self.nbytes_by_part)

    @property
    def nbytes_by_part(self) -> StateBytes:
        """`nbytes` by part: memory, attention part, ledger, pages, tables. Waits for the device.

        A page that forks share is counted in each fork, so their sum exceeds what they allocate.
        """
        position, memory, attention, ledger = (
            sum(tensor.nbytes for tensor in leaves(tree)) for tree in self.trees
        )
        pages = 0 if self.cache is None else self.cache.pages_nbytes
        tables = 0 if self.cache is None else self.cache.tables_nbytes
        return StateBytes(memory, attention, ledger, pages, tables + position)

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
        # by forks, because other states may hold the same checkpoints and ring
        points = tuple(
            Checkpoint(key, point.fork().reorder(index)) for key, point in self.checkpoints
        )
        ring = self.ring
        if ring is not None:
            ring = ring._replace(states=tuple(one.fork().reorder(index) for one in ring.states))
        return state._replace(cache=cache, checkpoints=points, ring=ring)

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
            ValueError: no checkpoint was recorded there, or `position` is no int or int `[N]`.
        """
        if isinstance(position, Tensor):
            check_tensor("position", position, "[N]", [len(self.position)])
            check_integer("position", position)
            position = position.to(self.position.device)
        elif position is not None:
            position = check_count("position", position)
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

    def rollback(self, n: int | Tensor) -> HAMState:
        """The state without the last `n` tokens, as if they had never been seen.

        Speculative decoding rejects tokens in this way. A state that `init_state(..., rollback=r)`
        made can go back by up to r tokens, without a checkpoint. This state stays valid.

        Args:
            n: tokens to take back, 0 to r: one int for all sequences, or int `[N]`.

        Raises:
            ValueError: fewer tokens are recorded: the state was made without `rollback`, has seen
                fewer tokens, or was moved or loaded after them. Or `n` differs between sequences,
                and only some of them go back to before their first token.
        """
        if self.ring is None:
            raise wrong("n", "0 for a state without rollback (see init_state)", n)
        if isinstance(n, Tensor):
            check_tensor("n", n, "[N]", [len(self.position)])
            check_integer("n", n)
            n = n.to(self.position.device)
        else:
            n = check_count("n", n)
        states = (*self.ring.states, self)
        position = torch.stack([one.position.to(self.position.device) for one in states])
        found = (position == self.position - n).flip(0)
        # the newest state of those at the same position; a sequence may pause for some calls
        chosen = [len(states) - 1 - back for back in found.int().argmax(0).tolist()]
        if not bool(found.any(0).all()):
            most = (self.position - position[0]).tolist()
            raise wrong("n", f"at most the tokens that are recorded, {most}", f"{n}")
        if len({*chosen}) <= 1:
            index = chosen[0] if chosen else len(states) - 1
            back = states[index].fork()
            return back._replace(ring=self.ring._replace(states=self.ring.states[:index]))
        earlier = [
            _mixed(states, [index - step for index in chosen])
            for step in range(min(chosen), 0, -1)
            if not _are_fresh([states[index - step] for index in chosen])
        ]
        ring = self.ring._replace(states=tuple(earlier))
        return _mixed(states, chosen)._replace(ring=ring)

    def with_rollback(self, n: int) -> HAMState:
        """This state with a ring for the last `n` tokens from now on; use it instead of this one.

        What is recorded stays, but no more than the states before the last n tokens.

        Args:
            n: size of the ring, as `rollback` of `HAMLayer.init_state`; 0: no ring.

        Raises:
            ValueError: `n` is not an integer of at least 0.
        """
        n = check_count("n", n)
        recorded = () if self.ring is None else self.ring.states
        return self._replace(ring=Ring(n, recorded[-n:]) if n else None)

    def reserve(self, steps: int) -> None:
        """Reserves the cache's pages for `steps` more tokens per sequence (see `KVCache.reserve`).

        Raises:
            ValueError: the state has a ring: recording copies pages, which waits for the device.
        """
        if self.ring is not None:
            raise wrong("steps", "no reservation in a state with rollback", steps)
        if self.cache is not None:
            self.cache.reserve(steps)

    def check(self) -> None:
        """Checks that the state can be continued. Waits for the device.

        Call it after replays of a CUDA graph: the host does not check them as they run.

        Raises:
            ValueError: the state is spent, or a replayed CUDA graph went past the steps that
                `reserve` took pages for.
        """
        if self.cache is not None:
            self.cache.check_reserve()

    def to(self, device: torch.device | str) -> HAMState:
        """An independent copy on a device. Its ring is empty."""
        cache = None
        if self.cache is not None:
            cache = KVCache.load(self.cache.state_dict(), device)
        points = tuple(Checkpoint(key, state.to(device)) for key, state in self.checkpoints)
        state = self._mapped(lambda x: x.to(device))
        ring = None if self.ring is None else Ring(self.ring.size)
        return state._replace(cache=cache, checkpoints=points, ring=ring)

    def detach(self) -> HAMState:
        """The same state without the graph of earlier calls: a later loss does not reach them."""
        state = self._mapped(torch.Tensor.detach)
        # stored tokens have no graph
        return state._replace(cache=self.cache, checkpoints=self.checkpoints, ring=self.ring)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> HAMState:
        """This state with every tensor outside the cache changed."""
        position, memory, attention, ledger = tree_map(change, self.trees)
        return HAMState(position, memory, attention, ledger)

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors, numbers, lists and plain tuples.

        `torch.save` can store it, and `HAMLayer.load_state` takes it. Checkpoints and the states of
        the ring are left out.
        """
        return {
            "format": FORMAT,
            "rollback": 0 if self.ring is None else self.ring.size,
            "position": self.position,
            "memory": plain(self.memory),
            "attention": plain(self.attention),
            "ledger": list(leaves(self.ledger)),
            "cache": None if self.cache is None else self.cache.state_dict(),
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> HAMState:
        return self.to(self.position.device)


def _are_fresh(states: Sequence[HAMState]) -> bool:
    """Whether some of the states have had a first token and others have not."""

    def begun(state: HAMState) -> tuple[bool, ...]:
        parts = state.memory, state.attention, state.ledger
        sizes = None if state.cache is None else state.cache.sizes
        return (*(part is not None for part in parts), sizes is not None)

    return len({begun(state) for state in states}) > 1


def _mixed(states: Sequence[HAMState], choice: list[int]) -> HAMState:
    """The state whose sequence n is that of `states[choice[n]]`, without a ring."""
    used = sorted({*choice})
    some = [states[index] for index in used]
    if _are_fresh(some):
        expected = "the same for all sequences, if one goes back to before its first token"
        raise wrong("n", expected, "different numbers")
    which = [used.index(index) for index in choice]

    def chosen(*tensors: Tensor) -> Tensor:
        device = tensors[0].device
        index = torch.tensor(which, device=device), torch.arange(len(which), device=device)
        return torch.stack(tensors)[index]

    position, memory, attention, ledger = tree_map(chosen, *(one.trees for one in some))
    caches = [one.cache for one in some if one.cache is not None]
    points = some[0].fork().checkpoints
    cache = KVCache.mixed(caches, which) if caches else None
    return HAMState(position, memory, attention, ledger, cache, points)


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
