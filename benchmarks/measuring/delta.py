"""The gated delta rule with its score, and with its residual, against fla's public function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from hamblocks.ops import explain, gated_delta_rule
from measuring import estimates, floors
from measuring.checks import (
    MAX_GRADIENT_ERROR,
    MAX_OUT_ERROR,
    WrongResultError,
    error,
    within,
)
from measuring.clock import Clock, Contender, NotHereError, race
from measuring.sizes import Sizes
from measuring.targets import FORWARD, TRAINING

INPUTS = ("q", "k", "v", "beta", "g")
Run = Callable[[list[Tensor]], dict[str, Tensor]]
"""Inputs in the order of `INPUTS` -> results by name."""
OURS: dict[str, dict[str, Any]] = {
    "score": {"metric": "cosine", "output_residual": False},
    "residual": {"output_residual": True},
}


def shapes(sizes: Sizes) -> tuple[int, ...]:
    """Sequence lengths that are measured."""
    return sizes.op_tokens


def ours(inputs: list[Tensor], impl: str, **options: Any) -> Any:
    """Our op by one implementation."""
    q, k, v, beta, g = inputs
    return gated_delta_rule(q, k, v, beta=beta, g=g, impl=impl, **options)


def theirs(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Out and final state by fla's public function."""
    if inputs[0].device.type != "cuda":
        raise NotHereError("fla's kernels need a GPU")
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v, beta, g = inputs
    result: tuple[Tensor, Tensor] = chunk_gated_delta_rule(
        q, k, v, g, beta, output_final_state=True
    )
    return result


class Trusted:
    """What results are compared with.

    Plain torch in a wider dtype, and on a GPU also fla's function, for bits and gradients.
    """

    def __init__(self, inputs: list[Tensor], cotangent: Tensor) -> None:
        self.inputs, self.cotangent = inputs, cotangent
        self.gpu = cotangent.is_cuda
        # on a GPU: token by token would take minutes at 65536 tokens
        self.impl, self.dtype = (
            ("chunked", torch.float32) if self.gpu else ("reference", torch.float64)
        )
        with torch.no_grad():
            self.exact = ours(
                [x.to(self.dtype) for x in inputs], self.impl, metric="cosine"
            )._asdict()

    def check(self, run: Run, learns: bool) -> dict[str, Any]:
        """Compares all results, the bits of out and final state, and with `learns` the gradients.

        Raises:
            WrongResultError: one of them is wrong.
        """
        inputs = [x.detach().requires_grad_(learns) for x in self.inputs]
        with torch.set_grad_enabled(learns):
            results = run(inputs)
        errors = {name: error(x, self.exact[name]) for name, x in results.items()}
        # the cosine of a prediction near zero, as at the first token, consists of roundings
        allowed = {name: MAX_GRADIENT_ERROR * (2 if name == "score" else 1) for name in errors}
        checked = within(f"{self.impl} in {self.dtype}", errors, allowed)
        if self.gpu:
            checked["same bits as fla's"] = self._same_bits(results)
        if learns:
            got = torch.autograd.grad(results["out"], inputs, self.cotangent)
            checked["gradients"] = self._gradients(got)
        return checked

    def _same_bits(self, results: dict[str, Tensor]) -> list[str]:
        """Names of the results that must have the bits of fla's."""
        with torch.no_grad():
            out, state = theirs(self.inputs)
        for name, bits in (("out", out), ("final_state", state)):
            if not torch.equal(results[name], bits):
                raise WrongResultError(f"{name}: other bits than fla's")
        return ["out", "final_state"]

    def _gradients(self, got: tuple[Tensor, ...]) -> dict[str, Any]:
        inputs = [
            (x if self.gpu else x.to(self.dtype)).detach().requires_grad_() for x in self.inputs
        ]
        with torch.enable_grad():
            out = theirs(inputs)[0] if self.gpu else ours(inputs, self.impl).out
        exact = torch.autograd.grad(out, inputs, self.cotangent.to(out.dtype))
        pairs = list(zip(INPUTS, got, exact, strict=True))
        errors = {name: error(a, b) for name, a, b in pairs}
        against = "fla's" if self.gpu else f"{self.impl} in {self.dtype}"
        allowed = dict.fromkeys(errors, MAX_OUT_ERROR)
        checked = within(f"gradients of {against}", errors, allowed)
        return checked | {"same bits": [name for name, a, b in pairs if torch.equal(a, b)]}


def drawn(tokens: int, sizes: Sizes) -> tuple[list[Tensor], Tensor]:
    """Inputs in the order of `INPUTS`, and a gradient of out."""
    shape = 1, tokens, sizes.heads, sizes.head_dim
    q, k, v, cotangent = (torch.randn(shape, device=sizes.device) for _ in range(4))
    wide = normalize(q, dim=-1), normalize(k, dim=-1), v, cotangent
    q, k, v, cotangent = (x.to(sizes.dtype) for x in wide)
    # in (0, 1], because fla's kernels divide by beta
    beta = 1 - torch.rand(shape[:3], device=sizes.device)
    g = logsigmoid(torch.randn(shape[:3], device=sizes.device) + 4)
    return [q, k, v, beta, g], cotangent


def run_ours(case: str, impl: str) -> Run:
    """Our op in one of the cases of `OURS`."""

    def run(inputs: list[Tensor]) -> dict[str, Tensor]:
        results = ours(inputs, impl, **OURS[case])._asdict()
        return {name: x for name, x in results.items() if x is not None}

    return run


def run_theirs(inputs: list[Tensor]) -> dict[str, Tensor]:
    """fla's public function."""
    return dict(zip(("out", "final_state"), theirs(inputs), strict=True))


def measure(
    tokens: int, sizes: Sizes, clock: Clock, ceilings: floors.Ceilings
) -> Iterator[dict[str, Any]]:
    """Measurements of our op and of fla's, forward alone and forward with backward."""
    inputs, cotangent = drawn(tokens, sizes)
    q, k, v, beta, g = inputs
    impl = "fla" if sizes.gpu else explain(gated_delta_rule, q, k, v, beta=beta, g=g).chosen
    trusted = Trusted(inputs, cotangent)

    def contender(case: str, run: Run, learns: bool) -> Contender:
        def call() -> object:
            given = [x.detach().requires_grad_(learns) for x in inputs]
            with torch.set_grad_enabled(learns):
                out = run(given)["out"]
            return torch.autograd.grad(out, given, cotangent) if learns else out

        returned = {"residual": case == "residual", "score": case == "score"}
        work = floors.delta_rule(*q.shape[1:], item=q.element_size(), learns=learns, **returned)
        names = {"case": case, "impl": impl if case in OURS else "fla's public function"}
        estimate = clock.chip and estimates.delta_rule(
            clock.chip, *q.shape[1:], item=q.element_size(), learns=learns, **returned
        )
        return Contender(names, call, lambda: trusted.check(run, learns), work, estimate)

    # fla's takes part twice, which shows how much the times of the same call differ
    runs = {"fla": run_theirs} | {case: run_ours(case, impl) for case in OURS}
    runs["fla once more"] = run_theirs
    for which in (FORWARD, TRAINING):
        contenders = [contender(case, run, which == TRAINING) for case, run in runs.items()]
        common = {"part": "delta", "tokens": tokens, "pass": which}
        yield from race(contenders, clock, ceilings, common)
