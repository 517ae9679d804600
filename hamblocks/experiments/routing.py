"""The study: which policy finds the tokens that are worth storing, and what it takes of a layer.

Every policy branches from one checkpoint per task and seed, which was trained with everything
stored, and is trained for every budget at once (`ElasticFraction`). It is then moved through the
budgets. The options of the layer are compared by surprise at one budget, each from a checkpoint of
its own.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hamblocks.controllers import AnnealedFraction, ElasticFraction, TargetFraction
from hamblocks.decoder import Decoder
from hamblocks.experiments.corpus import Corpus
from hamblocks.experiments.growth import late, passages, stored_after
from hamblocks.experiments.models import (
    POLICIES,
    LayerOptions,
    model_of,
    set_fraction,
    set_threshold,
)
from hamblocks.experiments.tasks import (
    ByteText,
    InContextCopying,
    Recall,
    SelectiveCopying,
    Task,
    UnsurprisingNeedles,
)
from hamblocks.experiments.training import (
    Recipe,
    branch,
    measure,
    train,
    train_with_curriculum,
)
from hamblocks.experiments.workers import workers
from hamblocks.gates import (
    PredictionError,
    SharedGate,
)
from hamblocks.protocols import Controller, Gate
from hamblocks_ops.arguments import wrong

FRACTIONS = (0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0)
"""The budgets to which every policy is moved."""

TARGET = 0.25
"""The budget at which options are compared."""

HELD_OUT = 1_000_000
"""Added to a seed, it seeds the sequences that measure: no training draws from there."""

BASELINES = {"everything": -math.inf, "memory": math.inf}
"""Arms with a fixed threshold: attention over everything, and the memory alone."""


OPTIONS: dict[str, dict[str, Any]] = {
    "as in the study": {},
    "no key convolution": {"key_taps": 1},
    "4 taps in the memory": {"memory_taps": 4},
    "decay as it comes": {"dt": None},
    "2 heads of 16, one decision": {"num_heads": 2, "head_dim": 16},
    "2 heads of 16, one decision each": {"num_heads": 2, "head_dim": 16, "shared": False},
    "projections of the memory's own": {"own": True},
    "rotary positions": {"rope": True},
    "null sink": {"null_sink": True},
    "not annealed": {"annealed": False},
}
"""The options that are compared, by what they change."""


@dataclass(frozen=True)
class TaskSetting:
    """A task, and how long models are trained on it.

    Attributes:
        make: makes the task; with True the one that draws held-out sequences.
        options: what the layers are made of.
        has_curriculum: whether the checkpoint begins with few facts; False: `text_steps` at full
            size.
    """

    make: Callable[[bool], Task]
    options: LayerOptions = field(default_factory=LayerOptions)
    has_curriculum: bool = True


def _corpus() -> Corpus:
    return Corpus.standard_library()


TASKS: dict[str, TaskSetting] = {
    "recall": TaskSetting(
        lambda _held_out: Recall(128, 1536, questions=32, symbols=320, phrase=8, burst=8)
    ),
    "recall, symbols tell": TaskSetting(
        lambda _held_out: Recall(
            128, 1536, questions=32, symbols=320, phrase=8, burst=8, shared_symbols=False
        )
    ),
    "unsurprising needles": TaskSetting(lambda _held_out: UnsurprisingNeedles()),
    "in-context copying": TaskSetting(lambda _held_out: InContextCopying()),
    "selective copying": TaskSetting(lambda _held_out: SelectiveCopying(16, 384, distractors=16)),
    "byte text": TaskSetting(
        lambda held_out: ByteText(_corpus(), held_out=held_out),
        LayerOptions(num_layers=2, rope=True),
        has_curriculum=False,
    ),
}
"""The tasks of the study."""


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        seeds: of weights and sequences.
        tasks: names of `TASKS`.
        policies: names of `POLICIES`.
        options: names of `OPTIONS`, compared on recall.
        steps: optimizer steps of an arm.
        curriculum_steps: the most steps of a checkpoint.
        text_steps: steps of a checkpoint on byte text.
        sequences: held-out sequences of a measure.
        scale: factor of the tokens in a step; more than 1 for a GPU.
        device: where models are trained.
        workers: processes of one thread each; 0: this process.
    """

    seeds: tuple[int, ...] = (1000, 1001, 1002, 1003, 1004)
    tasks: tuple[str, ...] = tuple(TASKS)
    policies: tuple[str, ...] = tuple(POLICIES)
    options: tuple[str, ...] = tuple(OPTIONS)
    steps: int = 160
    curriculum_steps: int = 800
    text_steps: int = 300
    sequences: int = 16
    scale: int = 1
    device: str = "cpu"
    workers: int = 2

    def __post_init__(self) -> None:
        for name, known in (("tasks", TASKS), ("policies", POLICIES), ("options", OPTIONS)):
            unknown = sorted(set(getattr(self, name)) - set(known))
            if unknown:
                raise wrong(name, f"some of {', '.join(known)}", ", ".join(unknown))

    @classmethod
    def quick(cls) -> Settings:
        """One seed, two tasks and four policies: two minutes."""
        return cls(
            seeds=(1000,),
            tasks=("recall", "selective copying"),
            policies=("surprise", "random", "router", "oracle"),
            options=("as in the study", "no key convolution"),
            steps=120,
        )

    def recipe(self, name: str, *, checkpoint: bool = False) -> Recipe:
        """How a model is trained on a task."""
        recipe = Recipe(steps=self.steps, tokens=1536 * self.scale)
        if checkpoint and TASKS[name].has_curriculum:
            return replace(recipe, steps=self.curriculum_steps, learning_rate=3e-3, final=1.0)
        if not TASKS[name].has_curriculum:  # every byte is asked for: there is no other text
            steps = self.text_steps if checkpoint else self.steps
            return replace(recipe, steps=steps, learning_rate=3e-3, text_weight=0.0)
        return recipe


