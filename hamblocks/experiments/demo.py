"""The main job: on a task where storage matters, what is worth storing?

Models of equal size are trained to recall pairs that stand once in text that repeats itself. They
branch from one checkpoint per seed and differ in what they store.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from hamblocks.decoder import Decoder
from hamblocks.experiments.arms import ARMS, arm_of
from hamblocks.experiments.growth import measure_growth
from hamblocks.experiments.models import LayerOptions, set_fraction
from hamblocks.experiments.tasks import Recall
from hamblocks.experiments.training import (
    Measured,
    Recipe,
    Trained,
    branch,
    measure,
    train,
    train_with_curriculum,
)
from hamblocks.experiments.workers import workers
from hamblocks_ops.arguments import wrong

FRACTIONS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.375, 0.5, 0.75, 1.0)
"""The budgets to which the elastic model is moved."""

HELD_OUT = 1_000_000
"""Added to a seed, it seeds the sequences that measure: no training draws from there."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment. With the defaults it takes less than four minutes on two cores.

    Attributes:
        seeds: one checkpoint each, and every arm from it.
        steps: optimizer steps of an arm; the elastic arm takes `elastic_steps`.
        target: fraction of the tokens that surprise, random and router store.
        curriculum_steps: the most steps that the checkpoint may take; it needs about 140.
        memory_steps: the steps of the memory alone that is trained from the start.
        pairs, length, questions, symbols, phrase, burst: see `Recall`.
        sequences: held-out sequences of a measure.
        workers: processes of one thread each; 0: this process.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 120
    elastic_steps: int = 240
    target: float = 0.25
    curriculum_steps: int = 800
    memory_steps: int = 640
    pairs: int = 128
    length: int = 1536
    questions: int = 32
    symbols: int = 320
    phrase: int = 8
    burst: int = 8
    sequences: int = 32
    workers: int = min(2, os.cpu_count() or 1)
    sizes: LayerOptions = field(default_factory=LayerOptions)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise wrong("seeds", "one seed or more, all different", str(self.seeds))
        for name in ("steps", "elastic_steps", "curriculum_steps", "memory_steps", "sequences"):
            if getattr(self, name) < 1:
                raise wrong(name, "at least 1", str(getattr(self, name)))

    def task(self) -> Recall:
        """The task."""
        return Recall(
            self.pairs,
            self.length,
            questions=self.questions,
            symbols=self.symbols,
            phrase=self.phrase,
            burst=self.burst,
        )

    def curriculum(self) -> Recipe:
        """How a checkpoint is trained."""
        return Recipe(steps=self.curriculum_steps, learning_rate=3e-3, final=1.0)

    def recipe(self, arm: str) -> Recipe:
        """How an arm is trained from its checkpoint."""
        return Recipe(steps=self.elastic_steps if arm == "elastic" else self.steps)


@dataclass
class Run:
    """One model: what it is, how it was trained, what it does.

    Attributes:
        seed: of its checkpoint.
        arm: one of `ARMS`, or "memory from the start".
        trained: its own training, without that of the checkpoint.
        measured: on held-out sequences, at the target if it is elastic.
    """

    seed: int
    arm: str
    trained: Trained
    measured: Measured


@dataclass
class Results:
    """Everything that was measured, and the settings.

    Attributes:
        checkpoints: seed -> training with everything stored, from which the arms branch.
        runs: every arm of every seed.
        budgets: seed -> the elastic model at every fraction of `FRACTIONS`.
        growth: seed -> growth of the elastic model's cache.
        picture: one held-out sequence: its kinds, and what surprise stored of it.
    """

    settings: Settings
    parameters: int
    torch: str
    checkpoints: dict[int, Trained] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    budgets: dict[int, list[Measured]] = field(default_factory=dict)
    growth: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    picture: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def accuracy(self, arm: str) -> list[float]:
        """Held-out accuracy of every seed; for "memory" the better of its trainings."""
        return [
            max(
                run.measured.accuracy
                for run in self.runs
                if run.seed == seed and run.arm.partition(" ")[0] == arm
            )
            for seed in self.settings.seeds
        ]

    def to_json(self) -> dict[str, Any]:
        """Lists and dicts of numbers and strings."""
        recall: dict[str, Any] = {arm: self.accuracy(arm) for arm in ARMS}
        recall["seeds"] = list(self.settings.seeds)
        elastic = {
            "fractions": list(FRACTIONS),
            "accuracy": {seed: [m.accuracy for m in row] for seed, row in self.budgets.items()},
            "loss": {seed: [m.loss for m in row] for seed, row in self.budgets.items()},
            "stored": {seed: [m.keep_fraction for m in row] for seed, row in self.budgets.items()},
        }
        return {
            "recall": recall,
            "elastic": elastic,
            "growth": self.growth,
            "picture": self.picture,
            "settings": asdict(self.settings),
            "parameters": self.parameters,
            "checkpoints": {seed: asdict(made) for seed, made in self.checkpoints.items()},
            "runs": [asdict(run) for run in self.runs],
            "torch": self.torch,
            "seconds": self.seconds,
        }


Progress = Callable[[str, int, int, str], None]
"""Called with the name of the work, the steps done, the number of steps, and a remark."""


