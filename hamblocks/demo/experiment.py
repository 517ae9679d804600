"""Trains models of equal size that differ in one part, and measures what each keeps and what it predicts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hamblocks.controllers import TargetFraction, hook_controllers
from hamblocks.demo.corpus import Corpus
from hamblocks.gates import PredictionError, RandomGate
from hamblocks.layer import HAMLayer
from hamblocks.models import Decoder
from hamblocks.protocols import Gate, Selector
from hamblocks.selectors import Threshold, Window

FRACTIONS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Keep fractions that the trained model's threshold is moved through."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment. The defaults take under five minutes on two cores."""

    steps: int = 550
    seed: int = 0
    target: float = 0.25
    hidden_size: int = 128
    num_heads: int = 2
    num_layers: int = 2
    length: int = 512
    window: int = 16
    batch: int = 2
    learning_rate: float = 4e-3
    held_out_rows: int = 64
    growth_length: int = 2048

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")


class Run(NamedTuple):
    """One model, measured on held-out text.

    Attributes:
        name: what it is.
        bits_per_byte: held-out loss.
        keep_fraction: tokens stored at the end, of all tokens, heads and layers.
        cache_bytes_per_token: of keys and values stored at the end, over the tokens seen, all layers.
        seconds: training time; 0 for a model that was not trained anew.
    """

    name: str
    bits_per_byte: float
    keep_fraction: float
    cache_bytes_per_token: float
    seconds: float


class Growth(NamedTuple):
    """How the cache of one sequence grows: stored tokens, a mean over layers and heads, at every `tokens`."""

    name: str
    tokens: list[int]
    stored: list[float]


@dataclass
class Results:
    """All that was measured, and under which settings."""

    settings: Settings
    source: str
    train_bytes: int
    held_out_bytes: int
    parameters: int
    device: str
    torch: str
    models: list[Run] = field(default_factory=list)
    trade_off: list[Run] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        plain = dict(vars(self), settings=vars(self.settings))
        for name in ("models", "trade_off", "growth"):
            plain[name] = [row._asdict() for row in plain[name]]
        return plain


Progress = Callable[[str, int, int, str], None]
"""Called with what is done, steps done, steps in all, and a remark."""


def run(settings: Settings, corpus: Corpus, progress: Progress) -> Results:
    """Runs the whole experiment, on a GPU where there is one."""
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = None
    ham = None
    for name, gate, selector in _variants(settings):
        torch.manual_seed(settings.seed)
        model = _model(settings, gate, selector).to(device)
        if results is None:
            processor = (
                torch.cuda.get_device_name()
                if device.type == "cuda"
                else f"{torch.get_num_threads()} CPU threads"
            )
            results = Results(
                settings=settings,
                source=corpus.source,
                train_bytes=len(corpus.train),
                held_out_bytes=len(corpus.held_out),
                parameters=sum(p.numel() for p in model.parameters()),
                device=processor,
                torch=torch.__version__,
            )

        def step(done: int, remark: str, name: str = name) -> None:
            progress(name, done, settings.steps, remark)

        seconds = _train(model, settings, corpus, step)
        results.models.append(_measure(name, model, settings, corpus, seconds))
        if name.startswith("HAM"):
            ham = model
    assert results is not None
    assert ham is not None
    controllers = [module for module in ham.modules() if isinstance(module, TargetFraction)]
    trained = [float(controller.tau) for controller in controllers]
    for done, fraction in enumerate(FRACTIONS):
        progress("moving the threshold", done, len(FRACTIONS), "")
        for controller in controllers:
            controller.set_fraction(fraction)
        results.trade_off.append(
            _measure(f"that HAM, moved to {fraction:.0%}", ham, settings, corpus, 0.0)
        )
    for controller, tau in zip(controllers, trained, strict=True):
        controller.set_threshold(tau)
    results.growth = list(_grow(ham, settings, corpus))
    progress("moving the threshold", len(FRACTIONS), len(FRACTIONS), "")
    results.seconds = time.perf_counter() - began
    return results