Progress = Callable[[str, int, int, str], None]
"""Called with the name of the work, the steps done, the number of steps, and a remark."""


@dataclass(frozen=True)
class Job:
    """One unit of work: a checkpoint and all that branches from it."""

    kind: str
    name: str
    seed: int

    @property
    def file(self) -> str:
        """Name of the file with its result."""
        words = "".join(c if c.isalnum() else "-" for c in self.name)
        return f"{self.kind}.{words}.{self.seed}.json"


def run(settings: Settings, folder: Path, progress: Progress) -> dict[str, Any]:
    """Runs what the folder does not hold yet, and returns all results.

    Args:
        settings: what is run.
        folder: one JSON file per job is written there as soon as it is done; a later run with the
            same settings goes on from there.
        progress: is told of every job.

    Raises:
        ValueError: the folder holds results of other settings.
    """
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    _same_settings(settings, folder / "settings.json")
    jobs = list(_jobs(settings))
    found = {job: json.loads((folder / job.file).read_text()) for job in jobs
             if (folder / job.file).exists()}  # fmt: skip
    with workers(settings.workers) as submit:
        waiting: dict[Future[Any], Job] = {
            submit(_work, settings, job): job for job in jobs if job not in found
        }
        while waiting:
            finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                job = waiting.pop(future)
                text = json.dumps(future.result())
                found[job] = json.loads(text)  # as a later run would read it
                partial = folder / (job.file + ".partial")
                partial.write_text(text)
                partial.replace(folder / job.file)  # a run that is killed leaves no half of a file
                progress(
                    "checkpoints", len(found), len(jobs), f"{job.kind} {job.name}, seed {job.seed}"
                )
    return {
        "settings": _plain(settings),
        "torch": torch.__version__,
        "fractions": list(FRACTIONS),
        "tasks": {
            name: {
                str(job.seed): found[job] for job in jobs if (job.kind, job.name) == ("task", name)
            }
            for name in settings.tasks
        },
        "options": {
            name: {
                str(job.seed): found[job]
                for job in jobs
                if (job.kind, job.name) == ("option", name)
            }
            for name in settings.options
        },
        "core_seconds": sum(result["seconds"] for result in found.values()),
        "seconds": time.perf_counter() - began,
    }


def _plain(settings: Settings) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return plain


def _same_settings(settings: Settings, path: Path) -> None:
    """Writes the settings, or checks that they are those that were written."""
    wanted = _plain(settings)
    wanted.pop("workers")
    if not path.exists():
        path.write_text(json.dumps(wanted))
        return
    held = json.loads(path.read_text())
    if held != wanted:
        other = ", ".join(name for name in wanted if held.get(name) != wanted[name])
        raise wrong("out", "an empty folder, or one with results of the same settings", other)


def _jobs(settings: Settings) -> Iterator[Job]:
    """The jobs, seed by seed, so that an interrupted run has whole seeds."""
    for seed in settings.seeds:
        for name in settings.tasks:
            yield Job("task", name, seed)
        for name in settings.options:
            yield Job("option", name, seed)


def _work(settings: Settings, job: Job) -> dict[str, Any]:
    began = time.perf_counter()
    work = _task if job.kind == "task" else _option
    result = work(settings, job.name, job.seed)
    return result | {"seconds": time.perf_counter() - began}


