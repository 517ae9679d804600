"""What laws are made of: running a subject with gradients, and comparing two ways to run it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from hamblocks.testing.budget import assert_bits
from hamblocks.testing.check import plain
from hamblocks.testing.inputs.draw import Draw
from hamblocks.testing.subjects import Results, Subject
from hamblocks.testing.uninitialised import FilledMemory


def head(results: Mapping[str, Tensor], t: int) -> Results:
    """Results of the tokens before `t`, as far as queries before `t` can see them.

    A lifetime that ends at `t` or later is cut to `t`: no query before `t` can tell such lifetimes
    apart.
    """
    return {
        name: x[:, :t].clamp(max=t) if name == "evict_at" else x[:, :t]
        for name, x in results.items()
    }


def by_token(inputs: Mapping[str, Tensor], where: slice) -> dict[str, Tensor]:
    """The inputs `[B, T, ...]` of some of the tokens."""
    return {name: x[:, where] for name, x in inputs.items()}


def gradients_named(results: Results, gradients: Mapping[str, Tensor]) -> Results:
    """Results and gradients in one mapping; the gradient of `x` is named "grad of x"."""
    return results | {f"grad of {name}": x for name, x in gradients.items()}


def differentiated(
    subject: Subject,
    inputs: Mapping[str, Tensor],
    *,
    parts: Sequence[tuple[slice, slice]] = ((slice(None), slice(None)),),
    cu_seqlens: Tensor | None = None,
    weights: bool = False,
) -> tuple[Results, dict[str, Tensor]]:
    """Runs a subject forward and backward.

    The gradient is that of a weighted sum of the results. Each of `parts` gets the weights that a
    separate run of it would get, so that gradients of one batch and of its pieces can be compared.

    Args:
        subject: the part and how it is called.
        inputs: `[B, T, ...]` by name.
        parts: batch rows and tokens of the results that enter the sum.
        cu_seqlens: int32 `[N+1]`, borders of packed sequences.
        weights: differentiate with respect to the part's parameters too.

    Returns:
        The detached results, and the gradients by name; 0 for inputs without influence.
    """
    given = {
        name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()
    }
    results, _ = subject.run(given, cu_seqlens=cu_seqlens)
    wanted = {name: x for name, x in given.items() if x.requires_grad}
    if weights and isinstance(subject.part, nn.Module):
        wanted |= {name: x for name, x in subject.part.named_parameters() if x.requires_grad}
    roots = [x[part] for part in parts for x in results.values() if x.requires_grad]
    gradients: Sequence[Tensor | None] = [None] * len(wanted)
    if roots:
        # each root draws from the same seed: that is what a run of it alone draws as well
        cotangents = [Draw(7).normal(*x.shape).to(x.dtype) for x in roots]
        gradients = torch.autograd.grad(roots, list(wanted.values()), cotangents, allow_unused=True)
    filled = [
        torch.zeros_like(x) if grad is None else grad
        for x, grad in zip(wanted.values(), gradients, strict=True)
    ]
    return {name: x.detach() for name, x in results.items()}, dict(zip(wanted, filled, strict=True))


@contextmanager
def compiled(part: Any) -> Iterator[Any]:
    """Yields `part` under `torch.compile(fullgraph=True)`, without a backend's code generator.

    The traced graph is decomposed and partitioned as for inductor and then run op by op in eager
    mode. This tests what is compiled, and leaves out the minutes of generating code for it.
    """
    torch.compiler.reset()
    try:
        with warnings.catch_warnings():  # dynamo looks at `.grad` of inputs that are no leaves
            warnings.filterwarnings("ignore", message=r"The \.grad attribute", category=UserWarning)
            yield torch.compile(part, fullgraph=True, backend="aot_eager_decomp_partition")
    finally:
        torch.compiler.reset()


def assert_twice(run: Callable[[], Results]) -> None:
    """Asserts that `run` gives the same bits twice, under two random states.

    Raises:
        AssertionError: it does not; the message names the first result that differs.
    """
    results = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.manual_seed(seed)
            results.append(run())
    with prefixed("the same call gave two results"):
        assert_bits(*results)


def assert_reads_what_was_written(run: Callable[[], Results]) -> None:
    """Asserts that `run` gives the same bits whatever `torch.empty` returns.

    Raises:
        AssertionError: it does not; the message names the first result that differs.
    """
    filled = []
    for value in (0.0, float("nan"), 3.0):
        with FilledMemory(value):
            filled.append(run())
    with prefixed("the result depends on uninitialised memory"):
        for other in filled[1:]:
            assert_bits(other, filled[0])


@contextmanager
def unchanged(given: Mapping[str, Tensor]) -> Iterator[None]:
    """Asserts that the body changes none of these tensors.

    Raises:
        AssertionError: a tensor changed; the message names it.
    """
    before = {name: x.clone() for name, x in given.items()}
    yield
    with prefixed("a call changed what it was given"):
        assert_bits(given, before)


def reload(module: nn.Module, other: nn.Module) -> None:
    """Loads the state dict of `module` into `other`, through a serialised file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))


def assert_never_longer(kept: Sequence[Tensor]) -> None:
    """Asserts that no lifetime grows; `kept` are lifetimes at ascending thresholds.

    Raises:
        AssertionError: a lifetime grew.
    """
    for low, high in pairwise(kept):
        assert bool((high <= low).all()), "a lifetime became longer as tau was raised"


@contextmanager
def prefixed(what: str) -> Iterator[None]:
    """Puts `what` in front of the message of a failed assertion or gradient check.

    Raises:
        AssertionError: the body raised an AssertionError or a GradcheckError.
    """
    try:
        yield
    except (AssertionError, GradcheckError) as error:
        raise AssertionError(f"{what}: {plain(error)}") from error
