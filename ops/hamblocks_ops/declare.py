"""One declaration per op: its call, `explain`, `unchecked` and the choice of an implementation.

An op is a function with its real signature and docstring, decorated with `op` or, where there is a
choice of implementations, with `op_with_choice`:

    @op_with_choice(
        Implementation("triton", _run_triton, refuses=_refused, passed_over=interpreted, opaque=True),
        Implementation("reference", reference.run),
        finish=lambda _call, score: score,
        hints=Hints(differentiable=True),
        example=lambda x: ((x, x), {}),
    )
    def surprise(residual: Tensor, v: Tensor, *, metric="cosine", impl="auto") -> Tensor:
        '''What callers read.'''
        return surprise.request(SurpriseCall(residual, v, metric), impl)

    @surprise.check
    def _check_surprise(residual, v, *, metric="cosine", impl="auto") -> None:
        check_tensor("v", v, "[B, T, H, V]", [None] * 4)

The body only normalises its arguments into a call object, a NamedTuple. Every argument check stands
in the function that `check` registers, so `unchecked` can leave them out. The parameters of both
are compared by mypy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, ParamSpec, TypeVar, cast

import torch

from hamblocks_ops.context import CHECKED, CHOICES, Choice
from hamblocks_ops.dispatch import (
    Explanation,
    Implementation,
    UnsupportedError,
    explain_table,
    pick,
)

P = ParamSpec("P")
R = TypeVar("R")
Raw = TypeVar("Raw")
Call = TypeVar("Call", bound=tuple[Any, ...])

Example = Callable[[torch.Tensor], tuple[tuple[Any, ...], dict[str, Any]] | None]
"""Makes the arguments of one plausible call out of x `[1, T, 2, 64]`; None if no such call exists,
for example because x requires grad and the op has no gradient."""

Holds = Literal[True] | str
"""True, or the reason why a property does not hold."""


@dataclass(frozen=True)
class Hints:
    """What hamblocks.testing has to know of an op and cannot see in its signature.

    Attributes:
        differentiable: whether the op promises gradients for its floating-point tensors.
        causal: results before position t depend on nothing from t on; or the reason why not.
        packs: the op takes `cu_seqlens`; or the reason why not.
        traced: torch.compile(fullgraph=True) traces the op; or the reason why not.
        attends: whether the op reads keys, some of which a query may not see.
        scores_residual: whether the op returns a score of its residual for each `metric`.
        by_token: names of arguments with tokens in their second dimension.
        streams: the argument that takes a state, and the result that hands it on.
        by_sequence: names of results with sequences, not tokens, in their first dimension.
        lists: names of results with stored tokens, not all tokens, in a dimension.
        threshold: name of the argument that a score has to reach.
    """

    differentiable: bool = False
    causal: Holds = True
    packs: Holds = True
    traced: Holds = True
    attends: bool = False
    scores_residual: bool = False
    by_token: tuple[str, ...] = ()
    streams: tuple[str, str] | None = None
    by_sequence: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    threshold: str | None = None


class Op(Generic[P, R]):
    """A public function of this package: checks its arguments, then runs its body.

    An instance stands in the place of the function that it was declared with: it has its name,
    module, signature and docstring, is pickled by name, and is traced by torch.compile.

    Attributes:
        hints: what checks of the op have to know.
    """

    __name__: str
    __qualname__: str

    def __init__(self, body: Callable[P, R], hints: Hints) -> None:
        functools.update_wrapper(self, body)
        self.hints = hints
        self._body = body
        self._check: Callable[P, None] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the op.

        Raises:
            ValueError: a bad argument; the message names it, what was expected and what came.
        """
        # while tracing, a check costs nothing at run time, and a context variable would be a guard
        if self._check is not None and (torch.compiler.is_compiling() or not CHECKED.get()):
            self._check(*args, **kwargs)
        return self.unchecked(*args, **kwargs)

    def unchecked(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the same call without any argument check, for callers that have already checked.

        A bad argument is then undefined behaviour: an error of torch, or a wrong result.
        """
        return self._body(*args, **kwargs)

    def check(self, function: Callable[P, None]) -> Callable[P, None]:
        """Registers the argument checks, a function with the parameters of the op; a decorator."""
        self._check = function
        return function

    @property
    def implementations(self) -> tuple[str, ...]:
        """Names that `impl` takes, in the order in which "auto" tries them.

        Empty where there is no choice.
        """
        return ()

    def __repr__(self) -> str:
        return f"<op {self.__name__}>"

    def __reduce__(self) -> str:
        # a string makes pickle and copy look the op up by name, as they do for a function
        return self.__qualname__


class _Request(NamedTuple):
    """What the body of an op with a choice returns: the call and the implementation asked for."""

    call: tuple[Any, ...]
    impl: str


class OpWithChoice(Op[P, R], Generic[P, R, Call]):
    """An op that several implementations can run; its argument `impl` names one or is "auto".

    Attributes:
        table: the implementations in the order in which "auto" tries them.
        example: makes a call for `hamblocks info`, which explains the choice.
    """

    def __init__(
        self,
        body: Callable[P, R],
        hints: Hints,
        table: tuple[Implementation[Call, Any], ...],
        finish: Callable[[Call, Any], R],
        example: Example,
    ) -> None:
        super().__init__(body, hints)
        self.table = table
        self.example = example
        self._finish = finish

    def request(self, call: Call, impl: str) -> R:
        """What the body returns: `__call__` makes the result of it, `explain` reads the call.

        The annotated type is that of the result, because the annotation of the body is what callers
        read.
        """
        return cast("R", _Request(call, impl))

    def unchecked(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the same call without any argument check, for callers that have already checked.

        A bad argument is then undefined behaviour: an error of torch, or a wrong result.

        Raises:
            ValueError: `impl` is not the name of an implementation.
            UnsupportedError: `impl` cannot run this call.
        """
        call, impl = cast("_Request", self._body(*args, **kwargs))
        choices = None if torch.compiler.is_compiling() else CHOICES.get()
        if choices is not None:
            explanation = explain_table(self.table, cast("Call", call))
            choices.append(Choice(self.__name__, impl, explanation))
        run = pick(self.__name__, self.table, impl, cast("Call", call))
        device = call[0].device.type
        # the dtypes of the inputs decide, also under autocast; entering the context costs more
        # than asking. A device such as "meta" has no autocast, and to ask for its state is an
        # error.
        on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if not on:
            return self._finish(cast("Call", call), run(cast("Call", call)))
        with torch.autocast(device_type=device, enabled=False):
            return self._finish(cast("Call", call), run(cast("Call", call)))

    def call_of(self, *args: P.args, **kwargs: P.kwargs) -> Call:
        """The call object that an implementation is given for these arguments.

        Raises:
            ValueError: a bad argument, as of the op itself.
        """
        if self._check is not None:
            self._check(*args, **kwargs)
        return cast("Call", cast("_Request", self._body(*args, **kwargs)).call)

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> Explanation:
        """Every implementation with "yes", or why it cannot run this call; nothing is computed.

        Raises:
            ValueError: a bad argument, as of the op itself.
        """
        return explain_table(self.table, self.call_of(*args, **kwargs))

    @property
    def implementations(self) -> tuple[str, ...]:
        """Names that `impl` takes, in the order in which "auto" tries them."""
        return tuple(row.name for row in self.table)


def without_second_derivative(name: str, backward: Any) -> None:
    """Registers the gradient of a backward operator: an error that names what has one.

    Args:
        name: op and implementation, for the message.
        backward: the operator of the backward pass.
    """

    def refuse(*_: object) -> None:
        raise UnsupportedError(
            f"{name} has no second derivatives; impl='reference' has all (the parts of a layer "
            "take it as an argument)"
        )

    backward.register_autograd(refuse)


def op(hints: Hints) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declares an op whose body computes the result; there is nothing to choose from."""
    return lambda body: Op(body, hints)


def op_with_choice(
    *table: Implementation[Call, Raw],
    finish: Callable[[Call, Raw], R],
    hints: Hints,
    example: Example,
) -> Callable[[Callable[P, R]], OpWithChoice[P, R, Call]]:
    """Declares an op whose body returns `request(call, impl)`.

    Args:
        table: the implementations, in the order in which "auto" tries them.
        finish: makes the result of what any implementation returns: rounds to the dtype of the
            inputs, names fields.
        hints: what checks of the op have to know.
        example: makes the arguments of one plausible call.
    """
    return lambda body: OpWithChoice(body, hints, table, finish, example)
