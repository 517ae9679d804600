"""Which models `convert` takes, and what they must not have.

A field of a configuration that is in no list here may change what the model computes, so it is an
error. So is a module that is not a plain one of torch or of the family: an adapter or a quantised
layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from hamblocks.models.attention_sources import read_attention
from hamblocks.models.delta_sources import read_gated_deltanet, read_qwen3_next
from hamblocks.models.origins import Source
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

SLIDING = ("layer_types", "use_sliding_window", "sliding_window", "max_window_layers")

DELTA = (
    "layer_types",
    # an earlier form of layer_types and of rope_parameters, which holds them too
    "full_attention_interval",
    "partial_rotary_factor",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
"""Fields of the gated delta layers of Qwen."""

EXPERTS = (
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "output_router_logits",
    # the weight of a loss that output_router_logits adds
    "router_aux_loss_coef",
)
"""Fields of mixtures of experts."""

SPARSE = ("mlp_only_layers", "decoder_sparse_step", "norm_topk_prob")
"""Further ones of Qwen3: which layers have experts, and how these are weighed."""


class Family(NamedTuple):
    """A kind of model that can be converted.

    Attributes:
        model_type: its name in transformers.
        fields: fields of its configuration beside `COMMON`.
        read: reads a model that passed the checks.
        home: the module of its class; None: that of transformers.
        modules: beginnings of the names of further modules that its layers come from.
        kinds: the types of layers that it may have.
    """

    model_type: str
    fields: tuple[str, ...]
    read: Callable[[str, Any], Source] = read_attention
    home: str | None = None
    modules: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("full_attention",)


FAMILIES: dict[str, Family] = {
    # pretraining_tp: the degree of tensor parallelism in training, which transformers does not read
    "LlamaForCausalLM": Family("llama", ("pretraining_tp",)),
    "MistralForCausalLM": Family("mistral", ("sliding_window",)),
    "Qwen2ForCausalLM": Family("qwen2", SLIDING),
    "Qwen3ForCausalLM": Family("qwen3", SLIDING),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", (*SLIDING, *EXPERTS, *SPARSE)),
    "MixtralForCausalLM": Family("mixtral", ("sliding_window", *EXPERTS, "router_jitter_noise")),
    "SmolLM3ForCausalLM": Family("smollm3", (*SLIDING, "no_rope_layers", "no_rope_layer_interval")),
    "Qwen3NextForCausalLM": Family(
        "qwen3_next",
        (*DELTA, *EXPERTS, *SPARSE),
        read_qwen3_next,
        kinds=("linear_attention", "full_attention"),
    ),
    "Qwen3_5ForCausalLM": Family(
        "qwen3_5", DELTA, read_qwen3_next, kinds=("linear_attention", "full_attention")
    ),
    "Qwen3_5MoeForCausalLM": Family(
        "qwen3_5_moe",
        (*DELTA, *EXPERTS),
        read_qwen3_next,
        kinds=("linear_attention", "full_attention"),
    ),
    "GatedDeltaNetForCausalLM": Family(
        "gated_deltanet",
        (
            "num_heads",
            "num_v_heads",
            "expand_v",
            "use_gate",
            "output_gate_activation",
            "use_short_conv",
            "conv_size",
            "allow_neg_eigval",
            "hidden_ratio",
            "norm_eps",
            # layers of softmax attention
            "attn",
            # how its kernels compute, not what
            "attn_mode",
            "fuse_norm",
            "fuse_swiglu",
            "fuse_cross_entropy",
            "fuse_linear_cross_entropy",
            "use_l2warp",
        ),
        read_gated_deltanet,
        home="fla.models.gated_deltanet.modeling_gated_deltanet",
        modules=("fla.layers.gated_deltanet", "fla.layers.attn", "fla.modules."),
    ),
}
"""Classes of models that can be converted."""

FP32 = ("A_log", "dt_bias")
"""Weights that stay in float32 in a narrower model."""

WITHOUT: dict[str, tuple[str, tuple[Any, ...]]] = {
    "attn_logit_softcapping": ("no soft-capping of attention logits", (None,)),
    "final_logit_softcapping": ("no soft-capping of logits", (None,)),
    "sliding_window": (
        "None, without which attention sees every token (set it to None for texts that are shorter)",
        (None,),
    ),
    "attention_dropout": ("0 (the converted model has no dropout)", (0, 0.0, None)),
    "hidden_act": ("silu, the activation of the MLP", ("silu", "swish")),
    "output_router_logits": ("False (the converted model has no loss of its routers)", (False,)),
    "router_jitter_noise": ("0 (the converted model has no noise in training)", (0, 0.0)),
    "use_l2warp": ("False (the converted model has no such term in its loss)", (False,)),
    "attnres_block_size": ("None, without attention over the residuals", (None,)),
}
"""Fields that must have one of some values, and what is expected."""


def read_source(model: nn.Module) -> Source:
    """Reads and checks a model.

    Raises:
        ValueError: the architecture cannot be converted, or a field of its configuration or a
            module would change the result; the message names it.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise wrong("model", f"a model of transformers ({', '.join(FAMILIES)})", model)
    _check_values(config)
    family = FAMILIES.get(type(model).__name__)
    if family is None or type(model).__module__ != _home(family):
        raise wrong("model", f"one of {', '.join(FAMILIES)}", type(model).__name__)
    _check_layer_types(config, family)
    _check_fields(config, family)
    _check_modules(model, family)
    return family.read(family.model_type, model)


