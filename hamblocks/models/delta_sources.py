"""How `convert` reads models that have memories: Qwen3-Next, Qwen3.5 and fla's Gated DeltaNet.

Their memories are the gated delta rule, so `GatedDeltaMemory` takes their weights over. The norm and
the gate of a memory's read belong to the combiner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
    stacked,
)
from hamblocks.models.policies import Policy
from hamblocks_ops.arguments import wrong

EPS = 1e-6
"""What both add to the squared length of a query or key."""

GATES = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}
"""fla's names of activations, and ours."""


def _memory(heads: int, k_heads: int, key: int, value: int, conv_size: int, **given: Any) -> Policy:
    """The policy of a memory of these sizes."""
    return {
        "type": "gated_delta_memory",
        "projections": "own",
        "num_heads": heads,
        "num_k_heads": k_heads,
        "head_dim": key,
        "expand_v": value / key,
        "conv_size": conv_size,
        "qk_l2norm_eps": EPS,
        **given,
    }


def _from_zero(weight: Tensor) -> Tensor:
    """The weight of a norm that multiplies by 1 + weight."""
    return 1 + weight


MROPE = ("mrope_section", "mrope_interleaved")
"""How Qwen3.5 shares the rotary channels out between time, height and width. A token of a text has
the same position in all three, so each channel turns as without them."""

# Qwen3-Next and Qwen3.5


def read_qwen3_next(family: str, model: Any) -> Source:
    """Reads a `Qwen3NextForCausalLM`, `Qwen3_5ForCausalLM` or `Qwen3_5MoeForCausalLM`.

    Args:
        family: its model type.
        model: the model; it passed the checks of `hamblocks.models.sources`.

    Raises:
        ValueError: rotary positions that a HAM model cannot have.
    """
    config, layers = model.config, model.get_submodule("model.layers")
    heads, key = config.linear_num_value_heads, config.linear_key_head_dim
    if heads % config.linear_num_key_heads:
        expected = f"a divisor of the {heads} heads of the values"
        raise wrong("config.linear_num_key_heads", expected, f"{config.linear_num_key_heads}")
    with_attention = [layer for layer in layers if hasattr(layer, "self_attn")]
    biased = bool(with_attention) and has_bias(
        with_attention, "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")
    )
    sizes = sizes_of(
        config, "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"
    )
    mlps, origins = mlps_of(config, layers)
    sizes |= {"qkv_bias": biased, **mlps}
    attention = {
        "type": "selected_attention",
        **rope_of(config, MROPE if family.startswith("qwen3_5") else ()),
        "qk_norm": True,
        "norm_eps": config.rms_norm_eps,
    }
    memory = _memory(
        heads,
        config.linear_num_key_heads,
        key,
        config.linear_value_head_dim,
        config.linear_conv_kernel_dim,
    )
    kinds = {
        "full_attention": SourceLayer(
            "full_attention",
            {**attention, "conv_size": 1},
            None,
            combiner_of(bias=biased, read_norm=False, attention_gate="sigmoid"),
        ),
        "linear_attention": SourceLayer(
            "linear_attention",
            attention,
            memory,
            combiner_of(start="memory", norm_eps=config.rms_norm_eps, memory_gate="silu"),
        ),
    }
    origins |= {
        "model.embed_tokens.weight": Origin(("model.embed_tokens.weight",)),
        "model.stack.norm.weight": Origin(("model.norm.weight",), _from_zero),
        "lm_head.weight": Origin(("lm_head.weight",)),
    }
    for index, layer in enumerate(layers):
        block, old = block_of(index), f"model.layers.{index}"
        norms = ("layer_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")
        for place, name in norms:
            origins[f"{block}.{place}.weight"] = Origin((f"{old}.{name}.weight",), _from_zero)
        if layer in with_attention:
            origins |= _gated_attention(config, f"{block}.layer", f"{old}.self_attn", biased)
        else:
            grouped = hasattr(layer.linear_attn, "in_proj_qkvz")
            origins |= _gated_delta_net(config, f"{block}.layer", f"{old}.linear_attn", grouped)
    read = [
        kinds["full_attention" if layer in with_attention else "linear_attention"]
        for layer in layers
    ]
    return Source(family, sizes, read, origins)


