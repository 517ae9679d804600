"""Training of small models on a task: a curriculum with everything stored, then branches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hamblocks.controllers import hook_controllers
from hamblocks.decoder import Decoder, DecoderOutput
from hamblocks.experiments.tasks import IGNORED, QUESTION, Task, TaskBatch
from hamblocks.protocols import reads_given
from hamblocks_ops.arguments import wrong

Progress = Callable[[int, int, str], None]
"""Called with the steps done, the most there can be, and a remark."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        steps: optimizer steps.
        learning_rate: peak learning rate of AdamW.
        batch: fewest sequences in a step.
        tokens: tokens in a step that short sequences are filled up to, by more sequences.
        warm_up: steps in which the learning rate rises linearly.
        final: learning rate at the end over its peak; it falls along a cosine. 1: constant.
        text_weight: weight of the loss of the next token where no answer is asked, against 1 for
            the answers. This loss is what teaches the memory to predict the text.
        weight_decay: of AdamW.
    """

    steps: int = 120
    learning_rate: float = 4e-3
    batch: int = 2
    tokens: int = 1536
    warm_up: int = 20
    final: float = 0.05
    text_weight: float = 0.3
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise wrong("steps", "at least 1", str(self.steps))

    def sequences(self, length: int) -> int:
        """Sequences of this length in a step."""
        return max(self.batch, round(self.tokens / length))

    def rate(self, step: int) -> float:
        """Learning rate of a step over its peak."""
        cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
        return min((step + 1) / self.warm_up, self.final + (1 - self.final) * cosine)


@dataclass
class Trained:
    """What a training took.

    Attributes:
        steps: optimizer steps.
        seconds: time.
        sizes: steps after which the curriculum moved on, and the sizes it moved to.
        accuracy: share of right answers in the last ten steps.
    """

    steps: int
    seconds: float
    accuracy: float
    sizes: list[tuple[int, int]] = field(default_factory=list)


def run(model: Decoder, batch: TaskBatch) -> DecoderOutput:
    """Runs a model on a batch, on the model's device.

    Gates that read a given score get what an oracle knows: 1 for a token that an answer needs, plus
    a number in [0, 0.5) that decides among equals.
    """
    device = next(model.parameters()).device
    score = None
    if any(reads_given(layer.gate) for layer in model.stack.layers):
        noise = torch.rand(batch.label.shape, generator=torch.Generator().manual_seed(0))
        score = (batch.label + 0.5 * noise)[..., None].to(device)
    result: DecoderOutput = model(batch.tokens.to(device), given_score=score)
    return result


def answers(model: Decoder, batch: TaskBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and the mask of the tokens that are asked, of a batch on the model's device.

    Returns:
        Logits `[B, T, vocab]`, target `[B, T]`, asked bool `[B, T]`.
    """
    logits = run(model, batch).logits
    target = batch.target.to(logits.device)
    return logits, target, target != IGNORED


def loss_of(model: Decoder, batch: TaskBatch, text_weight: float) -> tuple[Tensor, float]:
    """The loss of a batch, in nats, and the share of right answers.

    loss = mean of -log p(answer) + text_weight * mean of -log p(next token), the second over all
    tokens at which no answer is asked.
    """
    logits, target, asked = answers(model, batch)
    found = logits[asked]
    loss = cross_entropy(found, target[asked])
    right = float((found.argmax(-1) == target[asked]).float().mean())
    unasked = ~asked[:, :-1]
    if text_weight and bool(unasked.any()):
        following = batch.tokens.to(logits.device)[:, 1:]
        loss = loss + text_weight * cross_entropy(logits[:, :-1][unasked], following[unasked])
    return loss, right


class Trainer:
    """AdamW with warm-up and cosine; a post hook steps the controllers."""

    def __init__(self, model: Decoder, task: Task, recipe: Recipe, seed: int) -> None:
        self.model, self.task, self.recipe = model, task, recipe
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=recipe.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, recipe.rate)
        self.hook = hook_controllers(self.optimizer, model)

    def step(self, size: int) -> float:
        """One optimizer step on sequences of this size; returns the share of right answers."""
        count = self.recipe.sequences(self.task.length(size))
        batch = self.task.batch(count, self.generator, size=size)
        self.model.train()
        loss, right = loss_of(self.model, batch, self.recipe.text_weight)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return right


def train(
    model: Decoder, task: Task, recipe: Recipe, seed: int, progress: Progress | None = None
) -> Trained:
    """Trains a model in place for `recipe.steps` steps at full size."""
    began = time.perf_counter()
    trainer = Trainer(model, task, recipe, seed)
    recent: list[float] = []
    for step in range(recipe.steps):
        recent = [*recent[-9:], trainer.step(task.size)]
        if progress:
            progress(step + 1, recipe.steps, f"accuracy {fmean(recent):.2f}")
    trainer.hook.remove()
    return Trained(recipe.steps, time.perf_counter() - began, fmean(recent))


