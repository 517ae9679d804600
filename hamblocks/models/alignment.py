"""Alignment: the new parts of a converted model learn what full attention gave, layer by layer.

The model is its own teacher. A converted model holds the weights of attention unchanged, so full
attention over all tokens gives the input and the output of every layer of the source. Each hybrid
layer is then fitted to its own pair, apart from all others: layers run in parallel, and no gradient
crosses a layer.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks.combiners import ScaledSum
from hamblocks.controllers import SampledThreshold, step_controllers
from hamblocks.hashing import mix
from hamblocks.layer import HAMLayer
from hamblocks.memory import GatedDeltaMemory
from hamblocks.models.conversion import start_projections
from hamblocks.models.teacher import full_attention, half_life, key_moments
from hamblocks.protocols import check_count
from hamblocks_ops.arguments import check_tensor, wrong

Progress = Callable[[str, int, int, str], None]
"""Called as `progress(name, done, total, remark)`."""

SHARES = {
    "memory.q_proj.weight": 0.3,
    "memory.k_proj.weight": 0.3,
    "memory.v_proj.weight": 0.3,
    "memory.a_proj.weight": 0.1,
    "memory.b_proj.weight": 0.1,
    "combiner.gate_proj.weight": 0.1,
}
"""Shares of the learning rate. A row of these matrices adds up steps of all channels of x; with
more, the first steps of the late layers of SmolLM2, whose x has a few large channels, overshoot."""

OLD = (
    "q_proj.",
    "k_proj.",
    "v_proj.",
    "combiner.o_proj.",
    "attention.q_norm.",
    "attention.k_norm.",
)
"""Beginnings of the names of a layer's weights that come from the source."""

STATE = "alignment.pt"
REPORT = "alignment.json"


@dataclass(frozen=True)
class AlignmentSettings:
    """How a model is aligned.

    Attributes:
        steps: optimizer steps of every layer.
        tokens: tokens of a window; one window per step.
        fractions: keep fractions of `TargetFraction` and other controllers with a sample; one is
            drawn for every step, so that one model serves every budget.
        lr: learning rate of vectors; it rises over the first steps and falls to 0. Matrices have a
            share of it (`SHARES`).
        seed: of windows and fractions.
        held_out: windows at the end of the text that are not trained on; errors are of these.
        workers: threads; 1 core each on a CPU.
        save_every: steps between two saves of the state from which a run goes on.
    """

    steps: int = 400
    tokens: int = 768
    fractions: tuple[float, ...] = (0.0, 0.05, 0.15, 0.25, 0.5)
    lr: float = 1e-2
    seed: int = 0
    held_out: int = 4
    workers: int = 2
    save_every: int = 20

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: one is out of range.
        """
        for name in ("steps", "tokens", "held_out", "workers", "save_every"):
            check_count(name, getattr(self, name), 0 if name == "steps" else 1)
        if not 0 < self.lr < math.inf:
            raise wrong("lr", "a finite number > 0", repr(self.lr))
        if not self.fractions or not all(0 <= fraction <= 1 for fraction in self.fractions):
            raise wrong("fractions", "one or more numbers in [0, 1]", repr(self.fractions))


class Alignment(NamedTuple):
    """What an alignment did.

    Attributes:
        before: error of every aligned layer by keep fraction, before the first step: the squared
            error of the layer's output over the variance of what full attention gave.
        after: the same after the last step.
        seconds: time of the steps, over all runs.
        layers: indices of the aligned layers.
    """

    before: dict[str, list[float]]
    after: dict[str, list[float]]
    seconds: float
    layers: list[int]


def align(
    model: nn.Module,
    ids: Tensor,
    settings: AlignmentSettings | None = None,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Alignment:
    """Aligns the new parts of a converted model with full attention, in place.

    The first step starts from statistics of the teacher (`start_from_teacher`). Weights of the
    source do not change.

    Args:
        model: a model of `convert`.
        ids: int `[T]`, the tokens of a text.
        settings: how; None: the defaults.
        folder: where the state is saved, and where a run that stopped goes on; None: nowhere.
        progress: called after every step as `progress(name, done, total, remark)`.

    Raises:
        ValueError: the model has no hybrid layer or is not a converted one, layers share a
            threshold, the text is too short, or the state in `folder` is of another run.
    """
    settings = AlignmentSettings() if settings is None else settings
    students = _students(model, settings)
    windows = _Windows(ids, settings)
    runs = {"settings": asdict(settings), "tokens": int(ids.numel()), "sum": int(ids.long().sum())}
    file = None if folder is None else folder / STATE
    modes = [(module, module.training) for module in model.modules()]
    needed = [(weight, weight.requires_grad) for weight in model.parameters()]
    model.requires_grad_(False)
    model.eval()
    try:
        with _threads(settings.workers), ThreadPoolExecutor(settings.workers) as pool:
            run = _Run(model, students, windows, settings, pool)
            saved = None if file is None or not file.exists() else torch.load(file)
            if saved is None:
                run.start()
            else:
                run.load(saved, runs)
            while run.done < settings.steps:
                run.step()
                if progress is not None:
                    progress("align", run.done, settings.steps, f"error {run.latest:.3f}")
                if file is not None and run.done % settings.save_every == 0:
                    _save(file, {"run": runs, **run.state()})
            after = run.errors()
            run.finish()
    finally:
        for weight, needs in needed:
            weight.requires_grad_(needs)
        for module, mode in modes:
            module.training = mode
    return Alignment(run.before, after, run.seconds, list(students))


def _save(file: Path, state: dict[str, Any]) -> None:
    """Saves a state; a run that is stopped here keeps the one before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(file)