def _gated_attention(config: Any, place: str, old: str, biased: bool) -> dict[str, Origin]:
    """The weights of attention with a gate; q_proj has a query and a gate for every head."""
    heads, dim = config.num_attention_heads, config.head_dim

    def half(which: int) -> Callable[[Tensor], Tensor]:
        return lambda weight: weight.unflatten(0, (heads, 2, dim))[:, which].flatten(0, 1)

    origins = {}
    for kind in ("weight", "bias") if biased else ("weight",):
        both = (f"{old}.q_proj.{kind}",)
        origins[f"{place}.q_proj.{kind}"] = Origin(both, half(0))
        origins[f"{place}.combiner.attention_g_proj.{kind}"] = Origin(both, half(1))
        for name in ("k_proj", "v_proj"):
            origins[f"{place}.{name}.{kind}"] = Origin((f"{old}.{name}.{kind}",))
        last = slice(-heads * dim, None) if kind == "weight" else None
        origin = Origin((f"{old}.o_proj.{kind}",), columns=last)
        origins[f"{place}.combiner.o_proj.{kind}"] = origin
    for name in ("q_norm", "k_norm"):
        origin = Origin((f"{old}.{name}.weight",), _from_zero)
        origins[f"{place}.attention.{name}.weight"] = origin
    return origins