def _checkpoint(
    settings: Settings, name: str, options: LayerOptions, task: Task, seed: int
) -> tuple[Decoder, dict[str, Any]]:
    """A model that was trained with everything stored, and what its training took."""
    gate = POLICIES["surprise"]
    model = model_of(task, options, gate, lambda: -math.inf, seed=seed).to(settings.device)
    recipe = settings.recipe(name, checkpoint=True)
    learn = train_with_curriculum if TASKS[name].has_curriculum else train
    return model, asdict(learn(model, task, recipe, seed))


def _task(settings: Settings, name: str, seed: int) -> dict[str, Any]:
    """All arms of a task from one checkpoint."""
    setting = TASKS[name]
    task, held_out = setting.make(False), setting.make(True)
    base, trained = _checkpoint(settings, name, setting.options, task, seed)
    result: dict[str, Any] = {"checkpoint": trained, "arms": {}, "seconds_of": {}}
    recipe = settings.recipe(name)

    def learned(
        gate: Callable[[int], Gate], controller: Callable[[], Controller | float]
    ) -> Decoder:
        onto = model_of(task, setting.options, gate, controller, seed=seed)
        model = branch(base, onto.to(settings.device))
        train(model, task, recipe, seed + HELD_OUT // 2)
        return model

    def measured(model: Decoder) -> dict[str, Any]:
        return asdict(measure(model, held_out, HELD_OUT + seed, sequences=settings.sequences))

    for arm, tau in BASELINES.items():
        began = time.perf_counter()
        model = learned(POLICIES["surprise"], lambda tau=tau: tau)  # type: ignore[misc]
        result["arms"][arm] = [measured(model)]
        result["seconds_of"][arm] = time.perf_counter() - began
    for arm in settings.policies:
        began = time.perf_counter()
        model = learned(POLICIES[arm], lambda: _elastic(settings, seed))
        rows = []
        for fraction in FRACTIONS:
            set_fraction(model, fraction)
            rows.append(measured(model))
        result["arms"][arm] = rows
        result["seconds_of"][arm] = time.perf_counter() - began
        if arm == "surprise":
            result["growth"] = _growth(model, held_out, seed)
    return result


def _elastic(settings: Settings, seed: int) -> ElasticFraction:
    begin = max(settings.steps // 5, 1)
    return ElasticFraction(0.05, 1.0, seed=seed, begin=begin, spacing="uniform")


@torch.no_grad()
def _growth(model: Decoder, task: Task, seed: int) -> dict[str, Any]:
    """Growth on fresh and on repeated input, at thresholds that a share of fresh tokens reaches.

    Returns:
        The curves of stored tokens at `TARGET`, every eighth token, one per layer; and for every
        budget the tokens that each layer stores after two repetitions.
    """
    fresh, repeated, others = passages(task, HELD_OUT + seed)
    device = next(model.parameters()).device
    model.eval()
    scores = [stats.score for stats in model(others.to(device)).stats]

    def stored(fraction: float) -> dict[str, list[Tensor]]:
        for layer, score in zip(model.stack.layers, scores, strict=True):
            assert score is not None
            set_threshold(layer, float(score.flatten().quantile(1 - fraction)))
        read = {"fresh": fresh, "repeated": repeated}
        return {name: stored_after(model, tokens.to(device)) for name, tokens in read.items()}

    budgets = [
        {"fraction": fraction}
        | {name: [late(curve) for curve in curves] for name, curves in stored(fraction).items()}
        for fraction in FRACTIONS
    ]
    curves = {
        name: [curve[7::8].tolist() for curve in layers] for name, layers in stored(TARGET).items()
    }
    return {"tokens": list(range(8, fresh.shape[1] + 1, 8)), **curves, "budgets": budgets}


def _option(settings: Settings, name: str, seed: int) -> dict[str, Any]:
    """Surprise at one budget with one option of the layer, from a checkpoint of its own."""
    task = TASKS["recall"].make(False)
    options = replace(LayerOptions(), **OPTIONS[name])
    base, trained = _checkpoint(settings, "recall", options, task, seed)
    recipe = settings.recipe("recall")

    def gate(_seed: int) -> Gate:
        inner = PredictionError("cosine")
        return SharedGate(inner) if options.shared else inner

    def controller() -> Controller:
        if not options.annealed:
            return TargetFraction(TARGET)
        return AnnealedFraction(TARGET, max(settings.steps // 2, 1))

    onto = model_of(task, options, gate, controller, seed=seed)
    model = branch(base, onto.to(settings.device))
    train(model, task, recipe, seed + HELD_OUT // 2)
    found = measure(model, task, HELD_OUT + seed, sequences=settings.sequences)
    return {"checkpoint": trained, "measured": asdict(found)}
