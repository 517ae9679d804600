"""What `convert` reads of a source, and which of its weights each weight of a HAM model is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamblocks.models.policies import Policy
from hamblocks.rope import LENGTH
from hamblocks_ops.arguments import wrong


def stacked(*weights: Tensor) -> Tensor:
    """The weights, one below the other."""
    return weights[0] if len(weights) == 1 else torch.cat(weights)


class Origin(NamedTuple):
    """How a weight is made from those of the source.

    Attributes:
        names: names of the weights in the source.
        made: makes the weight from them.
        columns: the columns of the weight that are made; the others are new. None: all.
    """

    names: tuple[str, ...]
    made: Callable[..., Tensor] = stacked
    columns: slice | None = None


class SourceLayer(NamedTuple):
    """One layer of a source.

    Attributes:
        kind: "full_attention" or "linear_attention", the kind of a layer that does not become
            hybrid.
        attention: policy of attention: that of the source, or for a layer without attention that
            of the one it is given.
        memory: policy of the memory that the source has; None: it has attention.
        combiner: policy of the combiner, which starts at what the source computes.
    """

    kind: str
    attention: Policy
    memory: Policy | None
    combiner: Policy


class Source(NamedTuple):
    """What a model is made of.

    Attributes:
        family: its model type.
        sizes: arguments of `HAMConfig` that are taken over.
        layers: its layers.
        origins: weights of the HAM model by name.
    """

    family: str
    sizes: dict[str, Any]
    layers: list[SourceLayer]
    origins: dict[str, Origin]


SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "initializer_range",
    "use_cache",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""Fields that a source and `HAMConfig` both have."""


def sizes_of(config: Any, *names: str) -> dict[str, Any]:
    """The fields of `SIZES` and more of a configuration."""
    return {name: getattr(config, name) for name in (*SIZES, *names)}


def combiner_of(**given: Any) -> Policy:
    """The policy of the combiner of a converted layer."""
    return {"type": "scaled_sum", **given}


def block_of(layer: int) -> str:
    """The name of a block of a HAM model."""
    return f"model.stack.blocks.{layer}.block"


def rope_of(config: Any, inert: tuple[str, ...] = ()) -> dict[str, Any]:
    """Base, scaling and share of the rotary positions, as arguments of `SelectedAttention`.

    Args:
        config: the configuration of the source.
        inert: numbers that change nothing for a text.

    Raises:
        ValueError: a number that the kind of scaling does not read.
    """
    given = {name: value for name, value in config.rope_parameters.items() if name not in inert}
    theta, kind = float(given.pop("rope_theta")), given.pop("rope_type", "default")
    share = given.pop("partial_rotary_factor", None)
    given = {name: value for name, value in given.items() if value is not None}
    if kind in ("default", "linear"):
        given.pop(LENGTH, None)  # which these do not read
    if kind == "default" and given:
        raise wrong("config.rope_parameters", "rope_theta alone for default", repr(given))
    if kind == "dynamic":  # transformers reads the length from the configuration
        given[LENGTH] = config.max_position_embeddings
    if kind == "yarn" and "factor" not in given:
        given["factor"] = config.max_position_embeddings / given[LENGTH]
    return {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **given},
        "partial_rotary_factor": 1.0 if share is None else share,
    }


def has_bias(layers: Any, part: str, names: tuple[str, ...]) -> bool:
    """Whether the projections have biases; all of a kind have them, or none."""
    found = {
        getattr(getattr(layer, part), name).bias is not None for layer in layers for name in names
    }
    if len(found) > 1:
        raise wrong(f"model: {part}", f"a bias in all of {', '.join(names)}, or in none", "some")
    return found.pop()


def mlps_of(config: Any, layers: Any) -> tuple[dict[str, Any], dict[str, Origin]]:
    """The MLPs of all blocks, and mixtures of experts in their place.

    Args:
        config: the configuration of the source.
        layers: its blocks, each with an `mlp`.

    Returns:
        Arguments of `HAMConfig`, and the weights.

    Raises:
        ValueError: some projections of the MLPs have a bias and some have none.
    """
    sparse = [layer.mlp for layer in layers if hasattr(layer.mlp, "experts")]
    dense = [layer for layer in layers if not hasattr(layer.mlp, "experts")]
    biased = bool(dense) and has_bias(dense, "mlp", ("gate_proj", "up_proj", "down_proj"))
    kinds = ("weight", "bias") if biased else ("weight",)
    inner = getattr(config, "intermediate_size", None)
    sizes: dict[str, Any] = {
        "intermediate_size": dense[0].mlp.gate_proj.out_features if dense else inner,
        "mlp_bias": biased,
    }
    if sparse:
        number, width = sparse[0].experts.gate_up_proj.shape[:2]
        shared = getattr(sparse[0], "shared_expert", None)
        sizes |= {
            "mlp_layer_types": ["dense" if layer in dense else "sparse" for layer in layers],
            "num_experts": number,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": width // 2,
            "norm_topk_prob": getattr(config, "norm_topk_prob", True),
        }
        if shared is not None:
            sizes["shared_expert_intermediate_size"] = shared.gate_proj.weight.shape[0]
    origins: dict[str, Origin] = {}
    for index, layer in enumerate(layers):
        place, old = f"{block_of(index)}.mlp", f"model.layers.{index}.mlp"
        if layer in dense:
            origins |= mlp_origins(place, old, kinds)
        else:
            origins |= _experts(place, old, hasattr(layer.mlp, "shared_expert"))
    return sizes, origins


def _experts(place: str, old: str, shared: bool) -> dict[str, Origin]:
    """The weights of a mixture of experts, with an expert of all tokens or without."""
    names = {
        "router.weight": "gate.weight",
        "experts.up_proj": "experts.gate_up_proj",
        "experts.down_proj": "experts.down_proj",
    }
    if shared:
        names["shared_gate.weight"] = "shared_expert_gate.weight"
    origins = {f"{place}.{new}": Origin((f"{old}.{name}",)) for new, name in names.items()}
    if shared:
        origins |= mlp_origins(f"{place}.shared_expert", f"{old}.shared_expert")
    return origins


def mlp_origins(place: str, old: str, kinds: tuple[str, ...] = ("weight",)) -> dict[str, Origin]:
    """The weights of a `SwiGLU`, from an MLP whose gate and up are apart."""
    origins = {}
    for kind in kinds:
        gate, up, down = (f"{old}.{name}_proj.{kind}" for name in ("gate", "up", "down"))
        origins[f"{place}.up_proj.{kind}"] = Origin((gate, up))
        origins[f"{place}.down_proj.{kind}"] = Origin((down,))
    return origins
