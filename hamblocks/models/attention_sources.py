"""How `convert` reads a model whose layers are all softmax attention."""

from __future__ import annotations

import copy
from typing import Any

from hamblocks.models.origins import (
    Origin,
    Source,
    SourceLayer,
    block_of,
    combiner_of,
    has_bias,
    mlps_of,
    rope_of,
    sizes_of,
)
from hamblocks_ops.arguments import wrong

QKV = ("q_proj", "k_proj", "v_proj")


def read_attention(family: str, model: Any) -> Source:
    """Reads a model of the Llama kind.

    Args:
        family: its model type.
        model: the model; it passed the checks of `hamblocks.models.sources`.

    Raises:
        ValueError: rotary positions or biases that a HAM model cannot have.
    """
    config, layers = model.config, model.get_submodule("model.layers")
    attention = layers[0].self_attn
    sizes = sizes_of(config, "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    sizes["head_dim"] = attention.head_dim
    sizes["qkv_bias"] = has_bias(layers, "self_attn", QKV)
    mlps, origins = mlps_of(config, layers)
    sizes |= mlps
    output_bias = has_bias(layers, "self_attn", ("o_proj",))
    qk_norm = hasattr(attention, "q_norm")
    rope = rope_of(config)
    if rope["partial_rotary_factor"] != 1:
        share = repr(rope["partial_rotary_factor"])
        raise wrong("config.rope_parameters: partial_rotary_factor", "1", share)
    rotary = getattr(config, "no_rope_layers", None) or [True] * len(layers)
    read = []
    for turns in rotary:
        own = copy.deepcopy(rope) if turns else {"rope_theta": None, "rope_scaling": None}
        policy = {"type": "selected_attention", "conv_size": 1, **own}
        policy |= {"qk_norm": qk_norm, "norm_eps": config.rms_norm_eps}
        # a read without a norm has the scale of the values, as the read of attention has
        combiner = combiner_of(bias=output_bias, read_norm=False)
        read.append(SourceLayer("full_attention", policy, None, combiner))
    origins |= {
        "model.embed_tokens.weight": Origin(("model.embed_tokens.weight",)),
        "model.stack.norm.weight": Origin(("model.norm.weight",)),
        "lm_head.weight": Origin(("lm_head.weight",)),
    }
    width = sizes["num_attention_heads"] * sizes["head_dim"]
    for index in range(len(layers)):
        origins |= _origins(index, width, sizes, output_bias, qk_norm)
    return Source(family, sizes, read, origins)


def _origins(
    layer: int, width: int, sizes: dict[str, Any], output_bias: bool, qk_norm: bool
) -> dict[str, Origin]:
    """The weights of one block but for its MLP; attention's read has `width` channels."""
    block, old = block_of(layer), f"model.layers.{layer}"
    origins = {
        f"{block}.layer_norm.weight": Origin((f"{old}.input_layernorm.weight",)),
        f"{block}.mlp_norm.weight": Origin((f"{old}.post_attention_layernorm.weight",)),
    }
    for name in ("q_norm", "k_norm") if qk_norm else ():
        origin = Origin((f"{old}.self_attn.{name}.weight",))
        origins[f"{block}.layer.attention.{name}.weight"] = origin
    for kind in ("weight", "bias"):
        for name in QKV if kind == "weight" or sizes["qkv_bias"] else ():
            origins[f"{block}.layer.{name}.{kind}"] = Origin((f"{old}.self_attn.{name}.{kind}",))
    # where the memory's read has a projection too, attention's is the last
    place = f"{block}.layer.combiner.o_proj"
    last = slice(-width, None)
    origins[f"{place}.weight"] = Origin((f"{old}.self_attn.o_proj.weight",), columns=last)
    if output_bias:
        origins[f"{place}.bias"] = Origin((f"{old}.self_attn.o_proj.bias",))
    return origins
