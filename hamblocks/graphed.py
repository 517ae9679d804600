"""Decoding by a CUDA graph, with the host's accounting of reserved pages at every replay."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Generic, TypeVar, final

import torch
from torch import Tensor

from hamblocks.cache import KVCache
from hamblocks.protocols import check_count
from hamblocks.state import HAMState, leaves, tree_map
from hamblocks_ops.arguments import describe, wrong

States = TypeVar("States", HAMState, list[HAMState])

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Records the kernels that a function launches, without running them; returns their replay."""


@final
class GraphedDecode(Generic[States]):
    """Decodes a number of tokens for every sequence, one by one, by replays of one step.

    On a GPU the first call runs the step as usual, which loads its kernels. The second call
    captures the step in a CUDA graph, and it and all later calls replay the graph. A replay
    launches the kernels of the step without its Python code. On another device every call runs the
    step as usual.

    The pages of all tokens are reserved at the start, and the host counts every step. So a replay
    never runs without pages: the call after the last reserved step raises an error, before anything
    changes. The graph is captured again when the pool of pages has grown, which a call on a fork
    may cause.

    The object belongs to one thread. Parameters may change in place between two calls; after a
    change of anything else in the layer, such as `train()` or another selector, make a new object.

        step = layer.graphed_decode(state, 64)
        for _ in range(64):
            y = step(x)
        state = step.state
    """

    def __init__(
        self, call: Callable[[Tensor, States], tuple[Tensor, States]], state: States, steps: int
    ) -> None:
        """Reserves the pages of `steps` tokens per sequence.

        Args:
            call: one step: from the input of the next tokens and the state to the output and the
                next state. It raises an error before it changes a cache.
            state: a state, or one per layer; it is spent.
            steps: most calls, at least 1.

        Raises:
            ValueError: `steps` is not an integer of at least 1, or as `HAMState.reserve`.
        """
        steps = check_count("steps", steps, 1)
        for one in _each(state):
            one.reserve(steps)
        self._step: Callable[[Tensor, States], tuple[Tensor, States]] = call
        self._state: States = state
        self._steps = self._left = steps
        self._x: Tensor | None = None
        self._y: Tensor | None = None
        self._replay: Callable[[], None] | None = None
        self._version: list[int] = []

    @property
    def left(self) -> int:
        """How many more steps are reserved."""
        return self._left

    @property
    def state(self) -> States:
        """The state after the last step, for calls that are not steps of this object.

        A later step spends it. Once another call has taken it, this object runs no more steps.
        """
        # copies, because a replay writes to these tensors
        return _mapped(self._state, torch.clone)

    def __call__(self, x: Tensor) -> Tensor:
        """Runs one step.

        Args:
            x: the input of the step, such as `[N, hidden_size]` for a layer: of the same shape,
                dtype and device in every call.

        Returns:
            The output of the step, such as y `[N, hidden_size]`.

        Raises:
            ValueError: all reserved steps are used, another call took the state or it was forked,
                or a bad argument; nothing has changed then.
        """
        if self._left == 0:
            raise wrong(
                "reserve",
                f"at most the {self._steps} steps that graphed_decode reserved",
                f"{self._steps + 1} (call graphed_decode again, with the state of this one)",
            )
        with torch.inference_mode(False), torch.no_grad(), ExitStack() as locks:
            for one in _each(self._state):
                if one.cache is not None:
                    locks.enter_context(one.cache.lock)
            self._check_reserved()
            capture = capture_on(x.device)
            if capture is None:
                y, self._state = self._step(x, self._state)
            elif self._x is None:
                y = self._first(x)
            else:
                y = self._replayed(x, self._x, capture)
        self._left -= 1
        return y

    def _check_reserved(self) -> None:
        for one in _each(self._state):
            if one.cache is not None:
                one.cache.check_reserved()

    def _first(self, x: Tensor) -> Tensor:
        """The first step, as usual, and the tensors with the addresses that replays use."""
        y, state = self._step(x, self._state)
        self._state, self._x = _mapped(state, torch.clone), x.clone()
        return y

    def _replayed(self, x: Tensor, held: Tensor, capture: Capture) -> Tensor:
        if (x.shape, x.dtype, x.device) != (held.shape, held.dtype, held.device):
            raise wrong("x", f"one like that of the first step, {describe(held)}", x)
        version = [one.cache.pool_version for one in _each(self._state) if one.cache is not None]
        if self._replay is None or version != self._version:
            self._replay, self._version = self._captured(held, capture), version
        else:
            self._state = _with_caches(self._state, lambda cache: cache.replayed())
        held.copy_(x)
        self._replay()
        assert self._y is not None
        return self._y.clone()

    def _captured(self, held: Tensor, capture: Capture) -> Callable[[], None]:
        """Captures a step. The host counts it as any other, and the device has not run it."""
        before = self._state

        def step() -> None:
            self._y, after = self._step(held, before)
            for old, new in zip(_tensors(before), _tensors(after), strict=True):
                old.copy_(new)
            # the tensors stay, the handles of the caches go on
            caches = iter([one.cache for one in _each(after) if one.cache is not None])
            self._state = _with_caches(before, lambda _: next(caches))

        try:
            return capture(step)
        except BaseException:
            self._replay = None
            self._state = _with_caches(before, lambda cache: cache.uncounted())
            raise


def capture_on(device: torch.device) -> Capture | None:
    """How a step is captured on a device; None: it is run as usual every time."""
    return functools.partial(_cuda_graph, device) if device.type == "cuda" else None


def _cuda_graph(device: torch.device, step: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    # the stream of a capture is one of the current device
    with torch.cuda.device(device), torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


def _each(state: States) -> list[HAMState]:
    return [state] if isinstance(state, HAMState) else state


def _changed(state: States, change: Callable[[HAMState], HAMState]) -> States:
    return change(state) if isinstance(state, HAMState) else [change(one) for one in state]


def _mapped(state: States, change: Callable[[Tensor], Tensor]) -> States:
    """The state with every tensor outside of the cache changed."""

    def mapped(one: HAMState) -> HAMState:
        position, memory, attention, ledger = tree_map(change, one.trees)
        return one._replace(position=position, memory=memory, attention=attention, ledger=ledger)

    return _changed(state, mapped)


def _with_caches(state: States, change: Callable[[KVCache], KVCache]) -> States:
    """The state with every cache changed."""
    return _changed(
        state, lambda one: one if one.cache is None else one._replace(cache=change(one.cache))
    )


def _tensors(state: States) -> list[Tensor]:
    return [tensor for one in _each(state) for tensor in leaves(one.trees)]
