"""What alignment and distillation share: settings, windows of a text, and layers that learn."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks.combiners import ScaledSum
from hamblocks.controllers import SampledThreshold, step_controllers
from hamblocks.hashing import mix
from hamblocks.layer import HAMLayer
from hamblocks.models.fingerprint import fingerprint
from hamblocks.protocols import check_count
from hamblocks_ops.arguments import check_tensor, wrong

Progress = Callable[[str, int, int, str], None]
"""Called as `progress(name, done, total, remark)`."""

SHARES = {
    "memory.q_proj.weight": 0.2,
    "memory.k_proj.weight": 0.2,
    "memory.v_proj.weight": 0.2,
    "memory.a_proj.weight": 0.1,
    "memory.b_proj.weight": 0.1,
    "combiner.gate_proj.weight": 0.03,
}
"""Shares of the learning rate. A row of these matrices adds up steps of all channels of x; with
more, layers of SmolLM2 whose error is a hundredth overshoot in the first steps."""

OLD = (
    "q_proj.",
    "k_proj.",
    "v_proj.",
    "combiner.o_proj.",
    "combiner.attention_g_proj.",
    "attention.q_norm.",
    "attention.k_norm.",
)
"""Beginnings of the names of a layer's weights that come from the source."""


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
        least = {"steps": 0, "tokens": 2, "held_out": 1, "workers": 1, "save_every": 1}
        for name, number in least.items():
            check_count(name, getattr(self, name), number)
        if not 0 < self.lr < math.inf:
            raise wrong("lr", "a finite number > 0", repr(self.lr))
        if not self.fractions or not all(0 <= fraction <= 1 for fraction in self.fractions):
            raise wrong("fractions", "one or more numbers in [0, 1]", repr(self.fractions))


