"""What `convert` reads of a model of transformers: its family, its sizes, its rotary positions.

A field of a configuration that is in no list here may change what the model computes, so it is an
error. So is a module that is not a plain one of torch or of the family: an adapter or a quantised
layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig

from hamblocks.rope import LENGTH
from hamblocks_ops.arguments import wrong

COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "attention_bias",
    "mlp_bias",
    # how the file stored the weights; the weights themselves are checked
    "quantization_config",
)
"""Fields that every family may have. Biases are read from the weights."""

FAMILIES: dict[str, tuple[str, ...]] = {
    # the degree of tensor parallelism in training, which transformers does not read
    "llama": ("pretraining_tp",),
    "mistral": ("sliding_window",),
    "qwen2": ("layer_types", "use_sliding_window", "sliding_window", "max_window_layers"),
    "qwen3": ("layer_types", "use_sliding_window", "sliding_window", "max_window_layers"),
    "smollm3": (
        "layer_types",
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
        "no_rope_layers",
        "no_rope_layer_interval",
    ),
}
"""Model types that can be converted, and the fields that each has beside `COMMON`."""

CLASSES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
}

WITHOUT: dict[str, tuple[str, tuple[Any, ...]]] = {
    "attn_logit_softcapping": ("no soft-capping of attention logits", (None,)),
    "final_logit_softcapping": ("no soft-capping of logits", (None,)),
    "sliding_window": (
        "None, without which attention sees every token (set it to None for texts that are shorter)",
        (None,),
    ),
    "attention_dropout": ("0 (the converted model has no dropout)", (0, 0.0, None)),
    "hidden_act": ("silu, the activation of the MLP", ("silu", "swish")),
}
"""Fields that must have one of some values, and what is expected."""


class Source(NamedTuple):
    """What a model of transformers is made of.

    Attributes:
        family: its model type.
        sizes: arguments of `HAMConfig` that are taken over.
        qk_norm: whether queries and keys are normalised.
        output_bias: whether the projection of the read has a bias.
        rope_theta: base of the rotary wavelengths per layer; None: a layer without.
        rope_scaling: how the frequencies are scaled.
    """

    family: str
    sizes: dict[str, Any]
    qk_norm: bool
    output_bias: bool
    rope_theta: list[float | None]
    rope_scaling: dict[str, Any] | None


def read_source(model: nn.Module) -> Source:
    """Reads and checks a model of transformers.

    Raises:
        ValueError: the architecture cannot be converted, or a field of its configuration or a
            module would change the result; the message names it.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise wrong("model", f"a model of transformers ({', '.join(CLASSES)})", model)
    _check_values(config)
    family = CLASSES.get(type(model).__name__)
    home = f"transformers.models.{family}.modeling_{family}"
    if family is None or type(model).__module__ != home:
        raise wrong("model", f"one of {', '.join(CLASSES)}", type(model).__name__)
    _check_fields(config, family)
    _check_modules(model, home)
    layers: Any = model.get_submodule("model.layers")
    theta, scaling = _rope(config)
    rotary = getattr(config, "no_rope_layers", None) or [True] * config.num_hidden_layers
    copied = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "initializer_range",
        "rms_norm_eps",
        "use_cache",
        "tie_word_embeddings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
    sizes = {name: getattr(config, name) for name in copied}
    sizes["head_dim"] = layers[0].self_attn.head_dim
    sizes["qkv_bias"] = _bias(layers, "self_attn", ("q_proj", "k_proj", "v_proj"))
    sizes["mlp_bias"] = _bias(layers, "mlp", ("gate_proj", "up_proj", "down_proj"))
    return Source(
        family=family,
        sizes=sizes,
        qk_norm=hasattr(layers[0].self_attn, "q_norm"),
        output_bias=_bias(layers, "self_attn", ("o_proj",)),
        rope_theta=[theta if rotary[layer] else None for layer in range(len(layers))],
        rope_scaling=scaling,
    )


def _check_values(config: PreTrainedConfig) -> None:
    """Checks the fields that change the result and have no counterpart in a HAM model."""
    for name, (expected, allowed) in WITHOUT.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise wrong(f"config.{name}", expected, repr(value))
    kinds = getattr(config, "layer_types", None) or []
    for layer, kind in enumerate(kinds):
        if kind != "full_attention":
            expected = f"full_attention in layer {layer}"
            raise wrong("config.layer_types", expected, repr(kind))


def _check_fields(config: PreTrainedConfig, family: str) -> None:
    """Checks that the meaning of every field is known."""
    base = PreTrainedConfig().to_dict()
    known = {*base, *COMMON, *FAMILIES[family]}
    for name, value in config.to_dict().items():
        # names of files, and ids of tokens, which no layer reads
        inert = name.startswith("_") or name.endswith("_token_id")
        if name not in known and not inert and value is not None:
            expected = f"no field that is unknown for {family} (delete it if it changes no result)"
            raise wrong(f"config.{name}", expected, repr(value))


def _check_modules(model: nn.Module, home: str) -> None:
    """Checks that every module is a plain one, with its weights in memory."""
    for name, module in model.named_modules():
        kind = type(module)
        plain = kind.__module__.startswith("torch.nn.") and "quant" not in kind.__module__
        if not plain and kind.__module__ not in (home, "transformers.activations"):
            expected = "only modules of torch.nn and of its own family (merge adapters first)"
            raise wrong(f"model.{name}", expected, f"{kind.__module__}.{kind.__name__}")
    first = next(model.parameters())
    for name, weight in model.named_parameters():
        if weight.is_meta or not weight.is_floating_point() or weight.dtype != first.dtype:
            raise wrong(f"model.{name}", f"a weight in memory, of {first.dtype}", weight)


def _rope(config: PreTrainedConfig) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of the rotary positions."""
    given = dict(config.rope_parameters)
    theta, kind = float(given.pop("rope_theta")), given.pop("rope_type", "default")
    partial = given.pop("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise wrong("config.rope_parameters: partial_rotary_factor", "1", repr(partial))
    given = {name: value for name, value in given.items() if value is not None}
    if kind in ("default", "linear"):
        given.pop(LENGTH, None)  # which these do not read
    if kind == "default":
        if given:
            raise wrong("config.rope_parameters", "rope_theta alone for default", repr(given))
        return theta, None
    if kind == "dynamic":  # transformers reads the length from the configuration
        given[LENGTH] = config.max_position_embeddings
    if kind == "yarn" and "factor" not in given:
        given["factor"] = config.max_position_embeddings / given[LENGTH]
    return theta, {"rope_type": kind, **given}


def _bias(layers: Any, part: str, names: tuple[str, ...]) -> bool:
    """Whether the projections have biases; all of a kind have them, or none."""
    found = {
        getattr(getattr(layer, part), name).bias is not None for layer in layers for name in names
    }
    if len(found) > 1:
        raise wrong(f"model: {part}", f"a bias in all of {', '.join(names)}, or in none", "some")
    return found.pop()
