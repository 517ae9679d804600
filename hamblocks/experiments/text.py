"""Trains models of equal size that differ in one part, and measures what they store and predict."""

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
from hamblocks.decoder import Decoder
from hamblocks.experiments.corpus import Corpus
from hamblocks.gates import PredictionError, RandomGate
from hamblocks.layer import HAMLayer
from hamblocks.protocols import Gate, Selector
from hamblocks.selectors import Threshold, Window

FRACTIONS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
"""The keep fractions at which the trained model is measured."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment. With the defaults it takes less than five minutes on two cores."""

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
    held_out_sequences: int = 64
    growth_length: int = 2048

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")


class Run(NamedTuple):
    """One model, measured on held-out text.

    Attributes:
        name: what the model is.
        bits_per_byte: held-out loss.
        keep_fraction: fraction of the tokens still stored at the end, over all heads and layers.
        cache_bytes_per_token: bytes of the keys and values stored at the end, of all layers, per
            token seen.
        seconds: training time; 0 for a model that was only moved to another keep fraction.
    """

    name: str
    bits_per_byte: float
    keep_fraction: float
    cache_bytes_per_token: float
    seconds: float


class Growth(NamedTuple):
    """How the cache of a sequence grows.

    Attributes:
        name: what the text is.
        tokens: numbers of tokens seen.
        stored: tokens stored after each of them, mean over sequences, layers and heads.
    """

    name: str
    tokens: list[int]
    stored: list[float]


@dataclass
class Results:
    """Everything that was measured, and the settings."""

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
        """Lists and dicts of numbers and strings."""
        plain = dict(vars(self), settings=vars(self.settings))
        for name in ("models", "trade_off", "growth"):
            plain[name] = [row._asdict() for row in plain[name]]
        return plain


Progress = Callable[[str, int, int, str], None]
"""Called with the name of the work, the steps done, the number of steps, and a remark."""


def run(settings: Settings, corpus: Corpus, progress: Progress) -> Results:
    """Runs the whole experiment, on a GPU if there is one."""
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {}
    runs = []
    for name, gate, selector in _variants(settings):
        torch.manual_seed(settings.seed)
        models[name] = _model(settings, gate, selector).to(device)

        def step(done: int, remark: str, name: str = name) -> None:
            progress(name, done, settings.steps, remark)

        seconds = _train(models[name], settings, corpus, step)
        runs.append(_measure(name, models[name], settings, corpus, seconds))
    (ham,) = (model for name, model in models.items() if name.startswith("HAM"))
    results = Results(
        settings=settings,
        source=corpus.source,
        train_bytes=len(corpus.train),
        held_out_bytes=len(corpus.held_out),
        parameters=sum(weight.numel() for weight in ham.parameters()),
        device=_device_name(device),
        torch=torch.__version__,
        models=runs,
        trade_off=_move_threshold(ham, settings, corpus, progress),
        growth=list(_grow(ham, settings, corpus)),
    )
    results.seconds = time.perf_counter() - began
    return results


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def _move_threshold(
    ham: Decoder, settings: Settings, corpus: Corpus, progress: Progress
) -> list[Run]:
    """Measures a trained model at every keep fraction; its thresholds are then set back."""
    what = "moving the threshold"
    controllers = [module for module in ham.modules() if isinstance(module, TargetFraction)]
    trained = [float(controller.tau) for controller in controllers]
    runs = []
    for done, fraction in enumerate(FRACTIONS):
        progress(what, done, len(FRACTIONS), "")
        for controller in controllers:
            controller.set_fraction(fraction)
        name = f"that HAM, moved to {fraction:.0%}"
        runs.append(_measure(name, ham, settings, corpus, 0.0))
    for controller, tau in zip(controllers, trained, strict=True):
        controller.set_threshold(tau)
    progress(what, len(FRACTIONS), len(FRACTIONS), "")
    return runs


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
    """Trains the model in place; returns the seconds that took."""
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
        tokens = corpus.batch(settings.length, settings.batch, generator).to(device)
        loss = _loss(model, tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, f"{float(loss.detach()) / math.log(2):.2f} bits per byte")
    return time.perf_counter() - began


def _loss(model: Decoder, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next byte, in nats."""
    return cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def _measure(name: str, model: Decoder, settings: Settings, corpus: Corpus, seconds: float) -> Run:
    """Measures the held-out loss, and what the layers store while they read the text."""
    device = next(model.parameters()).device
    model.eval()
    losses, kept, stored_bytes, seen = [], [], 0.0, 0
    for tokens in corpus.sequences(settings.length, settings.held_out_sequences).split(16):
        tokens = tokens.to(device)
        result = model(tokens[:, :-1], state=model.init_state(len(tokens)))
        losses.append(float(cross_entropy(result.logits.flatten(0, 1), tokens[:, 1:].flatten())))
        kept.append(fmean(float(stats.keep_fraction()) for stats in result.stats))
        seen += len(tokens) * settings.length
        for state in result.state or []:
            sizes = None if state.cache is None else state.cache.sizes
            if state.cache is None or sizes is None:
                continue  # a layer without attention stores nothing
            per_token = 2 * sizes.head_dim * sizes.dtype.itemsize
            stored_bytes += float(state.cache.tokens.sum()) * per_token
    return Run(name, fmean(losses) / math.log(2), fmean(kept), stored_bytes / seen, seconds)


@torch.no_grad()
def _grow(model: Decoder, settings: Settings, corpus: Corpus) -> Iterator[Growth]:
    """The cache over long sequences: of held-out text, and of one short passage repeated."""
    device = next(model.parameters()).device
    length = min(settings.growth_length, len(corpus.held_out) // 2)
    fresh = corpus.sequences(length, 8)[:, :length]
    passage = 32
    repetitive = fresh[:, :passage].repeat(1, length // passage + 1)[:, :length]
    for name, tokens in (
        ("fresh text", fresh),
        (f"one passage of {passage} bytes, repeated", repetitive),
    ):
        result = model(tokens.to(device))
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
