"""The configuration of a model in transformers: sizes, the kind of every layer, and policies as plain JSON."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig

from hamblocks.models.policies import Policy, complete, describe, make
from hamblocks.protocols import check_count
from hamblocks_ops.arguments import wrong

LAYER_TYPES = {
    "hybrid": ("memory", "gate", "selector", "attention", "combiner"),
    "linear_attention": ("memory", "combiner"),
    "full_attention": ("attention", "combiner"),
}
"""Kinds of layers, under the names that transformers has for them, and the policies that each reads."""

DEFAULTS: dict[str, Policy] = {
    "memory": {"type": "gated_delta_memory"},
    "gate": {"type": "prediction_error"},
    "selector": {
        "type": "any_of",
        "of": [
            {"type": "threshold", "controller": {"type": "target_fraction", "fraction": 0.25}},
            {"type": "window", "width": 64},
        ],
    },
    "attention": {"type": "selected_attention"},
    "combiner": {"type": "gated_sum"},
}


class HAMConfig(PreTrainedConfig):
    """Configuration of a `HAMModel`.

        HAMConfig(
            hidden_size=512,
            num_hidden_layers=4,
            layer_types=["linear_attention", "hybrid", "hybrid", "full_attention"],
            selector=Threshold(TargetFraction(0.1)) | Window(32),
        )

    A policy (`memory`, `gate`, `selector`, `attention`, `combiner`) is JSON as `hamblocks.models.policies` has it, or
    one of hamblocks' own parts, of which the JSON is kept; one for all layers, or a list with one for every layer.

    Attributes:
        vocab_size: how many tokens there are.
        hidden_size: width of the model.
        intermediate_size: inner width of the MLPs; None: 8/3 of the hidden size.
        num_hidden_layers: how many blocks.
        num_attention_heads: query heads, and heads of the memory.
        num_key_value_heads: a divisor of num_attention_heads; None: as many.
        head_dim: None: hidden_size // num_attention_heads.
        layer_types: for every layer "hybrid" (memory and attention over what the selector stores), "linear_attention"
            (the memory alone) or "full_attention" (attention over everything); None: all hybrid.
        memory: policy of the memory; None: the gated delta rule.
        gate: policy of the gate; None: the cosine prediction error.
        selector: policy of the selector; None: a quarter of the tokens for good, and the last 64.
        attention: policy of attention; None: with rotary positions and query/key norm.
        combiner: policy of the combiner; None: the gated sum.
        rope_theta: base of the rotary wavelengths, where the policy of attention names none; None: no positions.
        rms_norm_eps: epsilon of the blocks' norms.
        initializer_range: standard deviation of new weights.
        use_cache: return the cache, outside of training.
        tie_word_embeddings: the head's weights are the embedding's.
        own_layers: set by a model whose layers came from `layer=`: it cannot be loaded without it.
    """

    model_type = "ham"
    keys_to_ignore_at_inference = ["past_key_values", "stats"]  # noqa: RUF012 - transformers' own form

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    layer_types: list[str] | None = None
    memory: Any = None
    gate: Any = None
    selector: Any = None
    attention: Any = None
    combiner: Any = None
    rope_theta: float | None = 10_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    own_layers: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Checks the arguments and completes what was left out.

        Raises:
            ValueError: a bad argument; the message names it, what was expected and what came.
        """
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            check_count(name, getattr(self, name), 1)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                expected = (
                    f"a multiple of num_attention_heads = {self.num_attention_heads}, or head_dim"
                )
                raise wrong("hidden_size", expected, f"{self.hidden_size}")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = self.hidden_size * 8 // 3
        if self.layer_types is None:
            self.layer_types = ["hybrid"] * self.num_hidden_layers
        unknown = sorted({str(kind) for kind in self.layer_types if kind not in LAYER_TYPES})
        if unknown:
            raise wrong("layer_types", f"only {', '.join(LAYER_TYPES)}", ", ".join(unknown))
        if len(self.layer_types) != self.num_hidden_layers:
            raise wrong(
                "layer_types",
                f"num_hidden_layers = {self.num_hidden_layers} of them",
                f"{len(self.layer_types)}",
            )
        for kind in DEFAULTS:
            setattr(self, kind, self._completed(kind, getattr(self, kind)))
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers has it; what `from_pretrained(..., selector=...)` changes is checked and completed alike."""
        changed = {
            name: kwargs.pop(name) for name in list(kwargs) if name in HAMConfig.__annotations__
        }
        return super().from_dict({**config_dict, **changed}, **kwargs)

    def policy(self, kind: str, layer: int) -> Policy:
        """The policy of one layer: kind is memory, gate, selector, attention or combiner."""
        policy = getattr(self, kind)
        chosen: Policy = policy[layer] if isinstance(policy, list) else policy
        return chosen

    def _completed(self, kind: str, policy: object) -> Policy | list[Policy]:
        """The policy as JSON with every argument, once made so that a bad value is found here."""
        if isinstance(policy, (list, tuple)):
            if len(policy) != self.num_hidden_layers:
                raise wrong(
                    kind,
                    f"one policy, or num_hidden_layers = {self.num_hidden_layers}",
                    f"{len(policy)}",
                )
            completed = [self._completed(kind, one) for one in policy]
            return [one for one in completed if isinstance(one, dict)]
        if policy is None:
            policy = copy.deepcopy(DEFAULTS[kind])
        if not isinstance(policy, dict):
            policy = describe(kind, policy)
        elif kind == "attention":
            policy = {"rope_theta": self.rope_theta, **policy}
        policy = complete(kind, policy)
        make(kind, policy)
        return policy
