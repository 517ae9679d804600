"""The configuration of a model in transformers: sizes, the kinds of layers, policies as JSON.

Importing this file registers the configuration with `AutoConfig`. A configuration that is made or
loaded imports the models, which registers them too: until then they cost no time.
"""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from hamblocks.models.policies import Policy, complete, part_of, policy_of
from hamblocks.models.tensor_parallel import HAS_PLANS, LAYERS
from hamblocks.protocols import PARTS, check_count
from hamblocks.saved import check_format
from hamblocks_ops.arguments import wrong

FORMAT = 1
"""The format of a saved configuration. A change that older code would misread raises it."""

LAYER_TYPES = {
    "hybrid": PARTS,
    "linear_attention": ("memory", "combiner"),
    "full_attention": ("attention", "combiner"),
}
"""Kinds of layers, by the names that transformers has for them, and the policies each reads."""

DEFAULTS: dict[str, Policy | None] = {
    "memory": {"type": "gated_delta_memory"},
    "gate": {"type": "prediction_error"},
    "selector": {
        "type": "any_of",
        "of": [
            {"type": "threshold", "controller": {"type": "target_fraction", "fraction": 0.25}},
            {"type": "window", "width": 64},
        ],
    },
    "query_gate": None,
    "attention": {"type": "selected_attention"},
    "combiner": {"type": "gated_sum"},
}
"""The policies that a configuration does not state."""

OTHER_NAMES = {
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "num_layers": "num_hidden_layers",
    "attention_bias": "qkv_bias, and bias in the policy of the combiner",
    "rope_parameters": "rope_theta, and rope_scaling in the policy of attention",
    "rope_scaling": "rope_scaling in the policy of attention",
}
"""Arguments that would be a second statement of another one, which transformers would ignore."""


MLP_TYPES = ("dense", "sparse")
"""Kinds of MLPs, by the names that transformers has for them."""

EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
"""Arguments that a mixture of experts needs."""


class _Unstated(float):
    """A default that can be told from the same number given by the user."""


DEFAULT_ROPE_THETA = _Unstated(10_000.0)