def save_report(folder: Path, settings: AlignmentSettings, result: Alignment) -> None:
    """Writes what an alignment did, and removes the state from which it would go on."""
    report = {"settings": asdict(settings), **result._asdict()}
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    (folder / STATE).unlink(missing_ok=True)


@torch.no_grad()
def start_from_teacher(layer: HAMLayer, x: Tensor) -> None:
    """Starts a layer's memory from statistics of its full attention, instead of from noise.

    - The decay of a head: half of the state is left after the distance within which half of the
      attention of the head lies.
    - Projections of the memory's own start from those of attention. Keys are multiplied by the
      inverse root of their second moment, and queries too, so that unit keys spread in all
      directions: keys of attention share a large mean, which a delta rule would take for a match.

    A memory with other sizes than attention keeps its own start.

    Args:
        layer: a hybrid layer.
        x: `[B, T, hidden]`, normed inputs of the layer.
    """
    memory: Any = layer.memory
    heads = layer.dims.num_heads
    if isinstance(memory, GatedDeltaMemory) and layer.dims.memory_read[0] == heads:
        step = math.log(2) / (half_life(layer, x).to(memory.A_log) * memory.A_log.exp())
        memory.dt_bias.copy_(step + (-torch.expm1(-step)).log())
        memory.a_proj.weight.zero_()
    start_projections(layer, _inverse_root(key_moments(layer, x)))


def _inverse_root(moment: Tensor) -> Tensor:
    """The inverse square root of symmetric matrices `[H, D, D]`, with a floor for small directions."""
    values, vectors = torch.linalg.eigh(moment.double())
    floor = 1e-3 * values[:, -1:]
    scale = (values + floor).rsqrt()
    root: Tensor = (vectors * scale[:, None]) @ vectors.mT
    return root