def _home(family: Family) -> str:
    """The module of a family's class."""
    name = family.model_type
    return family.home or f"transformers.models.{name}.modeling_{name}"


def _check_values(config: PreTrainedConfig) -> None:
    """Checks the fields that change the result and have no counterpart in a HAM model."""
    for name, (expected, allowed) in WITHOUT.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise wrong(f"config.{name}", expected, repr(value))


def _check_layer_types(config: PreTrainedConfig, family: Family) -> None:
    """Checks that every layer is of a kind that the family is converted with."""
    for layer, kind in enumerate(getattr(config, "layer_types", None) or []):
        if kind not in family.kinds:
            expected = f"{' or '.join(family.kinds)} in layer {layer}"
            raise wrong("config.layer_types", expected, repr(kind))


def _check_fields(config: PreTrainedConfig, family: Family) -> None:
    """Checks that the meaning of every field is known."""
    base = PreTrainedConfig().to_dict()
    known = {*base, *COMMON, *family.fields}
    for name, value in config.to_dict().items():
        # names of files, and ids of tokens, which no layer reads
        inert = name.startswith("_") or name.endswith("_token_id")
        if name not in known and not inert and value is not None:
            own = family.model_type
            expected = f"no field that is unknown for {own} (delete it if it changes no result)"
            raise wrong(f"config.{name}", expected, repr(value))


def _check_modules(model: nn.Module, family: Family) -> None:
    """Checks that every module is a plain one, with its weights in memory."""
    places = (_home(family), "transformers.activations")
    for name, module in model.named_modules():
        kind = type(module)
        plain = kind.__module__.startswith("torch.nn.") and "quant" not in kind.__module__
        own = kind.__module__ in places or kind.__module__.startswith(family.modules or "\0")
        if not plain and not own:
            expected = "only modules of torch.nn and of its own family (merge adapters first)"
            raise wrong(f"model.{name}", expected, f"{kind.__module__}.{kind.__name__}")
    first = next(model.parameters())
    for name, weight in model.named_parameters():
        # the decay of a memory may be wider than the rest
        wider = name.endswith(FP32) and weight.dtype == torch.float32
        fits = weight.dtype == first.dtype or wider
        if weight.is_meta or not weight.is_floating_point() or not fits:
            raise wrong(f"model.{name}", f"a weight in memory, of {first.dtype}", weight)
