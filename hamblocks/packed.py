"""Runs functions that do not support packed batches over packed batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from hamblocks.state import leaves, tree_map
from hamblocks_ops.arguments import check_cu_seqlens, wrong

Outputs = TypeVar("Outputs")
State = TypeVar("State")


def per_sequence(
    run: Callable[..., tuple[Outputs, State]],
    *tensors: Tensor,
    cu_seqlens: Tensor | None = None,
    state: State | None = None,
) -> tuple[Outputs, State]:
    """Runs a function of unpacked sequences over a batch, which may be packed.

    With it, a custom memory supports `cu_seqlens` and `state` in one line:

        (read, residual), state = per_sequence(run, q, k, v, cu_seqlens=cu_seqlens, state=state)

    Without `cu_seqlens` this is `run(*tensors, state)`, called once for the whole batch. With
    `cu_seqlens` the sequences run one by one, which costs one call per sequence.

    `run` always gets at least one token. An empty sequence keeps its state, or gets a state of
    zeros if it is fresh. If the whole batch has no tokens, `run` is called once on a single token
    of zeros, without gradients and without a state. Only the shapes and dtypes of its results are
    used, for the empty outputs and the states of zeros.

    Args:
        run: `run(*tensors, state) -> (outputs, state)`. It gets tensors `[B, T, ...]` with B and T
            at least 1, and a state with B sequences, or None for fresh sequences. Outputs are a
            tensor `[B, T, ...]` or a tree (tuples, lists, dicts) of them; the state is a tree of
            tensors `[B, ...]`.
        *tensors: `[B, T, ...]`, or `[1, sum(T), ...]` with `cu_seqlens`; any dtypes, one device.
        cu_seqlens: int32 `[N+1]`, borders of the packed sequences; None for a batch of N = B.
        state: what the last call returned, a tree of tensors `[N, ...]`; None for fresh sequences.

    Returns:
        The outputs with the `[B, T]` of `tensors`, and the state, a tree of tensors `[N, ...]`.

    Raises:
        ValueError: `tensors` differ in `[B, T]`, `cu_seqlens` do not fit them, `state` has another
            number of sequences, or `run` does not return what is stated above.
    """
    rows, tokens = _check_tensors(tensors)
    if cu_seqlens is None:
        _check_state(state, rows)
        if rows and tokens:
            return _call(run, tensors, state)
        return _without_tokens(run, tensors, state, rows)
    check_cu_seqlens(cu_seqlens, rows, tokens, tensors[0])
    _check_state(state, cu_seqlens.shape[0] - 1)
    if not tokens:
        return _without_tokens(run, tensors, state, cu_seqlens.shape[0] - 1)
    return _one_by_one(run, tensors, state, cu_seqlens.diff().tolist())


def _one_by_one(
    run: Callable[..., tuple[Outputs, State]],
    tensors: Sequence[Tensor],
    state: State | None,
    lengths: list[int],
) -> tuple[Outputs, State]:
    """Runs packed sequences one by one; at least one of them has a token."""
    outputs: list[Outputs] = []
    states: list[State | None] = []
    for n, pieces in enumerate(zip(*(x.split(lengths, 1) for x in tensors), strict=True)):
        # slices keep the dimension: a state of one sequence is [1, ...]
        past = None if state is None else tree_map(lambda x, n=n: x[n : n + 1], state)
        if lengths[n]:
            out, past = _call(run, pieces, past)
            outputs.append(out)
        states.append(past)
    # the shapes of a fresh state are known only from a sequence that has run
    known = next((past for past in states if past is not None), None)
    filled = [tree_map(torch.zeros_like, known) if past is None else past for past in states]
    return _concatenated(outputs, 1), _concatenated(filled, 0)


def _without_tokens(
    run: Callable[..., tuple[Outputs, State]],
    tensors: Sequence[Tensor],
    state: State | None,
    sequences: int,
) -> tuple[Outputs, State]:
    """Empty outputs, and the given state or zeros. A call on a token of zeros gives the shapes."""
    with torch.no_grad():
        made_up = [x.new_zeros(1, 1, *x.shape[2:]) for x in tensors]
        outputs, fresh = _call(run, made_up, None)
    shape = tensors[0].shape[:2]
    empty: Outputs = tree_map(lambda x: x.new_zeros(*shape, *x.shape[2:]), outputs)
    if state is None:
        state = tree_map(lambda x: x.new_zeros(sequences, *x.shape[1:]), fresh)
    return empty, state


def _concatenated(trees: Sequence[Outputs], dim: int) -> Outputs:
    joined: Outputs = tree_map(lambda *parts: torch.cat(parts, dim), *trees)
    return joined


def _call(
    run: Callable[..., tuple[Outputs, State]], tensors: Sequence[Tensor], state: State | None
) -> tuple[Outputs, State]:
    """`run(*tensors, state)`, with its results checked."""
    result = run(*tensors, state)
    if not isinstance(result, tuple) or len(result) != 2:
        raise wrong("run", "a function that returns (outputs, state)", result)
    rows, tokens = tensors[0].shape[:2]
    for x in leaves(result[0]):
        if x.shape[:2] != (rows, tokens):
            raise wrong("run", f"outputs [B, T, ...] = [{rows}, {tokens}, ...]", x)
    for x in leaves(result[1]):
        if x.shape[:1] != (rows,):
            raise wrong("run", f"a state of tensors [B, ...] = [{rows}, ...]", x)
    return result


def _check_tensors(tensors: Sequence[Tensor]) -> tuple[int, int]:
    """B and T, which all tensors must share."""
    if not tensors:
        raise wrong("tensors", "at least one tensor [B, T, ...]", "none")
    for x in tensors:
        if not isinstance(x, Tensor) or x.dim() < 2:
            raise wrong("tensors", "tensors [B, T, ...]", x)
    rows, tokens = tensors[0].shape[:2]
    for x in tensors:
        if x.shape[:2] != (rows, tokens):
            raise wrong("tensors", f"[B, T, ...] = [{rows}, {tokens}, ...], as the first", x)
    return rows, tokens


def _check_state(state: object, sequences: int) -> None:
    for x in leaves(state):
        if x.shape[:1] != (sequences,):
            raise wrong("state", f"tensors [N, ...] = [{sequences}, ...]", x)