def train_with_curriculum(
    model: Decoder,
    task: Task,
    recipe: Recipe,
    seed: int,
    *,
    needed: float = 0.9,
    growth: float = 1.5,
    patience: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Trains a model in place, from small sequences to large ones.

    The size grows when five steps in a row have the needed accuracy in the mean. It begins with the
    smallest, and training ends when the full size has it, at the latest after `recipe.steps` steps.
    Short sequences are cheap and many fit in a step, so that recall is learned there.

    Args:
        model: is trained in place.
        task: what it learns.
        recipe: its `steps` are the most that are done, and its learning rate should be constant
            (`final=1`), since nobody knows the end.
        seed: of the sequences.
        needed: accuracy at which the size grows.
        growth: factor by which it grows, by at least one.
        patience: steps after which the size grows whatever the accuracy; None: no limit.
        progress: is told of every step.
    """
    began = time.perf_counter()
    trainer = Trainer(model, task, recipe, seed)
    size, recent, since, step = task.smallest, [0.0], 0, 0
    sizes = [(0, size)]
    for step in range(1, recipe.steps + 1):
        recent = [*recent[-4:], trainer.step(size)] if since else [trainer.step(size)]
        since += 1
        if progress:
            progress(step, recipe.steps, f"{size} facts, accuracy {fmean(recent):.2f}")
        learned = since >= 5 and fmean(recent) >= needed
        if learned and size == task.size:
            break
        if size < task.size and (learned or (patience is not None and since >= patience)):
            size, since = min(max(int(size * growth), size + task.smallest), task.size), 0
            sizes.append((step, size))
    trainer.hook.remove()
    return Trained(step, time.perf_counter() - began, fmean(recent), sizes)


def branch(model: Decoder, onto: Decoder) -> Decoder:
    """Copies the parameters of a model into another one that differs in gates and controllers.

    Args:
        model: the model that was trained.
        onto: the model to copy into; parameters that `model` does not have stay as they are.

    Returns:
        `onto`.

    Raises:
        ValueError: the model has a parameter that `onto` lacks, or of another shape.
    """
    there = dict(onto.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in there or there[name].shape != parameter.shape:
                raise wrong("onto", f"a model with the parameter {name}", "none of that shape")
            there[name].copy_(parameter)
    return onto


@dataclass
class Measured:
    """What a model does on held-out sequences.

    Attributes:
        accuracy: share of right answers to questions.
        loss: mean of -log p(answer), nats, over all tokens that are scored.
        question_loss: the same over questions alone. Where only questions are scored it is `loss`.
        keep_fraction: share of the tokens that are stored at the end.
        kept: the same for filler, keys, values and questions.
        kept_labelled: the same for the tokens that an answer needs.
    """

    accuracy: float
    loss: float
    question_loss: float
    keep_fraction: float
    kept: list[float]
    kept_labelled: float


@torch.no_grad()
def measure(
    model: Decoder, task: Task, seed: int, *, sequences: int = 32, at_once: int = 8
) -> Measured:
    """Measures a model in eval mode on sequences that training has not drawn."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    right, losses, question_losses, scored, questions, seen = 0, 0.0, 0.0, 0, 0, 0
    stored, total = torch.zeros(6), torch.zeros(6)
    while seen < sequences:
        batch = task.batch(min(at_once, sequences - seen), generator)
        seen += len(batch.tokens)
        result = run(model, batch)
        target = batch.target.to(result.logits.device)
        asked = target != IGNORED
        question = (batch.kind.to(target.device) == QUESTION)[asked]
        found = result.logits[asked]
        lost = cross_entropy(found, target[asked], reduction="none")
        right += int((found.argmax(-1) == target[asked])[question].sum())
        losses += float(lost.sum())
        question_losses += float(lost[question].sum())
        scored += int(asked.sum())
        questions += int(question.sum())
        kept = torch.stack([_kept(stats).cpu() for stats in result.stats]).mean(0)
        groups = [batch.kind == kind for kind in range(4)]
        groups += [batch.label, torch.ones_like(batch.label)]
        stored += torch.stack([kept[group].sum() for group in groups])
        total += torch.stack([group.sum() for group in groups])
    shares = (stored / total.clamp(min=1)).tolist()
    return Measured(
        accuracy=right / questions,
        loss=losses / scored,
        question_loss=question_losses / questions,
        keep_fraction=shares[5],
        kept=shares[:4],
        kept_labelled=shares[4],
    )


def _kept(stats: Any) -> Tensor:
    """Share of the heads that store each token to the end, float32 `[B, T]`."""
    if stats.evict_at is None:
        return torch.zeros(stats.position.shape, device=stats.position.device)
    last = stats.position[:, -1:, None]
    kept: Tensor = (stats.evict_at > last).float().mean(-1)
    return kept
