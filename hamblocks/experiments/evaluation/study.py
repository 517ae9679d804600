"""The study: every policy at every fraction on the documents of every seed, resumable."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hamblocks.experiments.evaluation.documents import (
    Documents,
    documents_of,
    plain_text,
    sources_of,
)
from hamblocks.experiments.evaluation.measure import Measured, measure
from hamblocks.experiments.evaluation.policies import (
    AtQuantile,
    Plan,
    Policy,
    around,
    gate_of,
    shared_out,
)
from hamblocks.experiments.evaluation.subjects import Subject, set_parts, subject_of
from hamblocks.experiments.retrofit_text import for_alignment, held_out
from hamblocks.models.copying import copying_by_head
from hamblocks.models.fingerprint import fingerprint
from hamblocks.selectors import FirstTokens, Window
from hamblocks_ops.arguments import wrong

CALIBRATION_SEED = 1_000_003
"""Seed of the text that thresholds are set on; it comes from the half that alignment reads."""

FREE = ("policies", "fractions", "seeds")
"""Fields of a plan that a run may change when it goes on: rows that are there stay."""

Progress = Callable[[str, int, int, str], None]


@dataclass
class Row:
    """One policy at one fraction on the documents of one seed.

    Attributes:
        fraction: asked for; None for a policy that is the same at all fractions.
    """

    policy: str
    fraction: float | None
    seed: int
    measured: Measured


@dataclass
class Results:
    """All rows, the plan, and what was measured of the heads.

    Attributes:
        about: model, versions, machine.
        copying: `[layers, Hkv]`, how much each head copies; empty if no policy asks.
        seconds: of all runs together.
    """

    plan: Plan
    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    copying: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0

    def find(self, policy: str, fraction: float | None, seed: int) -> Row | None:
        """A row, or None if it was not measured yet."""
        key = policy, fraction, seed
        return next((r for r in self.rows if (r.policy, r.fraction, r.seed) == key), None)

    def seeds_of(self, policy: str, fraction: float | None) -> list[Row]:
        """The rows of one policy at one fraction, a seed after the other."""
        rows = (self.find(policy, fraction, seed) for seed in self.plan.seeds)
        return [row for row in rows if row is not None]

    def to_json(self) -> dict[str, Any]:
        """Lists, dicts, numbers and strings."""
        rows = [{**vars(row), "measured": row.measured.to_json()} for row in self.rows]
        own = {"plan": self.plan.to_json(), "rows": rows}
        return {"about": self.about, "seconds": self.seconds, "copying": self.copying, **own}

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Results:
        """From what `to_json` gave."""
        rows = [Row(**{**row, "measured": Measured.of(row["measured"])}) for row in saved["rows"]]
        plan = Plan.of(saved["plan"])
        return cls(plan, saved["about"], rows, saved["copying"], saved["seconds"])


def about(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """The model and the machine, for the results."""
    import transformers

    weight = next(model.parameters())
    return {
        "model": name,
        "architecture": type(model).__name__,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "fingerprint": fingerprint(model),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def run(
    model: PreTrainedModel, tokenizer: Any, plan: Plan, out: Path, name: str, progress: Progress
) -> Results:
    """Runs the rows of a plan that are not in `out/evaluate.json` yet, and writes it after each.

    Raises:
        ValueError: the file is of another model or of a plan with other documents.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = _resumed(out / "evaluate.json", plan, about(model, name))
    sources = sources_of(tokenizer, held_out())
    device = next(model.parameters()).device
    batches: dict[int, Documents] = {}

    def documents(seed: int) -> Documents:
        if seed not in batches:
            sizes = {"count": plan.count, "length": plan.length, "lines": plan.lines}
            batches[seed] = _moved(documents_of(tokenizer, sources, seed=seed, **sizes), device)
        return batches[seed]

    sizes = {"count": plan.calibration, "length": plan.length}
    seed = CALIBRATION_SEED
    others = sources_of(tokenizer, for_alignment())
    calibration = plain_text(tokenizer, others, seed=seed, **sizes).to(device)
    if any(policy.heads for policy in plan.policies) and not results.copying:
        shuffled = calibration[:1, : plan.length // 2]
        order = torch.randperm(
            shuffled.shape[1], generator=torch.Generator().manual_seed(CALIBRATION_SEED)
        )
        results.copying = copying_by_head(model, shuffled[:, order.to(device)]).tolist()
    with subject_of(model, plan) as subject:
        work = list(_work(subject, plan))
        total = sum(len(plan.seeds) for _ in work)
        for done, (policy, fraction) in enumerate(work):
            missing = [s for s in plan.seeds if results.find(policy.name, fraction, s) is None]
            if not missing:
                continue
            began = time.perf_counter()
            selectors = _calibrated(subject, plan, policy, fraction, calibration, results.copying)
            for seed in missing:
                _set(subject, policy, seed, selectors)
                row = Row(policy.name, fraction, seed, measure(subject, documents(seed)))
                results.rows.append(row)
                results.seconds += time.perf_counter() - began
                began = time.perf_counter()
                _write(out / "evaluate.json", results)
                finished = done * len(plan.seeds) + plan.seeds.index(seed) + 1
                remark = f"{policy.name}: {row.measured.nll:.3f} nats"
                progress("policies", finished, total, remark)
    return results


def _work(subject: Subject, plan: Plan) -> Iterator[tuple[Policy, float | None]]:
    for policy in plan.policies:
        if policy.fixed:
            yield policy, None
            continue
        for fraction in plan.fractions:
            yield policy, fraction


def _set(subject: Subject, policy: Policy, seed: int, selectors: list[Any]) -> None:
    """Gives the layers the gates and selectors of a policy."""
    if policy.fixed:
        set_parts(subject, [None] * len(subject.layers), selectors)
        return
    gates = [
        gate_of(policy, seed, own, layer.dims.num_kv_heads)
        for layer, own in zip(subject.layers, subject.own, strict=True)
    ]
    set_parts(subject, list(gates), selectors)


@torch.no_grad()
def _calibrated(
    subject: Subject,
    plan: Plan,
    policy: Policy,
    fraction: float | None,
    text: Tensor,
    copying: list[list[float]],
) -> list[Any]:
    """The selectors of all layers, their thresholds set on text.

    One pass sets them layer by layer: a layer's scores are those of hidden states that come from
    layers which store by their thresholds already.
    """
    layers = subject.layers
    if fraction is None:
        if policy.store == "everything":
            return [None] * len(layers)
        return [Window(plan.window) | FirstTokens(plan.sinks) for _ in layers]
    heads = layers[0].dims.num_kv_heads
    shares = shared_out(policy, fraction, lambda: torch.tensor(copying), len(layers), heads)
    setting = [AtQuantile(share) for share in shares]
    _set(subject, policy, plan.seeds[0], [around(one, plan) for one in setting])
    subject(text, keep=1)
    return [around(one.frozen(), plan) for one in setting]


def _moved(documents: Documents, device: torch.device) -> Documents:
    names = ("rows", "tokens", "answers")
    questions = [
        one._replace(**{name: getattr(one, name).to(device) for name in names})
        for one in documents.questions
    ]
    return Documents(documents.tokens.to(device), documents.counts.to(device), questions)


def _resumed(path: Path, plan: Plan, now: dict[str, Any]) -> Results:
    if not path.exists():
        return Results(plan, now)
    results = Results.of(json.loads(path.read_text()))
    for name in ("model", "parameters", "dtype"):
        if results.about[name] != now[name]:
            raise wrong(
                "out", f"results of {now[name]} ({name})", f"{path} of {results.about[name]}"
            )
    # results of earlier checkouts have none
    if results.about.get("fingerprint", now["fingerprint"]) != now["fingerprint"]:
        expected = "a folder without results, or with results of this model"
        raise wrong(
            "out", expected, f"{path} of a model with other weights or another configuration"
        )
    old, new = results.plan.to_json(), plan.to_json()
    for name in new:
        if name not in FREE and old[name] != new[name]:
            raise wrong("out", f"results with {name} = {new[name]}", f"{path} with {old[name]}")
    before = {policy.name: policy for policy in results.plan.policies}
    for policy in plan.policies:
        if before.get(policy.name, policy) != policy:
            raise wrong("policies", f"{policy.name!r} as in {path}, or another name", policy)
    results.plan = _merged(results.plan, plan)
    return results


def _merged(old: Plan, new: Plan) -> Plan:
    """The new plan with all policies, fractions and seeds of the old one, whose rows are kept."""
    policies = [policy for policy in old.policies if policy not in new.policies]
    return replace(
        new,
        policies=(*new.policies, *policies),
        fractions=tuple(sorted({*old.fractions, *new.fractions})),
        seeds=tuple(sorted({*old.seeds, *new.seeds})),
    )


def _write(path: Path, results: Results) -> None:
    """Replaces the file in one step: a run that is stopped leaves a whole one."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(results.to_json(), indent=1) + "\n")
    os.replace(draft, path)
