"""`convert`: a model of transformers becomes a HAM model that computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hamblocks.layer import HAMLayer
from hamblocks.models.configuration import HAMConfig
from hamblocks.models.modeling import HAMForCausalLM
from hamblocks.models.sources import Source, read_source
from hamblocks.protocols import check_count
from hamblocks_ops.arguments import wrong

Progress = Callable[[str, int, int, str], None]
"""Called as `progress(name, done, total, remark)`."""

MEMORY = {
    "type": "gated_delta_memory",
    "conv_size": 1,
    "conv_init": "identity",
    "conv_activation": None,
    "projections": "own",
    "A_init_range": [1.0, 1.0],
    "dt_min": 0.0001,
    "dt_max": 0.001,
}
"""The memory of a converted layer: its projections start as those of attention and learn apart, and
half of its state is left after 700 to 7000 tokens."""

FP32 = ("A_log", "dt_bias")
"""Weights that stay in float32 in a narrower model."""


class Conversion(NamedTuple):
    """A converted model, and where its weights come from.

    Attributes:
        model: the HAM model.
        family: model type of the source.
        layers: indices of the layers that became hybrid.
        copied: names of weights, and the weights of the source that each was copied from.
        new: names of the weights that the source has not.
    """

    model: HAMForCausalLM
    family: str
    layers: list[int]
    copied: dict[str, tuple[str, ...]]
    new: list[str]


def convert(
    model: nn.Module,
    *,
    selector: Any,
    gate: Any = None,
    memory: Any = None,
    layers: Sequence[int] | None = None,
) -> HAMForCausalLM:
    """Makes a HAM model from a model of transformers.

    With a selector that stores every token (`Threshold(-inf)`) the new model computes what the old
    one did, until it is trained: the memory's read has the weight 0 at first (see `ScaledSum`).

        convert(model, selector=Threshold(TargetFraction(0.15)) | Window(64) | FirstTokens(4))

    Args:
        model: a `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM` or
            `SmolLM3ForCausalLM`. It does not change, and its weights are copied.
        selector: which tokens are stored: a part, its policy as JSON, or a list with one per layer.
        gate: as `selector`; None: the cosine prediction error.
        memory: as `selector`; None: the gated delta rule, with projections of its own that start
            as those of attention.
        layers: indices of the layers that become hybrid; the others stay full attention. None: all.

    Returns:
        The model, in the dtype, on the device and in the mode (training or eval) of `model`.

    Raises:
        ValueError: the architecture cannot be converted, or something in it would be lost (a
            sliding window, soft-capping, an unknown field, an adapter); the message names it.
    """
    return convert_recorded(model, selector=selector, gate=gate, memory=memory, layers=layers).model


def convert_recorded(
    model: nn.Module,
    *,
    selector: Any,
    gate: Any = None,
    memory: Any = None,
    layers: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """As `convert`, with a record of every weight.

    Args:
        model: as in `convert`.
        selector: as in `convert`.
        gate: as in `convert`.
        memory: as in `convert`.
        layers: as in `convert`.
        progress: called after every weight as `progress(name, done, total, remark)`.

    Raises:
        ValueError: as in `convert`.
    """
    source = read_source(model)
    number = source.sizes["num_hidden_layers"]
    hybrid = _checked_layers(layers, number)
    config = HAMConfig(
        **source.sizes,
        layer_types=["hybrid" if i in hybrid else "full_attention" for i in range(number)],
        selector=selector,
        gate=gate,
        memory=copy.deepcopy(MEMORY) if memory is None else memory,
        attention=_attention(source),
        # a read without a norm has the scale of the values, as the read of attention has
        combiner={"type": "scaled_sum", "bias": source.output_bias, "read_norm": False},
    )
    made = HAMForCausalLM(config)
    first = next(model.parameters())
    nn.Module.to(made, device=first.device, dtype=first.dtype)
    if torch.finfo(first.dtype).bits < 32:
        for name, weight in made.named_parameters():
            if name.endswith(FP32):
                weight.data = weight.data.float()
    copied = _copy(model, made, source, progress)
    for layer in made.model.stack.layers:
        start_projections(layer)
    made.train(model.training)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        made.generation_config = copy.deepcopy(generation)
    new = [name for name, _ in made.named_parameters() if name not in copied]
    return Conversion(made, source.family, sorted(hybrid), copied, new)


@torch.no_grad()
def start_projections(layer: HAMLayer, key_map: Tensor | None = None) -> bool:
    """Starts the projections of a memory's own as those of attention, without their biases.

    Args:
        layer: a layer of a converted model.
        key_map: `[Hkv, D, D]`, multiplied to the queries and keys of each head; None: the identity.

    Returns:
        Whether the memory has projections of its own, of the same sizes as attention.
    """
    memory: Any = layer.memory
    heads, kv_heads, dim = layer.dims[1:4]
    key = getattr(memory, "head_dim", None) or dim
    fits = layer.dims.memory_read == (heads, dim) and key == dim
    if not fits or getattr(memory, "projections", None) != "own":
        return False
    for name in ("q_proj", "k_proj", "v_proj"):
        weight: Tensor = getattr(layer, name).weight.unflatten(0, (-1, dim))
        weight = weight.repeat_interleave(heads // len(weight), 0)
        if key_map is not None and name != "v_proj":
            root = key_map.to(weight.dtype).repeat_interleave(heads // kv_heads, 0)
            weight = root @ weight
        getattr(memory, name).weight.copy_(weight.flatten(0, 1))
    return True


def _checked_layers(layers: Sequence[int] | None, number: int) -> set[int]:
    """The indices of the layers that become hybrid."""
    if layers is None:
        return set(range(number))
    given = [check_count("layers", layer) for layer in layers]
    if not given or max(given) >= number or len(set(given)) < len(given):
        expected = f"one or more different indices below {number}, the number of layers"
        raise wrong("layers", expected, repr(list(layers)))
    return set(given)


def _attention(source: Source) -> dict[str, Any] | list[dict[str, Any]]:
    """The policy of attention of every layer, or one for all where they agree."""
    policies = [
        {
            "type": "selected_attention",
            "conv_size": 1,
            "rope_theta": theta,
            "rope_scaling": None if theta is None else copy.deepcopy(source.rope_scaling),
            "qk_norm": source.qk_norm,
            "norm_eps": source.sizes["rms_norm_eps"],
        }
        for theta in source.rope_theta
    ]
    return policies if any(policy != policies[0] for policy in policies) else policies[0]


@torch.no_grad()
def _copy(
    model: nn.Module, made: HAMForCausalLM, source: Source, progress: Progress | None
) -> dict[str, tuple[str, ...]]:
    """Copies all weights, and returns where each came from.

    Raises:
        ValueError: a weight of the source has no place, or another shape than its place.
    """
    places = _places(source)
    weights, targets = model.state_dict(keep_vars=True), dict(made.named_parameters())
    if source.sizes["tie_word_embeddings"]:
        head, embedding = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
        if head is not embedding:
            expected = "the weight of model.embed_tokens, as config.tie_word_embeddings says"
            raise wrong("model.lm_head", expected, "a weight of its own")
        del places["lm_head.weight"], weights["lm_head.weight"]
    left = sorted(set(weights) - {name for names in places.values() for name in names})
    if left:
        raise wrong("model", "only weights that a HAM model has a place for", ", ".join(left))
    for done, (place, names) in enumerate(places.items(), 1):
        value: Tensor = torch.cat([weights[name].data for name in names])
        target: Tensor = targets[place]
        if place.endswith("combiner.o_proj.weight"):
            # where the memory's read has a projection too, attention's is the last
            target = target[:, -source.sizes["num_attention_heads"] * source.sizes["head_dim"] :]
        if value.shape != target.shape:
            expected = f"shape {list(target.shape)}, as its configuration says"
            raise wrong(f"model.{names[0]}", expected, value)
        target.copy_(value)
        if progress is not None:
            progress("weights", done, len(places), place)
    return places


def _places(source: Source) -> dict[str, tuple[str, ...]]:
    """Weights of the HAM model, and those of the source that each is made of."""
    places: dict[str, tuple[str, ...]] = {
        "model.embed_tokens.weight": ("model.embed_tokens.weight",),
        "model.stack.norm.weight": ("model.norm.weight",),
        "lm_head.weight": ("lm_head.weight",),
    }
    for layer in range(source.sizes["num_hidden_layers"]):
        block, old = f"model.stack.blocks.{layer}.block", f"model.layers.{layer}"
        places[f"{block}.layer_norm.weight"] = (f"{old}.input_layernorm.weight",)
        places[f"{block}.mlp_norm.weight"] = (f"{old}.post_attention_layernorm.weight",)
        if source.qk_norm:
            for name in ("q_norm", "k_norm"):
                place = f"{block}.layer.attention.{name}.weight"
                places[place] = (f"{old}.self_attn.{name}.weight",)
        for kind in ("weight", "bias"):
            if kind == "weight" or source.sizes["qkv_bias"]:
                for name in ("q_proj", "k_proj", "v_proj"):
                    places[f"{block}.layer.{name}.{kind}"] = (f"{old}.self_attn.{name}.{kind}",)
            if kind == "weight" or source.output_bias:
                place = f"{block}.layer.combiner.o_proj.{kind}"
                places[place] = (f"{old}.self_attn.o_proj.{kind}",)
            if kind == "weight" or source.sizes["mlp_bias"]:
                gate, up = (f"{old}.mlp.{name}_proj.{kind}" for name in ("gate", "up"))
                places[f"{block}.mlp.up_proj.{kind}"] = (gate, up)
                places[f"{block}.mlp.down_proj.{kind}"] = (f"{old}.mlp.down_proj.{kind}",)
    return places


def rows(converted: Conversion) -> list[tuple[str, str, str]]:
    """What was mapped and what is new, one row per kind of weight: place, source, and shape.

    Layers that hold the same share a row.
    """
    weights = dict(converted.model.named_parameters())
    kinds: dict[tuple[str, str, str], int] = {}
    for name, weight in weights.items():
        source = " + ".join(converted.copied.get(name, ())) or "new"
        row = (_any_layer(name), _any_layer(source), f"{list(weight.shape)}")
        kinds[row] = kinds.get(row, 0) + 1
    return [
        (place, source, shape if count == 1 else f"{count} x {shape}")
        for (place, source, shape), count in kinds.items()
    ]


def _any_layer(name: str) -> str:
    """The name of a weight without the index of its layer."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
