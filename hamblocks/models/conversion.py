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
from hamblocks.models.origins import Source
from hamblocks.models.sources import FP32, read_source
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
"""The memory of a layer that had attention alone: its projections start as those of attention and
learn apart, and half of its state is left after 700 to 7000 tokens."""


class Conversion(NamedTuple):
    """A converted model, and where its weights come from.

    Attributes:
        model: the HAM model.
        family: model type of the source.
        layers: indices of the layers that became hybrid.
        copied: names of weights, and the weights of the source that each was copied from.
        new: names of the weights that the source has not.
        widened: names of copied weights that have new columns too, for the read that the source
            has not, and how many.
    """

    model: HAMForCausalLM
    family: str
    layers: list[int]
    copied: dict[str, tuple[str, ...]]
    new: list[str]
    widened: dict[str, int]


def convert(
    model: nn.Module,
    *,
    selector: Any,
    gate: Any = None,
    memory: Any = None,
    layers: Sequence[int] | None = None,
) -> HAMForCausalLM:
    """Makes a HAM model from a model of transformers or flash-linear-attention.

    With a selector that stores every token (`Threshold(-inf)`) the new model computes what the old
    one did, until it is trained. A layer of attention is given a memory, a layer with a memory is
    given attention; the new read has the weight 0 at first (see `ScaledSum`).

        convert(model, selector=Threshold(TargetFraction(0.15)) | Window(64) | FirstTokens(4))

    Args:
        model: a `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM`,
            `SmolLM3ForCausalLM`, `Qwen3NextForCausalLM`, or fla's `GatedDeltaNetForCausalLM`. It
            does not change, and its weights are copied.
        selector: which tokens are stored: a part, its policy as JSON, or a list with one per layer.
        gate: as `selector`; None: the cosine prediction error.
        memory: as `selector`, for layers that had attention alone (None in a list for the others);
            None: the gated delta rule, with projections of its own that start as those of
            attention. A memory that the model has is kept.
        layers: indices of the layers that become hybrid; the others stay as they are, full
            attention or a memory alone. None: all.

    Returns:
        The model, in the dtype, on the device and in the mode (training or eval) of `model`.

    Raises:
        ValueError: the architecture cannot be converted, or something in it would be lost (a
            sliding window, soft-capping, an unknown field, an adapter), or a memory is given for a
            layer that has one; the message names it.
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
    number = len(source.layers)
    hybrid = _checked_layers(layers, number)
    kinds = ["hybrid" if i in hybrid else layer.kind for i, layer in enumerate(source.layers)]
    config = HAMConfig(
        **source.sizes,
        layer_types=kinds,
        selector=selector,
        gate=gate,
        memory=_memories(source, memory),
        attention=_one_or_all([layer.attention for layer in source.layers]),
        combiner=_one_or_all([layer.combiner for layer in source.layers]),
    )
    made = HAMForCausalLM(config)
    first = next(model.parameters())
    nn.Module.to(made, device=first.device, dtype=first.dtype)
    if torch.finfo(first.dtype).bits < 32:
        for name, weight in made.named_parameters():
            if name.endswith(FP32):
                weight.data = weight.data.float()
    copied = _copy(model, made, source, progress)
    for layer, old in zip(made.model.stack.layers, source.layers, strict=True):
        if old.memory is None:
            start_projections(layer)
    made.train(model.training)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        made.generation_config = copy.deepcopy(generation)
    new = [name for name, _ in made.named_parameters() if name not in copied]
    weights = dict(made.named_parameters())
    widened = {
        name: weights[name].shape[1] - len(range(*origin.columns.indices(weights[name].shape[1])))
        for name, origin in source.origins.items()
        if name in copied and origin.columns is not None
    }
    widened = {name: columns for name, columns in widened.items() if columns}
    return Conversion(made, source.family, sorted(hybrid), copied, new, widened)


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
    k_heads = getattr(memory, "num_k_heads", None) or heads
    fits = layer.dims.memory_read == (heads, dim) and key == dim and k_heads == heads
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


def _memories(source: Source, memory: Any) -> Any:
    """The policy of the memory of every layer, or one for all where they agree.

    Raises:
        ValueError: a memory is given for a layer that has one, or there is no layer to give it to.
    """
    owned = [index for index, layer in enumerate(source.layers) if layer.memory is not None]
    default = copy.deepcopy(MEMORY) if memory is None else memory
    if not owned:
        return default
    if isinstance(memory, (list, tuple)):
        if len(memory) != len(source.layers):
            raise wrong("memory", f"one for each of {len(source.layers)} layers", f"{len(memory)}")
        taken = [index for index in owned if memory[index] is not None]
        if taken:
            raise wrong(
                "memory", f"None for layer {taken[0]}, which has a memory", memory[taken[0]]
            )
    elif memory is not None and len(owned) == len(source.layers):
        raise wrong("memory", "None: every layer has a memory, which is kept", memory)
    given = default if isinstance(default, (list, tuple)) else [default] * len(source.layers)
    return _one_or_all(
        [
            (MEMORY if own is None else own) if layer.memory is None else layer.memory
            for layer, own in zip(source.layers, given, strict=True)
        ]
    )


def _one_or_all(policies: list[Any]) -> Any:
    """The policies of all layers, or one for all where they agree."""
    return policies if any(policy != policies[0] for policy in policies) else policies[0]


@torch.no_grad()
def _copy(
    model: nn.Module, made: HAMForCausalLM, source: Source, progress: Progress | None
) -> dict[str, tuple[str, ...]]:
    """Copies all weights, and returns where each came from.

    Raises:
        ValueError: a weight of the source has no place, or another shape than its place.
    """
    origins = dict(source.origins)
    weights, targets = model.state_dict(keep_vars=True), dict(made.named_parameters())
    if source.sizes["tie_word_embeddings"]:
        (name,) = origins["model.embed_tokens.weight"].names
        if weights["lm_head.weight"] is not weights[name]:
            expected = (
                f"the weight of {name[: -len('.weight')]}, as config.tie_word_embeddings says"
            )
            raise wrong("model.lm_head", expected, "a weight of its own")
        del origins["lm_head.weight"], weights["lm_head.weight"]
    left = sorted(set(weights) - {name for origin in origins.values() for name in origin.names})
    if left:
        raise wrong("model", "only weights that a HAM model has a place for", ", ".join(left))
    for done, (place, origin) in enumerate(origins.items(), 1):
        given: list[Tensor] = [weights[name].data for name in origin.names]
        try:
            value = origin.made(*given)
        except RuntimeError as error:
            expected = "a weight of the shape that its configuration says"
            raise wrong(f"model.{origin.names[0]}", expected, given[0]) from error
        target: Tensor = targets[place]
        if origin.columns is not None:
            target = target[:, origin.columns]
        if value.shape != target.shape:
            expected = f"shape {list(target.shape)}, as its configuration says"
            raise wrong(f"model.{origin.names[0]}", expected, value)
        target.copy_(value)
        if progress is not None:
            progress("weights", done, len(origins), place)
    return {place: origin.names for place, origin in origins.items()}


def rows(converted: Conversion) -> list[tuple[str, str, str]]:
    """What was mapped and what is new, one row per kind of weight: place, source, and shape.

    Layers that hold the same share a row.
    """
    weights = dict(converted.model.named_parameters())
    kinds: dict[tuple[str, str, str], int] = {}
    for name, weight in weights.items():
        source = " + ".join(converted.copied.get(name, ())) or "new"
        if name in converted.widened:
            source += f", and {converted.widened[name]} new columns"
        row = (_any_layer(name), _any_layer(source), f"{list(weight.shape)}")
        kinds[row] = kinds.get(row, 0) + 1
    return [
        (place, source, shape if count == 1 else f"{count} x {shape}")
        for (place, source, shape), count in kinds.items()
    ]


def _any_layer(name: str) -> str:
    """The name of a weight without the index of its layer."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