class HAMConfig(PreTrainedConfig):
    """Configuration of a `HAMModel`.

        HAMConfig(
            hidden_size=512,
            num_hidden_layers=4,
            layer_types=["linear_attention", "hybrid", "hybrid", "full_attention"],
            selector=Threshold(TargetFraction(0.1)) | Window(32),
        )

    A policy (`memory`, `gate`, `selector`, `query_gate`, `attention`, `combiner`) is JSON as in
    `hamblocks.models.policies`, or one of hamblocks' own parts, of which the JSON is kept. Give one
    policy for all layers, or a list with one for every layer.

    Every number has one value. `rope_theta` stands in the policy of attention too: given in one
    place, it holds in both; given differently in both, it is an error.

    Attributes:
        vocab_size: number of tokens in the vocabulary.
        hidden_size: width of the model.
        intermediate_size: inner width of the MLPs; None: 8/3 of `hidden_size`.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads, and heads of the memory.
        num_key_value_heads: a divisor of `num_attention_heads`; None: as many.
        head_dim: size of a head; None: `hidden_size // num_attention_heads`.
        layer_types: one name per layer: "hybrid" (a memory, and attention over what the selector
            stores), "linear_attention" (the memory alone) or "full_attention" (attention over
            everything); None: all hybrid.
        memory: policy of the memory; None: the gated delta rule.
        gate: policy of the gate; None: the cosine prediction error.
        selector: policy of the selector; None: a quarter of the tokens for good, and the last 64.
        query_gate: policy of the query gate; None: every query reads.
        attention: policy of attention; None: with a convolution of two taps over the keys, rotary
            positions and query/key norm.
        combiner: policy of the combiner; None: the gated sum.
        rope_theta: base of the rotary wavelengths, 10,000 if no policy of attention states one;
            None: no rotary positions. A list where layers differ.
        qkv_bias: the projections to q, k and v have biases.
        mlp_bias: the projections of the MLPs have biases.
        mlp_layer_types: one name per layer: "dense" (the MLP) or "sparse" (a mixture of experts, see
            `hamblocks.experts.SparseMLP`); None: all sparse with `num_experts`, else all dense.
        num_experts: experts of a sparse layer; None: there is no sparse layer.
        num_experts_per_tok: how many of them a token runs through.
        moe_intermediate_size: inner width of an expert.
        shared_expert_intermediate_size: inner width of the expert of all tokens; None: none.
        norm_topk_prob: divide the weights of the chosen experts by their sum.
        rms_norm_eps: epsilon of the blocks' norms.
        initializer_range: standard deviation of new weights.
        use_cache: return the cache, outside of training.
        tie_word_embeddings: the head's weights are the embedding's.
        own_layers: set by a model whose layers came from `layer=`, without which it cannot be
            loaded.
        format: the format of the file that the configuration is loaded from or saved to. One of a
            later format than this release knows is refused; a file without a number is of format 1.
    """

    model_type = "ham"
    # None where this transformers cannot use it: it then says that there is no plan
    base_model_tp_plan = dict(LAYERS) if HAS_PLANS else None
    # a list, as transformers has it
    keys_to_ignore_at_inference = ["past_key_values", "cache", "stats"]  # noqa: RUF012

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
    query_gate: Any = None
    attention: Any = None
    combiner: Any = None
    rope_theta: float | list[float | None] | None = DEFAULT_ROPE_THETA
    qkv_bias: bool = False
    mlp_bias: bool = False
    mlp_layer_types: list[str] | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    own_layers: bool = False
    format: int = FORMAT

    def __post_init__(self, **kwargs: Any) -> None:
        """Checks the arguments and completes what was left out.

        Raises:
            ValueError: a bad argument; the message names it, what was expected and what came.
        """
        # first: what else is wrong with a newer file does not matter
        check_format(self.format, FORMAT, "configuration")
        self.format = FORMAT
        # the Auto classes look for the model as soon as they have its configuration
        import_module("hamblocks.models.modeling")
        for name, own in OTHER_NAMES.items():
            if kwargs.get(name) is not None:
                raise wrong(name, f"no such argument (its name here is {own})", kwargs[name])
        self._complete_sizes()
        self._complete_layer_types()
        self._complete_mlp_types()
        for kind in DEFAULTS:
            if kind != "attention":
                setattr(self, kind, self._completed(kind, getattr(self, kind)))
        self._complete_attention()
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; what `from_pretrained(..., selector=...)` changes is checked too.

        A changed `rope_theta` holds in the policies of attention too, and the other way round.

        Raises:
            ValueError: the file is of a model of another type, or an argument is wrong.
        """
        kind = config_dict.get("model_type") or cls.model_type
        if kind not in (cls.model_type, HAMConfig.model_type):
            expected = f'"{cls.model_type}" (hamblocks.models.convert makes such a model of others)'
            raise wrong("model_type", expected, repr(kind))
        names = HAMConfig.__annotations__
        changed = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        saved = copy.deepcopy(config_dict)
        if "attention" in changed:
            saved.pop("rope_theta", None)
        elif "rope_theta" in changed:
            policies = saved.get("attention")
            for policy in policies if isinstance(policies, list) else [policies]:
                if isinstance(policy, dict):
                    policy.pop("rope_theta", None)
        return super().from_dict({**saved, **changed}, **kwargs)

    def policy(self, kind: str, layer: int) -> Policy | None:
        """The policy of one layer; None where it has no such part (no query gate).

        Args:
            kind: memory, gate, selector, query_gate, attention or combiner.
            layer: its index.

        Raises:
            ValueError: `rope_theta` was changed and the policy of attention was not.
        """
        chosen: Policy | None = _of_layer(getattr(self, kind), layer)
        if kind == "attention" and chosen is not None:
            _agree(_of_layer(self.rope_theta, layer), chosen)
        return chosen

    def changed_selectors(self, selectors: list[Any]) -> dict[int, Policy]:
        """The policies of a model's selectors where they are not what the configuration says.

        A target fraction and a fixed threshold are saved with the weights too, and can be changed
        in a model.

        Args:
            selectors: the selector of every layer.

        Returns:
            Policies by index of the layer; empty if the configuration is right.
        """
        changed = {}
        for layer, selector in self._read_selectors(selectors):
            policy = policy_of("selector", selector)
            # through a part, whose numbers are rounded to float32 too
            if policy != policy_of("selector", part_of("selector", self.policy("selector", layer))):
                changed[layer] = policy
        return changed

    def follow(self, selectors: list[Any]) -> None:
        """Takes over the policies of a model's selectors, so that both say the same.

        Args:
            selectors: the selector of every layer.
        """
        changed = self.changed_selectors(selectors)
        if not changed:
            return
        layers = range(self.num_hidden_layers)
        policies = [changed.get(layer, self.policy("selector", layer)) for layer in layers]
        read = [policies[layer] for layer, _ in self._read_selectors(selectors)]
        self.selector = read[0] if all(policy == read[0] for policy in read) else policies

    def follow_vocabulary(self) -> None:
        """Sets the vocabulary of the gates that predict tokens to `vocab_size`."""
        self.gate, self.query_gate = (
            _with_vocabulary(policy, self.vocab_size) for policy in (self.gate, self.query_gate)
        )

    def _read_selectors(self, selectors: list[Any]) -> list[tuple[int, Any]]:
        """Indices and selectors of the layers that were made from a policy of the selector."""
        kinds = [] if self.own_layers else self.layer_types or []
        return [
            (layer, selectors[layer])
            for layer, kind in enumerate(kinds)
            if "selector" in LAYER_TYPES[kind]
            # offloaded buffers have no values here
            and not any(buffer.is_meta for buffer in selectors[layer].buffers())
        ]

    def _complete_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self, name, check_count(name, getattr(self, name), 1))
        heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        if self.head_dim is None:
            if self.hidden_size % heads:
                expected = f"a multiple of num_attention_heads = {heads}, or head_dim"
                raise wrong("hidden_size", expected, f"{self.hidden_size}")
            self.head_dim = self.hidden_size // heads
        if self.intermediate_size is None:
            self.intermediate_size = self.hidden_size * 8 // 3

    def _complete_layer_types(self) -> None:
        layers = self.num_hidden_layers
        if self.layer_types is None:
            self.layer_types = ["hybrid"] * layers
        unknown = sorted({str(kind) for kind in self.layer_types if kind not in LAYER_TYPES})
        if unknown:
            raise wrong("layer_types", f"only {', '.join(LAYER_TYPES)}", ", ".join(unknown))
        if len(self.layer_types) != layers:
            expected = f"num_hidden_layers = {layers} of them"
            raise wrong("layer_types", expected, f"{len(self.layer_types)}")

    def _complete_mlp_types(self) -> None:
        kinds = self.mlp_layer_types
        if kinds is None:
            kinds = ["dense" if self.num_experts is None else "sparse"] * self.num_hidden_layers
        unknown = sorted({str(kind) for kind in kinds if kind not in MLP_TYPES})
        if unknown:
            raise wrong("mlp_layer_types", f"only {', '.join(MLP_TYPES)}", ", ".join(unknown))
        if len(kinds) != self.num_hidden_layers:
            expected = f"num_hidden_layers = {self.num_hidden_layers} of them"
            raise wrong("mlp_layer_types", expected, f"{len(kinds)}")
        self.mlp_layer_types = list(kinds)
        is_sparse = "sparse" in kinds
        for name in EXPERTS:
            value = getattr(self, name)
            if is_sparse:
                expected = "an integer of at least 1 for sparse layers"
                if value is None:
                    raise wrong(name, expected, "None")
                setattr(self, name, check_count(name, value, 1))
            elif value is not None:
                raise wrong(name, "None without a sparse layer", f"{value}")

    def _complete_attention(self) -> None:
        """Completes the policies of attention and `rope_theta` so that they agree."""
        given = self.rope_theta
        is_stated = not isinstance(given, _Unstated)
        if isinstance(given, (list, tuple)):
            self._check_length("rope_theta", given, "number")
            given = list(given)
        policies = self.attention
        if isinstance(given, list) and not isinstance(policies, (list, tuple)):
            policies = [policies] * self.num_hidden_layers
        if isinstance(policies, (list, tuple)):
            self._check_length("attention", policies, "policy")
            completed = [
                self._attention_policy(policy, _of_layer(given, layer), is_stated)
                for layer, policy in enumerate(policies)
            ]
            thetas = [policy["rope_theta"] for policy in completed]
            self.attention = completed
            self.rope_theta = thetas if any(x != thetas[0] for x in thetas) else thetas[0]
        else:
            self.attention = self._attention_policy(policies, given, is_stated)
            self.rope_theta = self.attention["rope_theta"]

    def _attention_policy(self, policy: object, rope_theta: Any, is_stated: bool) -> Policy:
        """One policy of attention, complete; `rope_theta` is the one that the configuration has."""
        policy = copy.deepcopy(DEFAULTS["attention"]) if policy is None else policy
        if isinstance(policy, dict):
            theta = float(rope_theta) if isinstance(rope_theta, _Unstated) else rope_theta
            policy = {"rope_theta": theta, **policy}
        completed = self._one("attention", policy)
        assert completed is not None  # attention has a default
        if is_stated:
            _agree(rope_theta, completed)
        return completed

    def _completed(self, kind: str, policy: object) -> Policy | list[Policy | None] | None:
        """The policy as JSON with every argument, or a list of them with one per layer."""
        if isinstance(policy, (list, tuple)):
            self._check_length(kind, policy, "policy")
            return [self._one(kind, one) for one in policy]
        return self._one(kind, policy)

    def _one(self, kind: str, policy: object) -> Policy | None:
        """One policy, complete. A part is made of it once, so that a bad value is found here."""
        if policy is None:
            policy = copy.deepcopy(DEFAULTS[kind])
        if policy is None:
            return None
        completed = complete(kind, policy if isinstance(policy, dict) else policy_of(kind, policy))
        part_of(kind, completed)
        return completed

    def _check_length(self, name: str, values: list[Any] | tuple[Any, ...], what: str) -> None:
        layers = self.num_hidden_layers
        if len(values) != layers:
            raise wrong(name, f"one {what}, or num_hidden_layers = {layers}", f"{len(values)}")


def _with_vocabulary(policy: Any, size: int) -> Any:
    """A policy or a list of them with another vocabulary for every `PredictionEntropy` in it."""
    if isinstance(policy, list):
        return [_with_vocabulary(one, size) for one in policy]
    if not isinstance(policy, dict):
        return policy
    changed = {name: _with_vocabulary(value, size) for name, value in policy.items()}
    return {**changed, "vocab_size": size} if policy["type"] == "prediction_entropy" else changed


def _of_layer(value: Any, layer: int) -> Any:
    """The value of one layer, of one for all layers or a list with one for each."""
    return value[layer] if isinstance(value, list) else value


def _agree(rope_theta: float | None, policy: Policy) -> None:
    """Checks that a policy of attention has the configuration's `rope_theta`."""
    if policy["rope_theta"] != rope_theta:
        expected = f"{policy['rope_theta']}, as the policy of attention has it (or state it once)"
        raise wrong("rope_theta", expected, f"{rope_theta}")


AutoConfig.register(HAMConfig.model_type, HAMConfig)
