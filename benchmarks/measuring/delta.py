"""The gated delta rule with its score, and with its residual written out, against fla's public function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from hamblocks.ops import explain, gated_delta_rule
from measuring import floors
from measuring.checks import GRADIENT, OUT, WrongResultError, error, within
from measuring.clock import Clock, Contender, NotHereError, race
from measuring.sizes import Sizes
from measuring.targets import FORWARD, TRAINING

NAMES = ("q", "k", "v", "beta", "g")
CASES = {
    "score": {"metric": "cosine", "output_residual": False},
    "residual": {"output_residual": True},
}


def shapes(sizes: Sizes) -> tuple[int, ...]:
    return sizes.op_tokens


def ours(inputs: list[Tensor], impl: str, **options: Any) -> Any:
    q, k, v, beta, g = inputs
    return gated_delta_rule(q, k, v, beta=beta, g=g, impl=impl, **options)


def theirs(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Fla's public function: out and final state, as our op returns them too."""
    if inputs[0].device.type != "cuda":
        raise NotHereError("fla's kernels need a GPU")
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v, beta, g = inputs
    result: tuple[Tensor, Tensor] = chunk_gated_delta_rule(
        q, k, v, g, beta, output_final_state=True
    )
    return result


class Trusted:
    """Results by plain torch in wider floats, and the bits and gradients of fla's function where it runs."""

    def __init__(self, inputs: list[Tensor], cotangent: Tensor) -> None:
        self.inputs, self.cotangent = inputs, cotangent
        self.gpu = cotangent.is_cuda
        # token by token would take minutes at 65536 tokens
        self.impl, self.dtype = (
            ("chunked", torch.float32) if self.gpu else ("reference", torch.float64)
        )
        with torch.no_grad():
            self.exact = ours(
                [x.to(self.dtype) for x in inputs], self.impl, metric="cosine"
            )._asdict()

    def check(
        self, run: Callable[[list[Tensor]], dict[str, Tensor]], learns: bool
    ) -> dict[str, Any]:
        """Bits of out and final state, errors of all results, and with `learns` of the gradients."""
        inputs = [x.detach().requires_grad_(learns) for x in self.inputs]
        with torch.set_grad_enabled(learns):
            results = run(inputs)
        errors = {name: error(x, self.exact[name]) for name, x in results.items()}
        # where the memory predicts next to nothing, as at the first token, the angle of that is made of roundings
        allowed = {name: 2 * GRADIENT if name == "score" else GRADIENT for name in errors}
        checked = within(f"{self.impl} in {self.dtype}", errors, allowed)
        if self.gpu:
            with torch.no_grad():
                out, state = theirs(self.inputs)
            for name, bits in (("out", out), ("final_state", state)):
                if not torch.equal(results[name], bits):
                    raise WrongResultError(f"{name}: other bits than fla's")
            checked["same bits as fla's"] = ["out", "final_state"]
        if learns:
            got = torch.autograd.grad(results["out"], inputs, self.cotangent)
            checked["gradients"] = self._gradients(got)
        return checked

    def _gradients(self, got: tuple[Tensor, ...]) -> dict[str, Any]:
        inputs = [
            (x if self.gpu else x.to(self.dtype)).detach().requires_grad_() for x in self.inputs
        ]
        with torch.enable_grad():
            out = theirs(inputs)[0] if self.gpu else ours(inputs, self.impl).out
        exact = torch.autograd.grad(out, inputs, self.cotangent.to(out.dtype))
        errors = {name: error(a, b) for name, a, b in zip(NAMES, got, exact, strict=True)}
        against = "fla's" if self.gpu else f"{self.impl} in {self.dtype}"
        checked = within(f"gradients of {against}", errors, dict.fromkeys(errors, OUT))
        return checked | {
            "same bits": [n for n, a, b in zip(NAMES, got, exact, strict=True) if torch.equal(a, b)]
        }


def rows(
    tokens: int, sizes: Sizes, clock: Clock, ceilings: floors.Ceilings
) -> Iterator[dict[str, Any]]:
    shape = 1, tokens, sizes.heads, sizes.head_dim
    q, k, v, cotangent = (torch.randn(shape, device=sizes.device) for _ in range(4))
    q, k, v, cotangent = (
        x.to(sizes.dtype) for x in (normalize(q, dim=-1), normalize(k, dim=-1), v, cotangent)
    )
    beta, g = (
        1 - torch.rand(shape[:3], device=sizes.device),
        logsigmoid(torch.randn(shape[:3], device=sizes.device) + 4),
    )
    inputs = [q, k, v, beta, g]
    chosen = explain(gated_delta_rule, q, k, v, beta=beta, g=g).chosen
    impl = "fla" if sizes.gpu else chosen
    trusted = Trusted(inputs, cotangent)
    for which in (FORWARD, TRAINING):
        learns = which == TRAINING

        def contender(
            case: str, run: Callable[[list[Tensor]], dict[str, Tensor]], learns: bool = learns
        ) -> Contender:
            def call() -> object:
                given = [x.detach().requires_grad_(learns) for x in inputs]
                with torch.set_grad_enabled(learns):
                    out = run(given)["out"]
                return torch.autograd.grad(out, given, cotangent) if learns else out

            work = floors.delta_rule(
                *shape[1:],
                item=q.element_size(),
                residual=case == "residual",
                score=case == "score",
                learns=learns,
            )
            by = "fla's public function" if case.startswith("fla") else impl
            return Contender(
                {"case": case, "impl": by}, call, lambda: trusted.check(run, learns), work
            )

        def of_ours(case: str) -> Callable[[list[Tensor]], dict[str, Tensor]]:
            def run(given: list[Tensor]) -> dict[str, Tensor]:
                results = ours(given, impl, **CASES[case])._asdict()
                return {name: x for name, x in results.items() if x is not None}

            return run

        def of_fla(given: list[Tensor]) -> dict[str, Tensor]:
            return dict(zip(("out", "final_state"), theirs(given), strict=True))

        # fla's twice: how far apart the same call comes out
        contenders = [contender("fla", of_fla), *(contender(case, of_ours(case)) for case in CASES)]
        contenders.append(contender("fla once more", of_fla))
        yield from race(
            contenders, clock, ceilings, {"part": "delta", "tokens": tokens, "pass": which}
        )