def _gated_delta_net(config: Any, place: str, old: str, grouped: bool) -> dict[str, Origin]:
    """The weights of a memory.

    Args:
        config: the configuration of the source.
        place: where they go.
        old: where they are.
        grouped: its projections lie group by group, one group per key head; otherwise in turn.
    """
    key_heads, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
    key, value = config.linear_key_head_dim, config.linear_value_head_dim
    groups = key_heads if grouped else 1
    keys, values, each = (n // groups for n in (key_heads * key, value_heads * value, value_heads))

    def part(sizes: list[int], which: int) -> Callable[[Tensor], Tensor]:
        """One part of every group, whose parts have these sizes."""
        return lambda weight: weight.unflatten(0, (groups, -1)).split(sizes, 1)[which].flatten(0, 1)

    def parts(sizes: list[int], source: str) -> list[tuple[str, Callable[..., Tensor]]]:
        return [(source, part(sizes, which)) for which in range(len(sizes))]

    if grouped:
        q, k, v, z = parts([keys, keys, values, values], "in_proj_qkvz")
        b, a = parts([each, each], "in_proj_ba")
    else:
        q, k, v = parts([keys, keys, values], "in_proj_qkv")
        z, b, a = (("in_proj_" + name, stacked) for name in "zba")
    names = {
        "memory.q_proj": q,
        "memory.k_proj": k,
        "memory.v_proj": v,
        "combiner.memory_g_proj": z,
        "memory.b_proj": b,
        "memory.a_proj": a,
        "memory.conv": ("conv1d", _taps),
        "combiner.memory_norm": ("norm", stacked),
    }
    origins = {
        f"{place}.{name}.weight": Origin((f"{old}.{source}.weight",), made)
        for name, (source, made) in names.items()
    }
    for name in ("A_log", "dt_bias"):
        origins[f"{place}.memory.{name}"] = Origin((f"{old}.{name}",))
    # where attention's read has a projection too, the memory's is the first
    first = slice(value_heads * value)
    output = Origin((f"{old}.out_proj.weight",), columns=first)
    return origins | {f"{place}.combiner.o_proj.weight": output}


# Gated DeltaNet of flash-linear-attention


def read_gated_deltanet(family: str, model: Any) -> Source:
    """Reads a `GatedDeltaNetForCausalLM` of fla.

    Layers of softmax attention (`config.attn`) have the sizes of attention of the whole model. In a
    model without them, the attention that a layer is given has the heads of the memory's queries,
    and their size.

    Args:
        family: its model type.
        model: the model; it passed the checks of `hamblocks.models.sources`.

    Raises:
        ValueError: fewer heads of values than of keys, no layer with a memory, or layers of softmax
            attention that a HAM model cannot have.
    """
    config, layers = model.config, model.get_submodule("model.layers")
    nets = [layer.attn for layer in layers]
    with_memory = [hasattr(net, "A_log") for net in nets]
    if not any(with_memory):
        raise wrong("config.attn", "one or more layers without softmax attention", "none")
    net = nets[with_memory.index(True)]
    heads = net.num_v_heads
    if heads % net.num_heads:
        expected = f"a multiple of num_heads = {net.num_heads}"
        raise wrong("config.num_v_heads", expected, f"{heads}")
    mlps, origins = mlps_of(config, layers)
    sizes = sizes_of(config) | mlps
    sizes |= {
        "num_attention_heads": net.num_heads,
        "head_dim": net.head_dim,
        "rms_norm_eps": config.norm_eps,
    }
    attention = [net for net, own in zip(nets, with_memory, strict=True) if not own]
    if attention:
        sizes |= _fla_attention_sizes(attention)
    gate = GATES[config.output_gate_activation] if config.use_gate else None
    memory = _memory(
        heads,
        net.num_heads,
        net.head_k_dim,
        net.head_v_dim,
        net.conv_size if config.use_short_conv else 1,
        conv_init="uniform" if config.use_short_conv else "identity",
        allow_neg_eigval=config.allow_neg_eigval,
    )
    origins |= {
        "model.embed_tokens.weight": Origin(("model.embeddings.weight",)),
        "model.stack.norm.weight": Origin(("model.norm.weight",)),
        "lm_head.weight": Origin(("lm_head.weight",)),
    }
    read = []
    for index, (each, own) in enumerate(zip(nets, with_memory, strict=True)):
        block, old = block_of(index), f"model.layers.{index}"
        if own:
            read.append(
                SourceLayer(
                    "linear_attention",
                    {"type": "selected_attention", "norm_eps": config.norm_eps},
                    memory,
                    combiner_of(start="memory", norm_eps=config.norm_eps, memory_gate=gate),
                )
            )
            origins |= _fla_layer(f"{block}.layer", f"{old}.attn", each, gate is not None)
        else:
            policy = {
                "type": "selected_attention",
                "conv_size": 1,
                "rope_theta": float(each.rope_theta),
                "qk_norm": False,
                "norm_eps": config.norm_eps,
            }
            combiner = combiner_of(read_norm=False)
            read.append(SourceLayer("full_attention", policy, None, combiner))
            origins |= _fla_attention(f"{block}.layer", f"{old}.attn", each)
        for place, name in (("layer_norm", "attn_norm"), ("mlp_norm", "mlp_norm")):
            origins[f"{block}.{place}.weight"] = Origin((f"{old}.{name}.weight",))
    return Source(family, sizes, read, origins)


def _fla_attention_sizes(nets: list[Any]) -> dict[str, Any]:
    """The sizes of `fla.layers.Attention` as arguments of `HAMConfig`, which has one for each."""
    sizes = {
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "head_dim",
        "qkv_bias": "qkv_bias",
    }
    for name in sizes.values():
        found = sorted({getattr(net, name) for net in nets})
        if len(found) > 1:
            raise wrong(f"config.attn: {name}", "the same in all layers of attention", f"{found}")
    for net in nets:
        if net.window_size is not None:
            raise wrong("config.attn: window_size", "None", f"{net.window_size}")
    return {ours: getattr(nets[0], name) for ours, name in sizes.items()}


def _fla_attention(place: str, old: str, net: Any) -> dict[str, Origin]:
    """The weights of one `fla.layers.Attention`."""
    origins = {
        f"{place}.{name}.{kind}": Origin((f"{old}.{name}.{kind}",))
        for name in ("q_proj", "k_proj", "v_proj")
        for kind in (("weight", "bias") if net.qkv_bias else ("weight",))
    }
    # where the memory's read has a projection too, attention's is the last
    last = slice(-net.num_heads * net.head_dim, None)
    output = Origin((f"{old}.o_proj.weight",), columns=last)
    return origins | {f"{place}.combiner.o_proj.weight": output}


def _fla_layer(place: str, old: str, net: Any, gated: bool) -> dict[str, Origin]:
    """The weights of one `fla.layers.GatedDeltaNet`."""
    memory = ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj")
    names = {f"memory.{name}.weight": f"{name}.weight" for name in memory}
    names |= {f"memory.{name}": name for name in ("A_log", "dt_bias")}
    names["combiner.memory_norm.weight"] = "o_norm.weight"
    if gated:
        names["combiner.memory_g_proj.weight"] = "g_proj.weight"
    origins = {f"{place}.{new}": Origin((f"{old}.{name}",)) for new, name in names.items()}
    if net.use_short_conv:  # else one tap of weight 1: the activation alone
        taps = tuple(f"{old}.{name}_conv1d.weight" for name in "qkv")
        origins[f"{place}.memory.conv.weight"] = Origin(taps, _taps)
    first = slice(net.value_dim)
    output = Origin((f"{old}.o_proj.weight",), columns=first)
    return origins | {f"{place}.combiner.o_proj.weight": output}


def _taps(*weights: Tensor) -> Tensor:
    """The weights `[channels, 1, taps]` of convolutions, side by side as `[channels, taps]`."""
    return torch.cat(weights).squeeze(1)