def run(settings: Settings, progress: Progress) -> Results:
    """Runs the whole experiment."""
    began = time.perf_counter()
    made = _model("everything", settings, settings.seeds[0])
    parameters = sum(weight.numel() for weight in made.parameters())
    results = Results(settings, parameters, torch.__version__)
    total = len(settings.seeds) * (1 + len(ARMS)) + 1
    with workers(settings.workers) as submit:
        jobs: dict[Future[Any], tuple[str, int]] = {}
        for seed in settings.seeds:
            jobs[submit(_checkpoint, settings, seed)] = ("checkpoint", seed)
        # one seed shows whether the memory alone does better when it never had attention
        first = settings.seeds[0]
        jobs[submit(_memory_from_start, settings, first)] = ("memory from the start", first)
        done = 0
        while jobs:
            finished, _ = wait(jobs, return_when=FIRST_COMPLETED)
            for future in finished:
                name, seed = jobs.pop(future)
                found = future.result()
                if name == "checkpoint":
                    weights, results.checkpoints[seed] = found
                    accuracy = results.checkpoints[seed].accuracy
                    # the longest first, so that no worker is idle at the end
                    for arm in ("elastic", *(arm for arm in ARMS if arm != "elastic")):
                        jobs[submit(_arm, settings, seed, arm, weights)] = (arm, seed)
                else:
                    results.runs.append(found["run"])
                    accuracy = found["run"].measured.accuracy
                    results.budgets |= found.get("budgets", {})
                    results.growth |= found.get("growth", {})
                    results.picture |= found.get("picture", {})
                done += 1
                progress("trainings", done, total, f"{name}, seed {seed}: {accuracy:.3f}")
    order = {arm: place for place, arm in enumerate(ARMS)}
    results.runs.sort(key=lambda row: (order.get(row.arm, 1.5), row.seed))
    results.seconds = time.perf_counter() - began
    return results


def _model(arm: str, settings: Settings, seed: int) -> Decoder:
    steps = settings.recipe(arm).steps
    return arm_of(
        arm, settings.task(), settings.sizes, seed=seed, target=settings.target, steps=steps
    )


def _checkpoint(settings: Settings, seed: int) -> tuple[bytes, Trained]:
    """Trains a model with everything stored; returns its state dict as bytes.

    Bytes go through a pipe; tensors would go through shared memory, which containers restrict.
    """
    model = _model("everything", settings, seed)
    trained = train_with_curriculum(model, settings.task(), settings.curriculum(), seed)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue(), trained


def _memory_from_start(settings: Settings, seed: int) -> dict[str, Any]:
    """Trains the memory alone from the start, longer than checkpoint and arm together.

    Three quarters of the steps are for the curriculum, which moves on at half of the answers right,
    since a memory that learns to hold eight pairs needs hundreds of steps. The rest is at full
    size, with the recipe of the arms.
    """
    model = _model("memory", settings, seed)
    task, last = settings.task(), max(settings.memory_steps // 4, 1)
    recipe = replace(settings.curriculum(), steps=max(settings.memory_steps - last, 1))
    first = train_with_curriculum(model, task, recipe, seed, needed=0.5)
    trained = train(model, task, Recipe(steps=last), seed + HELD_OUT // 2)
    trained.sizes = [*first.sizes, (first.steps, task.size)]
    trained.steps += first.steps
    trained.seconds += first.seconds
    measured = measure(model, task, HELD_OUT + seed, sequences=settings.sequences)
    return {"run": Run(seed, "memory from the start", trained, measured)}


def _arm(settings: Settings, seed: int, arm: str, weights: bytes) -> dict[str, Any]:
    """Trains one arm from its checkpoint and measures it."""
    task, held_out = settings.task(), HELD_OUT + seed
    base = _model("everything", settings, seed)
    base.load_state_dict(torch.load(io.BytesIO(weights)))
    model = branch(base, _model(arm, settings, seed))
    trained = train(model, task, settings.recipe(arm), seed + HELD_OUT // 2)
    if arm != "elastic":
        measured = measure(model, task, held_out, sequences=settings.sequences)
        found: dict[str, Any] = {"run": Run(seed, arm, trained, measured)}
        if arm == "surprise" and seed == settings.seeds[0]:
            found["picture"] = _picture(model, task, held_out)
        return found
    budgets = []
    for fraction in FRACTIONS:
        set_fraction(model, fraction)
        budgets.append(measure(model, task, held_out, sequences=settings.sequences))
    set_fraction(model, settings.target)
    measured = measure(model, task, held_out, sequences=settings.sequences)
    growth = measure_growth(model, task, settings.target, seed=held_out)
    return {
        "run": Run(seed, arm, trained, measured),
        "budgets": {seed: budgets},
        "growth": {seed: [row._asdict() for row in growth]},
    }


@torch.no_grad()
def _picture(model: Decoder, task: Recall, seed: int) -> dict[str, Any]:
    """One sequence: kinds, scores and what is stored."""
    model.eval()
    batch = task.batch(1, torch.Generator().manual_seed(seed))
    stats = model(batch.tokens).stats[0]
    assert stats.score is not None
    assert stats.evict_at is not None
    stored = stats.evict_at > stats.position[:, -1:, None]
    return {
        "kind": batch.kind[0].tolist(),
        "score": stats.score[0].mean(-1).tolist(),
        "stored": stored[0].any(-1).tolist(),
    }
