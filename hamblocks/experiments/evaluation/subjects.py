"""One interface to the models that are evaluated: converted ones, and those of transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hamblocks.experiments.evaluation.policies import Plan
from hamblocks.layer import HAMLayer
from hamblocks.models.attached import AttachedPolicy, attach_policy
from hamblocks.models.cache import CACHE, HAMCache, StateCache
from hamblocks.models.copying import attention_layers
from hamblocks.models.key_value_memory import KeyValueMemory
from hamblocks.models.modeling import HAMForCausalLM
from hamblocks.outputs import LayerStats
from hamblocks.protocols import Gate, HasMetric, LayerDims
from hamblocks_ops.arguments import wrong


class Called(NamedTuple):
    """Logits `[N, T, V]` of a call, and what each layer decided."""

    logits: Tensor
    stats: list[LayerStats]


class Subject(Protocol):
    """A model whose layers store by a policy that can be changed.

    Attributes:
        layers: the layers that store by the policy.
        own: the gate of each layer as the model came, or None.
    """

    layers: list[HAMLayer]
    own: list[Gate | None]

    def cache(self) -> StateCache:
        """An empty cache."""
        ...

    def __call__(self, tokens: Tensor, cache: StateCache | None = None, keep: int = 0) -> Called:
        """Reads tokens `[N, T]`, after those that the cache has seen.

        Logits are those of the last `keep` tokens, 0: of all. In SmolLM2 they take a quarter of the
        time.
        """
        ...


class Plain:
    """A model of transformers with an attached policy."""

    def __init__(self, model: PreTrainedModel, policy: AttachedPolicy) -> None:
        self.model, self.policy, self.layers = model, policy, policy.layers
        self.own: list[Gate | None] = [None] * len(self.layers)

    def cache(self) -> StateCache:
        """An empty cache."""
        return self.policy.cache()

    def __call__(self, tokens: Tensor, cache: StateCache | None = None, keep: int = 0) -> Called:
        """See `Subject`."""
        logits = self.model(tokens, logits_to_keep=keep, **_given(cache)).logits
        return Called(logits, [stats for stats in self.policy.stats if stats is not None])


class Converted:
    """A `HAMForCausalLM`, whose selectors are moved; layers without one store everything."""

    def __init__(self, model: HAMForCausalLM) -> None:
        self.model = model
        self.layers = [layer for layer in attention_layers(model) if layer.selector is not None]
        if not self.layers:
            raise wrong("model", "one with selectors to move", "one that stores everything")
        self.own = [layer.gate for layer in self.layers]

    def cache(self) -> StateCache:
        """An empty cache."""
        return HAMCache(self.model.config)

    def __call__(self, tokens: Tensor, cache: StateCache | None = None, keep: int = 0) -> Called:
        """See `Subject`."""
        output = self.model(tokens, logits_to_keep=keep, **_given(cache))
        stats = [one for one in output.stats if one.evict_at is not None]
        return Called(output.logits, stats)


def _given(cache: StateCache | None) -> dict[str, Any]:
    return {"use_cache": False} if cache is None else {CACHE: cache}


@contextlib.contextmanager
def subject_of(model: PreTrainedModel, plan: Plan) -> Iterator[Subject]:
    """The subject of a model, which is as it was when the context ends."""
    training = model.training
    model.eval()
    try:
        if not isinstance(model, HAMForCausalLM):

            def parts(layer: int, dims: LayerDims) -> dict[str, Any]:
                return {"memory": KeyValueMemory(plan.beta, plan.decay)}

            with attach_policy(model, parts) as policy:
                yield Plain(model, policy)
            return
        subject = Converted(model)
        before = [(layer.gate, layer.selector) for layer in subject.layers]
        try:
            yield subject
        finally:
            for layer, (gate, selector) in zip(subject.layers, before, strict=True):
                replace(layer, "gate", gate)
                replace(layer, "selector", selector)
    finally:
        model.train(training)


def set_parts(subject: Subject, gates: list[Gate | None], selectors: list[Any]) -> None:
    """Gives every layer a gate and a selector."""
    for layer, gate, selector in zip(subject.layers, gates, selectors, strict=True):
        replace(layer, "gate", gate)
        replace(layer, "selector", selector)
        if isinstance(subject, Plain):
            # the memory only scores: where no gate reads its error, it costs nothing
            memory = layer.__dict__.setdefault("scoring_memory", [layer.memory])[0]
            layer.memory = memory if isinstance(gate, HasMetric) else None
        weight = next(subject.model.parameters())  # type: ignore[attr-defined]
        if isinstance(gate, torch.nn.Module):
            gate.to(weight.device).eval()


def replace(layer: HAMLayer, name: str, part: object) -> None:
    """Replaces a part; a module may take the place of a plain object and the other way round."""
    delattr(layer, name)
    setattr(layer, name, part)