def _variants(
    settings: Settings,
) -> Iterator[tuple[str, Callable[[int], Gate], Callable[[], Selector]]]:
    def surprise(_layer: int) -> Gate:
        return PredictionError("cosine")

    def chance(layer: int) -> Gate:
        return RandomGate(settings.seed + layer)

    def target() -> Selector:
        return Threshold(TargetFraction(settings.target, rate=0.3)) | Window(settings.window)

    yield "memory alone", surprise, lambda: Threshold(math.inf)
    yield "attention over everything", surprise, lambda: Threshold(-math.inf)
    yield f"HAM, {settings.target:.0%}", surprise, target
    yield f"random routing, {settings.target:.0%}", chance, target


def _model(
    settings: Settings, gate: Callable[[int], Gate], selector: Callable[[], Selector]
) -> Decoder:
    return Decoder(
        256,
        settings.num_layers,
        lambda layer: HAMLayer(
            settings.hidden_size, settings.num_heads, gate=gate(layer), selector=selector()
        ),
    )


def _train(
    model: Decoder, settings: Settings, corpus: Corpus, progress: Callable[[int, str], None]
) -> float:
    """Trains in place; returns seconds."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    warm_up = max(settings.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warm_up, 0.05 + 0.95 * (1 + math.cos(math.pi * step / settings.steps)) / 2
        ),
    )
    hook_controllers(optimizer, model)
    generator = torch.Generator().manual_seed(settings.seed)
    began = time.perf_counter()
    model.train()
    for step in range(settings.steps):
        rows = corpus.batches(settings.length, settings.batch, generator).to(device)
        loss = _loss(model, rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, f"{float(loss.detach()) / math.log(2):.2f} bits per byte")
    return time.perf_counter() - began


def _loss(model: Decoder, rows: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next byte, in nats."""
    return cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def _measure(name: str, model: Decoder, settings: Settings, corpus: Corpus, seconds: float) -> Run:
    """Held-out loss, and what the layers stored while reading it."""
    device = next(model.parameters()).device
    model.eval()
    losses, kept, stored_bytes, tokens = [], [], 0.0, 0
    for rows in corpus.rows(settings.length, settings.held_out_rows).split(16):
        rows = rows.to(device)
        result = model(rows[:, :-1], state=model.init_state(len(rows)))
        losses.append(float(cross_entropy(result.logits.flatten(0, 1), rows[:, 1:].flatten())))
        kept.append(fmean(float(stats.keep_fraction()) for stats in result.stats))
        tokens += rows.shape[0] * settings.length
        for state in result.state or []:
            per_token = 2 * state.cache.head_dim * state.cache.dtype.itemsize
            stored_bytes += float(state.cache.tokens.sum()) * per_token
    return Run(name, fmean(losses) / math.log(2), fmean(kept), stored_bytes / tokens, seconds)


@torch.no_grad()
def _grow(model: Decoder, settings: Settings, corpus: Corpus) -> Iterator[Growth]:
    """The cache over one long sequence: held-out text as it comes, and one short passage of it over and over."""
    device = next(model.parameters()).device
    length = min(settings.growth_length, len(corpus.held_out) // 2)
    fresh = corpus.rows(length, 8)[:, :length]
    passage = 32
    repetitive = fresh[:, :passage].repeat(1, length // passage + 1)[:, :length]
    for name, rows in (
        ("fresh text", fresh),
        (f"one passage of {passage} bytes, repeated", repetitive),
    ):
        result = model(rows.to(device))
        at = list(range(0, length, max(length // 128, 1)))
        stored = [
            fmean(
                float(
                    ((stats.position <= t)[..., None] & (t < stats.evict_at)).sum(1).double().mean()
                )
                for stats in result.stats
            )
            for t in at
        ]
        yield Growth(name, [t + 1 for t in at], stored)