class _Windows:
    """Windows of a text, for training and held out."""

    def __init__(self, ids: Tensor, settings: AlignmentSettings) -> None:
        check_tensor("ids", ids, "[T]", [None])
        size, held = settings.tokens, settings.held_out * settings.tokens
        if ids.numel() < held + size:
            expected = f"{held + size} tokens or more: {settings.held_out + 1} windows of {size}"
            raise wrong("ids", expected, f"{ids.numel()} tokens")
        self.train, self.held = ids[: len(ids) - held], ids[len(ids) - held :].view(-1, size)
        self.size, self.settings = size, settings

    def of_step(self, step: int) -> Tensor:
        """The window of a step, `[1, T]`: the same for the same seed, however often a run stops."""
        begin = _drawn(self.settings.seed, step, 0) % (len(self.train) - self.size + 1)
        return self.train[begin : begin + self.size][None]

    def fraction(self, step: int) -> float:
        """The keep fraction of a step."""
        fractions = self.settings.fractions
        return fractions[_drawn(self.settings.seed, step, 1) % len(fractions)]


def _drawn(seed: int, step: int, what: int) -> int:
    """A number drawn for a step."""
    word = torch.tensor((seed * 1_000_003 + step) * 2 + what, dtype=torch.int64)
    return int(mix(word & 0xFFFFFFFF))


