"""Policies of a study, as JSON: what scores a token, and how budgets are shared out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from hamblocks.controllers.tau import number
from hamblocks.experiments.gates import EvenlySpaced
from hamblocks.gates import RandomGate, SharedGate
from hamblocks.gates.around import AroundGate
from hamblocks.models.policies import part_of
from hamblocks.protocols import Gate, GateOutput, MemoryTrace, Selection, check_count
from hamblocks.selectors import Composable, FirstTokens, HeadThresholds, Window
from hamblocks_ops.arguments import wrong

STORES = ("threshold", "everything", "window")
DECISIONS = ("layer", "head")
HEADS = (None, "copying")
ONLY_HERE = ("evenly_spaced", "own")
"""Gates that are no parts of a model: a control, and the gate that a converted model has."""


@dataclass(frozen=True)
class Policy:
    """What a model stores.

    Attributes:
        name: for tables.
        store: "threshold": window, sinks and what reaches a threshold; "window": window and sinks;
            "everything".
        gate: JSON of a gate, or `{"type": "evenly_spaced"}`, or `{"type": "own"}` for the gate of a
            converted model. A gate "random_gate" without a seed gets that of the documents.
        decisions: "layer": one decision for all heads of a layer; "head": one per key/value head.
        heads: "copying": the heads that copy (see `hamblocks.models.copying_by_head`) store
            everything, as many as the budget allows.
        share: of the budget, for those heads; the gate decides about the rest.
    """

    name: str
    store: str = "threshold"
    gate: dict[str, Any] | None = None
    decisions: str = "layer"
    heads: str | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        where = f"policy {self.name!r}: "
        if self.store not in STORES:
            raise wrong(f"{where}store", f"one of {', '.join(STORES)}", repr(self.store))
        if self.decisions not in DECISIONS:
            raise wrong(f"{where}decisions", "layer or head", repr(self.decisions))
        if self.heads not in HEADS:
            raise wrong(f"{where}heads", '"copying" or none', repr(self.heads))
        if not 0 <= number(f"{where}share", self.share) <= 1:
            raise wrong(f"{where}share", "a number in [0, 1]", self.share)
        if self.heads is None and self.share != 1:
            raise wrong(f"{where}share", 'heads = "copying" beside it', "none")
        needs_gate = self.store == "threshold" and (self.heads is None or self.share < 1)
        if needs_gate != (self.gate is not None):
            expected = "a gate" if needs_gate else "none, as nothing reads a score"
            raise wrong(f"{where}gate", expected, repr(self.gate))
        if self.gate is not None and self.gate.get("type") not in ONLY_HERE:
            part_of("gate", self.gate)

    @property
    def fixed(self) -> bool:
        """Whether it stores the same at every fraction."""
        return self.store != "threshold"

    def gate_part(self, seed: int, own: Gate | None) -> Gate:
        """A new gate.

        Args:
            seed: for a random gate that names none.
            own: the gate that the layer came with, or None.

        Raises:
            ValueError: the policy asks for the model's own gate, and there is none.
        """
        if self.gate is None:  # budgets of heads alone: any score will do
            return EvenlySpaced()
        kind = self.gate["type"]
        if kind == "own":
            if own is None:
                raise wrong(f"policy {self.name!r}", "a converted model, for its own gate", "none")
            return copy.copy(own)
        if kind == "evenly_spaced":
            return EvenlySpaced()
        if kind == "random_gate" and "seed" not in self.gate:
            return RandomGate(**{k: v for k, v in self.gate.items() if k != "type"}, seed=seed)
        made: Gate = part_of("gate", self.gate)
        return made


@dataclass(frozen=True)
class Plan:
    """The content of a policy file.

    Attributes:
        policies: what is compared.
        fractions: of the tokens that are stored for good, beside window and sinks.
        window: the last tokens, which every policy stores.
        sinks: the first tokens, which every policy stores.
        seeds: of documents and random gates.
        count: documents of each seed.
        length: tokens of a document.
        lines: lines with a key and a value in every second document; the others hold a passkey.
        calibration: documents that thresholds are set on, of the same length.
        beta: write strength of the memory that scores tokens in a model without one.
        decay: its decay.
    """

    policies: tuple[Policy, ...]
    fractions: tuple[float, ...] = (0.05, 0.1, 0.15, 0.25, 0.5)
    window: int = 64
    sinks: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    count: int = 4
    length: int = 1024
    lines: int = 2
    calibration: int = 2
    beta: float = 0.5
    decay: float = 0.0

    def __post_init__(self) -> None:
        names = [policy.name for policy in self.policies]
        if not names or len(set(names)) < len(names):
            raise wrong("policies", "one or more, with names that differ", names)
        for fraction in self.fractions:
            if not 0 < number("fractions", fraction) <= 1:
                raise wrong("fractions", "numbers in (0, 1]", self.fractions)
        for name in ("window", "sinks", "lines"):
            check_count(name, getattr(self, name))
        for name in ("count", "length", "calibration"):
            check_count(name, getattr(self, name), 1)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise wrong("seeds", "one or more that differ", self.seeds)

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Reads a policy file.

        Raises:
            ValueError: it is no JSON object, or a field is unknown or wrong.
        """
        try:
            given = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise wrong("policies", "a JSON file", f"{path.name}: {error}") from error
        return cls.of(given)

    @classmethod
    def of(cls, given: object) -> Plan:
        """A plan from what a policy file holds."""
        fields = cls.__dataclass_fields__
        if not isinstance(given, Mapping) or not set(given) <= set(fields):
            raise wrong("policies", f"an object with {', '.join(fields)}", given)
        policies = given.get("policies")
        if not isinstance(policies, Sequence) or isinstance(policies, str):
            raise wrong("policies", "a list of policies", policies)
        known = Policy.__dataclass_fields__
        for policy in policies:
            if (
                not isinstance(policy, Mapping)
                or "name" not in policy
                or not set(policy) <= set(known)
            ):
                raise wrong("policies", f"objects with {', '.join(known)}", policy)
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
        }
        plain["policies"] = tuple(Policy(**policy) for policy in policies)
        return cls(**plain)

    def to_json(self) -> dict[str, Any]:
        """Lists, dicts, numbers and strings."""
        result: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return result