def save_state(file: Path, state: dict[str, Any]) -> None:
    """Saves a state; a run that is stopped here keeps the one before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(file)


class Windows:
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


class Student:
    """A layer, its new weights and their optimizer."""

    def __init__(self, layer: HAMLayer, channels: Tensor, settings: AlignmentSettings) -> None:
        """Makes the optimizer.

        Args:
            layer: a hybrid layer.
            channels: `[hidden]`, the weight of the norm that reads the layer's output next.
            settings: how it learns.
        """
        self.layer, self.channels = layer, channels
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
        """The squared error of the output at a keep fraction, over the variance of y over tokens.

        Channels count as in the norm that reads them next. In SmolLM2 two channels of the residual
        stream are a hundred times larger than the others, and that norm takes them back.
        """
        self.keep(fraction)
        target = y.float() * self.channels.float()
        mixed = self.layer(x).y.float() * self.channels.float()
        return F.mse_loss(mixed, target) / (target - target.mean(1, keepdim=True)).square().mean()

    def step(self, x: Tensor, y: Tensor, fraction: float, rate: float) -> float:
        """One step of the layer's weights, at `rate` of the learning rate; the error before it."""
        self.begin(fraction)
        with torch.enable_grad():
            error = self.error(x, y, fraction)
            error.backward()
        self.learn(rate)
        return float(error.detach())

    def begin(self, fraction: float) -> None:
        """Before the forward pass of a step."""
        self.layer.train()
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.keep(fraction)

    def keep(self, fraction: float) -> None:
        """Sets the keep fraction of controllers with a sample."""
        for controller in self.controllers:
            controller.set_fraction(fraction)

    def learn(self, rate: float) -> None:
        """After the backward pass of a step: moves weights and thresholds."""
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        step_controllers(self.layer)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Shows the thresholds the scores of a window; no weight changes."""
        self.layer.train()
        self.layer(x)
        self.calibrated()

    def calibrated(self) -> None:
        """After a forward pass in training mode: moves the thresholds alone."""
        step_controllers(self.layer)

    def state(self) -> dict[str, Tensor]:
        """What learning changes in the layer."""
        every = self.layer.state_dict()
        return {name: value for name, value in every.items() if not name.startswith(OLD)}

    def finish(self) -> None:
        """Sets the thresholds to their targets again."""
        for controller, target in zip(self.controllers, self.targets, strict=True):
            controller.set_fraction(1.0 if target is None else float(target))


def students_of(model: nn.Module, settings: AlignmentSettings) -> dict[int, Student]:
    """The hybrid layers of a converted model by index, without those that had a memory.

    Such a layer computes what the source did whatever is stored, until its attention is trained.
    """
    stack: Any = getattr(getattr(model, "base_model", None), "stack", None)
    if stack is None:
        raise wrong("model", "a HAM model, from hamblocks.models.convert", model)
    for index, layer in enumerate(stack.layers):
        joins = layer.combiner
        kept = isinstance(joins, ScaledSum) and joins.start == "memory"
        if not isinstance(joins, ScaledSum) or (layer.attention is None and not kept):
            expected = "attention and a ScaledSum in every layer, as convert makes it"
            raise wrong("model", expected, f"layer {index} with {layer.combiner}")
    found = {
        index: Student(layer, decoder.block.mlp_norm.weight, settings)
        for index, (layer, decoder) in enumerate(zip(stack.layers, stack.blocks, strict=True))
        if layer.memory is not None and layer.combiner.start == "attention"
    }
    if not found:
        raise wrong("model", "a hybrid layer that was attention alone in the source", "none")
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
def only_new_weights_learn(model: nn.Module) -> Iterator[None]:
    """Freezes a model; afterwards every weight learns, and every module is in the mode, as before."""
    modes = [(module, module.training) for module in model.modules()]
    needed = [(weight, weight.requires_grad) for weight in model.parameters()]
    model.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for weight, needs in needed:
            weight.requires_grad_(needs)
        for module, mode in modes:
            module.training = mode


@contextmanager
def threads(workers: int) -> Iterator[None]:
    """One thread of torch for each of several workers; 1 worker keeps those that torch has."""
    before = torch.get_num_threads()
    if workers > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Run(ABC):
    """The steps in which the new weights of a model learn; a run that stopped goes on.

    Attributes:
        model: the model.
        students: its hybrid layers by index.
        windows: of the text.
        settings: how.
        done: steps done.
        seconds: time that they took.
        before: errors before the first step, by keep fraction.
    """

    def __init__(self, model: nn.Module, ids: Tensor, settings: AlignmentSettings) -> None:
        self.model, self.settings = model, settings
        self.students, self.windows = students_of(model, settings), Windows(ids, settings)
        self.done, self.seconds = 0, 0.0
        self.before: dict[str, list[float]] = {}
        chosen = asdict(settings)
        for name in ("workers", "save_every"):  # which change no result
            del chosen[name]
        # all that the saved state does not replace
        learned = [x for student in self.students.values() for x in student.state().values()]
        self.identity = {
            "settings": chosen,
            "tokens": ids.numel(),
            "sum": int(ids.long().sum()),
            "model": fingerprint(model, learned),
        }

    @abstractmethod
    def start(self) -> None:
        """What comes before the first step: sets `before`."""

    @abstractmethod
    def fit(self, ids: Tensor, fraction: float, rate: float) -> float:
        """One step on ids `[1, T]` at a share of the learning rate; the error before it."""

    @abstractmethod
    def errors(self) -> dict[str, list[float]]:
        """Errors on the held-out windows, by keep fraction."""

    def carry_out(
        self, name: str, file: Path | None, progress: Progress | None
    ) -> dict[str, list[float]]:
        """Runs all steps, from where the state in `file` is if there is one; the errors after them.

        Raises:
            ValueError: the state is of another run.
        """
        with only_new_weights_learn(self.model):
            if file is not None and file.exists():
                self.load(torch.load(file))
            else:
                self.start()
            while self.done < self.settings.steps:
                error = self.step()
                if progress is not None:
                    progress(name, self.done, self.settings.steps, f"error {error:.3f}")
                if file is not None and self.done % self.settings.save_every == 0:
                    save_state(file, self.state())
            after = self.errors()
            for student in self.students.values():
                student.finish()
        return after

    def step(self) -> float:
        """One step; the error before it."""
        began, steps = time.monotonic(), self.settings.steps
        warmup = max(1, min(10, steps // 10))
        rate = min(1.0, (self.done + 1) / warmup) * (1 - self.done / steps)
        window, fraction = self.windows.of_step(self.done), self.windows.fraction(self.done)
        error = self.fit(window, fraction, rate)
        self.done += 1
        self.seconds += time.monotonic() - began
        return error

    def state(self) -> dict[str, Any]:
        """What a run needs to go on."""
        layers = {
            index: {"layer": student.state(), "optimizer": student.optimizer.state_dict()}
            for index, student in self.students.items()
        }
        return {
            "run": self.identity,
            "done": self.done,
            "seconds": self.seconds,
            "before": self.before,
            "layers": layers,
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Goes on from `state`.

        Raises:
            ValueError: it is of another run.
        """
        if list(saved["layers"]) != list(self.students):
            raise wrong("folder", f"layers {list(saved['layers'])}", f"{list(self.students)}")
        for name, value in self.identity.items():
            if saved["run"].get(name) != value:
                expected = (
                    f"{name} {saved['run'].get(name)}, as the run that stopped (or another folder)"
                )
                raise wrong("folder", expected, f"{value}")
        self.done, self.seconds = saved["done"], saved["seconds"]
        self.before = saved["before"]
        for index, student in self.students.items():
            student.layer.load_state_dict(saved["layers"][index]["layer"], strict=False)
            student.optimizer.load_state_dict(saved["layers"][index]["optimizer"])