class _Student:
    """A layer, its new weights and their optimizer."""

    def __init__(self, layer: HAMLayer, settings: AlignmentSettings) -> None:
        self.layer, self.settings = layer, settings
        self.weights = {
            name: weight for name, weight in layer.named_parameters() if not name.startswith(OLD)
        }
        controllers = [x for x in layer.modules() if isinstance(x, SampledThreshold)]
        self.controllers = controllers
        self.targets = [getattr(x, "fraction", None) for x in controllers]
        rates = [settings.lr * SHARES.get(name, 1.0) for name in self.weights]
        groups = [
            {"params": [weight], "lr": rate, "base": rate}
            for weight, rate in zip(self.weights.values(), rates, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def error(self, x: Tensor, y: Tensor, fraction: float) -> Tensor:
        """The squared error of the output at a keep fraction, over the variance of y."""
        for controller in self.controllers:
            controller.set_fraction(fraction)
        mixed = self.layer(x).y
        return F.mse_loss(mixed.float(), y.float()) / y.float().var()

    def step(self, x: Tensor, y: Tensor, fraction: float, rate: float) -> float:
        """One step of the layer's weights, at `rate` of the learning rate; the error before it."""
        self.layer.train()
        for weight in self.weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad():
            error = self.error(x, y, fraction)
            error.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        step_controllers(self.layer)
        return float(error.detach())

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Shows the thresholds the scores of a window; no weight changes."""
        self.layer.train()
        self.layer(x)
        step_controllers(self.layer)

    def finish(self) -> None:
        """Sets the thresholds to their targets again."""
        for controller, target in zip(self.controllers, self.targets, strict=True):
            controller.set_fraction(1.0 if target is None else float(target))


class _Run:
    """The steps of an alignment."""

    def __init__(
        self,
        model: nn.Module,
        students: dict[int, _Student],
        windows: _Windows,
        settings: AlignmentSettings,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.model, self.students, self.windows = model, students, windows
        self.settings, self.pool = settings, pool
        self.done, self.seconds, self.latest = 0, 0.0, math.nan
        self.before: dict[str, list[float]] = {}

    def start(self) -> None:
        """Starts every layer from statistics of the teacher, and measures its error."""

        def begin(student: _Student, x: Tensor, _: Tensor) -> float:
            student.calibrate(x)
            return 0.0

        self._each(self.windows.of_step(0), begin)
        self.before = self.errors()

        def fit(student: _Student, x: Tensor, _: Tensor) -> float:
            start_from_teacher(student.layer, x)
            student.calibrate(x)
            return 0.0

        self._each(self.windows.of_step(0), fit)

    def step(self) -> None:
        """One step of every layer."""
        began, fraction = time.monotonic(), self.windows.fraction(self.done)
        warmup = max(1, min(10, self.settings.steps // 10))
        rate = min(1.0, (self.done + 1) / warmup) * (1 - self.done / self.settings.steps)

        def fit(student: _Student, x: Tensor, y: Tensor) -> float:
            return student.step(x, y, fraction, rate)

        errors = self._each(self.windows.of_step(self.done), fit)
        self.latest = sum(errors) / len(errors)
        self.done += 1
        self.seconds += time.monotonic() - began

    def errors(self) -> dict[str, list[float]]:
        """The error of every layer on the held-out windows, by keep fraction."""
        fractions = self.settings.fractions
        sums = torch.zeros(len(fractions), len(self.students))
        for window in self.windows.held:
            measured = self._each(window[None], self._measured)
            sums += torch.tensor(measured).T
        means = (sums / len(self.windows.held)).tolist()
        return {f"{fraction:g}": row for fraction, row in zip(fractions, means, strict=True)}

    @torch.no_grad()
    def _measured(self, student: _Student, x: Tensor, y: Tensor) -> list[float]:
        student.layer.eval()
        return [float(student.error(x, y, fraction)) for fraction in self.settings.fractions]

    def _each(self, ids: Tensor, call: Callable[[_Student, Tensor, Tensor], Any]) -> list[Any]:
        """Calls `call(student, x, y)` for every layer, while the teacher runs ahead."""
        tasks = [
            self.pool.submit(call, self.students[index], x, y)
            for index, x, y in full_attention(self.model, ids)
            if index in self.students
        ]
        return [task.result() for task in tasks]

    def finish(self) -> None:
        """Sets all thresholds to their targets."""
        for student in self.students.values():
            student.finish()

    def state(self) -> dict[str, Any]:
        """What a run needs to go on."""
        layers = {
            index: {
                "layer": student.layer.state_dict(),
                "optimizer": student.optimizer.state_dict(),
            }
            for index, student in self.students.items()
        }
        return {
            "done": self.done,
            "seconds": self.seconds,
            "before": self.before,
            "layers": layers,
        }

    def load(self, saved: dict[str, Any], runs: dict[str, Any]) -> None:
        """Goes on from `state`.

        Raises:
            ValueError: it is of another run.
        """
        for name, value in runs.items():
            if saved["run"][name] != value:
                expected = (
                    f"{name} {saved['run'][name]}, as the run that stopped (or another folder)"
                )
                raise wrong("folder", expected, f"{value}")
        if list(saved["layers"]) != list(self.students):
            raise wrong("folder", f"layers {list(saved['layers'])}", f"{list(self.students)}")
        self.done, self.seconds = saved["done"], saved["seconds"]
        self.before = saved["before"]
        for index, student in self.students.items():
            student.layer.load_state_dict(saved["layers"][index]["layer"])
            student.optimizer.load_state_dict(saved["layers"][index]["optimizer"])


def _students(model: nn.Module, settings: AlignmentSettings) -> dict[int, _Student]:
    """The hybrid layers of a converted model by index."""
    stack: Any = getattr(getattr(model, "base_model", None), "stack", None)
    if stack is None:
        raise wrong("model", "a HAM model, from hamblocks.models.convert", model)
    for index, layer in enumerate(stack.layers):
        if layer.attention is None or not isinstance(layer.combiner, ScaledSum):
            expected = "attention and a ScaledSum in every layer, as convert makes it"
            raise wrong("model", expected, f"layer {index} with {layer.combiner}")
    found = {
        index: _Student(layer, settings)
        for index, layer in enumerate(stack.layers)
        if layer.memory is not None
    }
    if not found:
        raise wrong("model", "a hybrid layer", "none")
    owners: dict[int, int] = {}
    for index, student in found.items():
        for module in (*student.controllers, *student.layer.modules()):
            if owners.setdefault(id(module), index) != index:
                expected = "layers that share no part, because each is aligned on its own"
                raise wrong(
                    "model", expected, f"{module} in layers {owners[id(module)]} and {index}"
                )
    return found


@contextmanager
def _threads(workers: int) -> Iterator[None]:
    """One thread of torch for each of several workers; 1 worker keeps those that torch has."""
    before = torch.get_num_threads()
    if workers > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
