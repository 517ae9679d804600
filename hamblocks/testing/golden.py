"""Golden files: the results of a part for seeded inputs, to compare a later version with."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hamblocks.protocols import LayerDims
from hamblocks.testing.budget import measured, unlike
from hamblocks.testing.check import Options
from hamblocks.testing.inputs.parts import DIMS, PartInputs
from hamblocks.testing.inputs.scores import ScorePieces, Scores
from hamblocks.testing.kinds.controllers import taus
from hamblocks.testing.kinds.selectors import ready, stream
from hamblocks.testing.ops import OpImplementation
from hamblocks.testing.subjects import (
    AttentionSubject,
    CombinerSubject,
    GateSubject,
    LayerSubject,
    MemorySubject,
    QueryGateSubject,
    Results,
    Subject,
    made,
)
from hamblocks.testing.suite import settled
from hamblocks_ops.arguments import wrong

SUBJECTS: dict[str, type[Subject]] = {
    "gate": GateSubject,
    "memory": MemorySubject,
    "attention": AttentionSubject,
    "combiner": CombinerSubject,
    "query_gate": QueryGateSubject,
    "layer": LayerSubject,
}
MAX_WEIGHTS = 20_000
"""Most weights in a golden file, which should be small enough for a repository."""
DIGITS = {torch.float64: 17, torch.float32: 9, torch.bfloat16: 5, torch.float16: 6}
"""Decimal digits that give back every number of a dtype exactly."""


@dataclass(frozen=True)
class Golden:
    """A golden file.

    Attributes:
        kind: kind of the part.
        target: the expression that makes it, `package.module:expression`.
        like: name of the op of `hamblocks.ops` that it implements; None for parts.
        impl: name of the implementation; None for parts.
        dims: sizes that it was run with.
        versions: versions of hamblocks and torch, for information.
        weights: weights of the part, by name.
        cases: for every case its inputs, its results, and how far rounding moves each result.
    """

    kind: str
    target: str
    like: str | None
    impl: str | None
    dims: LayerDims | None
    versions: dict[str, str]
    weights: dict[str, Any]
    cases: list[dict[str, Any]]

    @staticmethod
    def load(path: Path) -> Golden:
        """Reads a file.

        Raises:
            ValueError: it is not a golden file.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            dims = fields.pop("dims")
            return Golden(**fields, dims=None if dims is None else LayerDims(*dims))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise wrong(
                "against", f"a file that hamblocks record wrote ({error})", str(path)
            ) from error

    def save(self, path: Path) -> None:
        """Writes a file with one line per tensor, so that a diff shows which tensors changed."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        head = ",\n".join(
            f" {json.dumps(name)}: {json.dumps(x)}"
            for name, x in fields.items()
            if name not in ("weights", "cases")
        )
        weights = ",\n".join(
            f"  {json.dumps(name)}: {json.dumps(x)}" for name, x in self.weights.items()
        )
        cases = ",\n".join(
            f'  {{"inputs": {json.dumps(case["inputs"])},\n   "results": {{\n'
            + ",\n".join(
                f"    {json.dumps(name)}: {json.dumps(x)}" for name, x in case["results"].items()
            )
            + "}}"
            for case in self.cases
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'{{\n{head},\n "weights": {{\n{weights}}},\n "cases": [\n{cases}]\n}}\n',
            encoding="utf-8",
        )


def record(
    kind: str, part: Any, target: str, options: Options | None = None, *, seed: int = 0
) -> Golden:
    """Runs a part over seeded inputs, in every dtype that it computes in.

    Args:
        kind: kind of the part.
        part: the part, not built yet.
        target: the expression that makes it, which the file names.
        options: what it is run with.
        seed: seed of the weights and the inputs.

    Raises:
        ValueError: the part has more than 20,000 weights; choose smaller `dims`.
    """
    options = settled(kind, part, options or Options())
    dims = options.dims or DIMS[2]
    like = part.like.__name__ if isinstance(part, OpImplementation) else None
    impl = part.impl if isinstance(part, OpImplementation) else None
    weights = (
        {}
        if kind in ("op", "selector", "controller")
        else _weights_to_json(made(part, dims, torch.float64, seed))
    )
    if sum(len(x["values"]) for x in weights.values()) > MAX_WEIGHTS:
        expected = f"sizes with at most {MAX_WEIGHTS} weights, to keep the file small"
        raise wrong("dims", expected, str(tuple(dims)))
    cases = []
    for case in _cases(kind, part, dims, options, seed):

        def run(case: Any = case) -> Results:
            return _run(kind, part, case, weights)

        once = run()
        own = measured(once, run)
        results = {
            name: _tensor_to_json(x) | {"own": own.get(name, 0.0)} for name, x in once.items()
        }
        cases.append({"inputs": _inputs_to_json(case), "results": results})
    versions = {"hamblocks": importlib.metadata.version("hamblocks"), "torch": torch.__version__}
    return Golden(
        kind, target, like, impl, dims if kind in SUBJECTS else None, versions, weights, cases
    )


def differences(golden: Golden, part: Any) -> Iterator[str]:
    """The results of a part that differ from a file by more than rounding does, one line each."""
    for case in golden.cases:
        inputs = _inputs_from_json(case["inputs"])
        try:
            results = _run(golden.kind, part, inputs, golden.weights)
        except Exception as error:
            yield f"{inputs}: {type(error).__name__}: {error}"
            continue
        for name in sorted({*results, *case["results"]}):
            if name not in results or name not in case["results"]:
                yield f"{inputs}: {name} is " + ("new" if name in results else "gone")
                continue
            recorded = case["results"][name]
            own = float(recorded["own"])
            message = unlike(name, results[name], _tensor_from_json(recorded), own=own)
            if message:
                yield f"{inputs}: {message}"


def _cases(kind: str, part: Any, dims: LayerDims, options: Options, seed: int) -> Iterator[Any]:
    if kind == "selector":
        yield from (
            ScorePieces((14, 9), ((5, 2, 0), (6, 6, 0)), 2, kind, seed)
            for kind in ("ties", "normal", "mixed")
        )
    elif kind == "controller":
        yield from (Scores(40, 2, None, 2, kind, seed=seed) for kind in ("ties", "normal"))
    elif kind == "op":
        number = 0
        for case in part.op.edges:
            for dtype in part.op.dtypes if hasattr(case, "dtype") else (None,):
                one = dataclasses.replace(
                    case, seed=seed + number, **({} if dtype is None else {"dtype": dtype})
                )
                size = sum(x.numel() for x in one.tensors().values())
                if 0 < size <= 600:
                    number += 1
                    yield one
    else:
        # in a lower dtype a score within rounding of tau may fall on its other side
        for dtype in options.dtypes[:1] if kind == "layer" else options.dtypes:
            yield PartInputs(dims=dims, batch=1, tokens=5, dtype=dtype, bias=True, seed=seed)


def _run(kind: str, part: Any, case: Any, weights: dict[str, Any]) -> Results:
    if kind == "selector":
        selector = ready(part)
        steps = [step.selection.evict_at for step in stream(selector, case)]
        return {"evict_at": selector(case.score).evict_at} | {
            f"evict_at of piece {i}": x for i, x in enumerate(steps)
        }
    if kind == "controller":
        return taus(part, case)
    if kind == "op":
        results: Results = part.problem(case).run("it")
        return results
    subject = SUBJECTS[kind](part, case)
    own = dict(subject.part.named_parameters()) if isinstance(subject.part, nn.Module) else {}
    if own.keys() != weights.keys():
        raise ValueError(f"weights: expected {sorted(weights)}, got {sorted(own)}")
    with torch.no_grad():
        for name, x in own.items():
            kept = _tensor_from_json(weights[name])
            if kept.shape != x.shape:
                raise ValueError(
                    f"weight {name}: expected shape {list(kept.shape)}, got {list(x.shape)}"
                )
            x.copy_(kept)
        return subject.run(subject.inputs)[0]


def _weights_to_json(part: Any) -> dict[str, Any]:
    named = part.named_parameters() if isinstance(part, nn.Module) else ()
    return {name: _tensor_to_json(x.detach().float()) for name, x in named}


def _tensor_to_json(x: Tensor) -> dict[str, Any]:
    digits = DIGITS.get(x.dtype)

    def number(value: Any) -> Any:
        if digits is None:
            return value
        return float(f"{value:.{digits}g}") if math.isfinite(value) else str(value)

    values = [number(value) for value in x.flatten().tolist()]
    return {"dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape), "values": values}


def _tensor_from_json(fields: dict[str, Any]) -> Tensor:
    # JSON has no infinities and no NaN, so they are strings
    values = [float(x) if isinstance(x, str) else x for x in fields["values"]]
    return torch.tensor(values, dtype=getattr(torch, fields["dtype"])).view(fields["shape"])


def _inputs_to_json(case: Any) -> dict[str, Any]:
    """The class of a case and those of its fields that differ from the defaults."""
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    defaults = {field.name: field.default for field in dataclasses.fields(case)}
    kept = {name: x for name, x in fields.items() if x != defaults[name]}
    plain = {
        name: str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else x
        for name, x in kept.items()
    }
    return {"class": type(case).__name__} | plain


def _inputs_from_json(written: dict[str, Any]) -> Any:
    fields = {name: _tuples(x) for name, x in written.items() if name != "class"}
    if "dtype" in fields:
        fields["dtype"] = getattr(torch, fields["dtype"])
    if "dims" in fields:
        fields["dims"] = LayerDims(*fields["dims"])
    return getattr(import_module("hamblocks.testing"), written["class"])(**fields)


def _tuples(x: Any) -> Any:
    return tuple(_tuples(one) for one in x) if isinstance(x, list) else x