@final
class PerHead(AroundGate):
    """A score for every key/value head, where another gate gives one for all or one per query head."""

    def __init__(self, gate: Gate, heads: int) -> None:
        super().__init__(gate)
        self.heads = heads

    def forward(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns the score `[B, T, Hkv]`."""
        score, bias = self.gate(x, trace)
        if score.shape[2] > self.heads:
            score = score.unflatten(2, (self.heads, -1)).mean(3)
        return GateOutput(score.repeat_interleave(self.heads // score.shape[2], 2), bias)


@final
class AtQuantile(Composable):
    """Sets its thresholds at quantiles of the first call's scores, and keeps them.

    Attributes:
        fractions: of the tokens that a head stores; one number for all heads, or one each.
        taus: the thresholds, None before the first call.
    """

    def __init__(self, fractions: Sequence[float]) -> None:
        super().__init__()
        self.fractions = list(fractions)
        self.taus: list[float] | None = None

    def frozen(self) -> HeadThresholds:
        """A selector with the thresholds."""
        assert self.taus is not None
        return HeadThresholds(self.taus)

    def forward(self, score: Tensor, ledger: None = None, **kwargs: Any) -> Selection:
        """See `hamblocks.protocols.Selector`."""
        if self.taus is None:
            heads = score.float().flatten(0, 1).unbind(-1)
            fractions = self.fractions * (len(heads) if len(self.fractions) == 1 else 1)
            pairs = zip(heads, fractions, strict=True)
            self.taus = [_threshold(column, fraction) for column, fraction in pairs]
        selection: Selection = self.frozen()(score, ledger, **kwargs)
        return selection


def _threshold(scores: Tensor, fraction: float) -> float:
    """The threshold that a fraction of scores `[n]` reaches."""
    if fraction <= 0 or fraction >= 1:
        return float("inf") if fraction <= 0 else float("-inf")
    return float(torch.quantile(scores, 1 - fraction))


def shared_out(
    policy: Policy, fraction: float, copying: Callable[[], Tensor], layers: int, heads: int
) -> list[list[float]]:
    """The fraction of every layer and of every head that decides.

    Args:
        policy: a policy with a threshold.
        fraction: the budget, mean over all heads.
        copying: returns how much each head copies, `[layers, heads]`.
        layers: of the model that store by the policy.
        heads: key/value heads of a layer.
    """
    if policy.heads is None:
        return [[fraction] * (heads if policy.decisions == "head" else 1)] * layers
    full = int(policy.share * fraction * layers * heads)
    left = layers * heads - full
    rest = 0.0 if policy.gate is None or not left else (fraction * layers * heads - full) / left
    order = copying().flatten().argsort(descending=True)
    each = torch.full((layers * heads,), rest)
    each[order[:full]] = 1.0
    result: list[list[float]] = each.view(layers, heads).tolist()
    return result


def gate_of(policy: Policy, seed: int, own: Gate | None, heads: int) -> Gate:
    """The gate of one layer, with as many heads as decide."""
    gate = policy.gate_part(seed, own)
    apart = policy.heads is not None or policy.decisions == "head"
    return PerHead(gate, heads) if apart else SharedGate(gate)


def around(selector: Any, plan: Plan) -> Any:
    """A selector beside the window and the sinks, which every policy stores."""
    return selector | Window(plan.window) | FirstTokens(plan.sinks)


def _policy(name: str, kind: str, **arguments: Any) -> Policy:
    apart = {k: arguments.pop(k) for k in ("decisions", "heads", "share") if k in arguments}
    return Policy(name, gate={"type": kind, **arguments}, **apart)


DEFAULT = Plan(
    (
        Policy("everything", store="everything"),
        Policy("window and sinks", store="window"),
        _policy("random", "random_gate"),
        _policy("evenly spaced", "evenly_spaced"),
        _policy("key norm", "key_norm"),
        _policy("value norm", "value_norm"),
        _policy("prediction error, cosine", "prediction_error", metric="cosine"),
        _policy("prediction error, relative l2", "prediction_error", metric="relative_l2"),
        _policy("prediction error, l2", "prediction_error", metric="l2"),
        _policy("written error", "committed_write"),
        Policy("copying heads", heads="copying"),
        _policy("copying heads and key norm", "key_norm", heads="copying", share=0.75),
    )
)
"""What is compared where no policy file is given."""

QUICK = Plan(
    tuple(
        policy
        for policy in DEFAULT.policies
        if policy.name
        in (
            "everything",
            "window and sinks",
            "random",
            "key norm",
            "prediction error, l2",
            "copying heads",
        )
    ),
    fractions=(0.15, 0.25),
    seeds=(0,),
    count=2,
    length=640,
    calibration=1,
)
"""A plan for a few minutes."""
