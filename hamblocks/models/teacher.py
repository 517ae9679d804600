"""The teacher inside a converted model: the layers of the source, with the weights of the source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks.layer import HAMLayer
from hamblocks.protocols import PreparesTokens

SINKS = 4
"""First tokens whose attention says nothing about distance."""

NEAR = 64
"""Nearer tokens are left to a window."""


class Taught(NamedTuple):
    """What the source computes in one layer.

    Attributes:
        layer: its index.
        x: `[B, T, hidden]`, its normed input.
        y: `[B, T, hidden]`, what the layer of the source gives.
        hidden: `[B, T, hidden]`, what the block gives.
    """

    layer: int
    x: Tensor
    y: Tensor
    hidden: Tensor


@torch.no_grad()
def full_attention(model: nn.Module, ids: Tensor) -> Iterator[Taught]:
    """Runs the source of a converted model, layer by layer.

    Args:
        model: a model of `convert`.
        ids: int `[B, T]`.
    """
    base: Any = model.base_model
    hidden = base.embed_tokens(ids)
    for index, decoder in enumerate(base.stack.blocks):
        block = decoder.block
        x = block.layer_norm(hidden)
        y = source_of(block.layer, x)
        hidden = hidden + y
        hidden = hidden + block.mlp(block.mlp_norm(hidden))
        yield Taught(index, x, y, hidden)


@torch.no_grad()
def source_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits `[B, T, vocab]` of the source of a converted `HAMForCausalLM`."""
    *_, last = full_attention(model, ids)
    causal: Any = model
    logits: Tensor = causal.lm_head(causal.base_model.stack.norm(last.hidden))
    return logits


def source_of(layer: HAMLayer, x: Tensor) -> Tensor:
    """What the source's layer gives for normed inputs x `[B, T, hidden]`.

    It is full attention, or in a layer that had a memory the memory alone.
    """
    combiner: Any = layer.combiner
    weight = combiner.o_proj.weight
    # where both reads have a projection, the memory's is the first and attention's the last
    if combiner.start == "memory":
        memory: Any = layer.memory
        position = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)[None]
        read, _, _ = memory(x, None, None, None, position=position)
        joined = combiner.normed(x, read, None)[0].flatten(2)
        weight = weight[:, : joined.shape[2]]
    else:
        q, k, v = _prepared(layer, x)
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        joined = combiner.normed(x, None, read.transpose(1, 2))[0].flatten(2)
        weight = weight[:, -joined.shape[2] :]
    y: Tensor = F.linear(joined.to(x.dtype), weight, combiner.o_proj.bias)
    return y


def half_life(layer: HAMLayer, x: Tensor) -> Tensor:
    """The distance within which half of each head's attention to far tokens lies, `[H]`.

    Queries of the second half of x count. As keys, the first tokens and the nearest do not.
    """
    q, k, _ = _prepared(layer, x)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    tokens = x.shape[1]
    asked = torch.arange(tokens // 2, tokens, device=x.device)
    logits = (q[:, :, asked] @ k.mT).float() * q.shape[3] ** -0.5
    distance = asked[:, None] - torch.arange(tokens, device=x.device)
    weight = logits.masked_fill(distance < 0, float("-inf")).softmax(-1)
    weight[..., : min(SINKS, tokens // 4)] = 0
    weight = weight.masked_fill(distance < min(NEAR, tokens // 4), 0)
    index = distance.clamp(min=0).expand_as(weight).flatten(2)
    mass = weight.new_zeros(*weight.shape[:2], tokens).scatter_add(2, index, weight.flatten(2))
    share = mass.sum(0).cumsum(-1)
    distance = (share < share[:, -1:] / 2).sum(-1)
    life: Tensor = distance.clamp(min=1).to(x.dtype)
    return life


def key_moments(layer: HAMLayer, x: Tensor) -> Tensor:
    """The second moment of each key/value head's keys before positions, `[Hkv, D, D]`."""
    k = layer.k_proj(x).unflatten(-1, (layer.dims.num_kv_heads, -1)).flatten(0, 1).double()
    moment: Tensor = torch.einsum("thd,the->hde", k, k) / len(k)
    return moment


def _prepared(layer: HAMLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as attention reads them, `[B, H, T, D]` each."""
    size, part = (-1, layer.dims.head_dim), layer.attention
    q, k, v = (proj(x).unflatten(-1, size) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    if isinstance(part, PreparesTokens):
        position = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)[None]
        q, k, v, _ = part.prepare(q, k, v, position=position)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
