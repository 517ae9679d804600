"""Which heads copy: the heads that read what followed an earlier copy of a token."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hamblocks.keys import Keys
from hamblocks.layer import HAMLayer
from hamblocks.models.attached import attach_policy
from hamblocks.models.modeling import HAMForCausalLM
from hamblocks_ops.arguments import check_integer, check_tensor, wrong


@torch.no_grad()
def copying_by_head(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """How much each head copies: its attention to earlier copies of the token and what followed.

    The model reads the tokens twice, one copy after the other. Where the tokens are random, nothing
    but the first copy tells what comes next. Heads with much attention there are those that
    retrieve (RazorAttention, arXiv 2407.15891, finds its heads so; DuoAttention, arXiv 2410.10819,
    trains a gate for each). It takes no labels.

    Args:
        model: a model of transformers that `attach_policy` takes, or a `HAMForCausalLM`. Whatever
            its policy is, everything is stored meanwhile.
        tokens: int64 `[B, T]`, random tokens of the model's vocabulary.

    Returns:
        `[layers, Hkv]`, float32, in [0, 1]: mean over the second copy, and the largest of the query
        heads that share a key/value head. Of a `HAMForCausalLM` the layers are those with attention.

    Raises:
        ValueError: a bad argument, or a model that no policy can be attached to.
    """
    check_tensor("tokens", tokens, "[B, T]", [None, None])
    check_integer("tokens", tokens)
    if tokens.shape[1] < 2:
        raise wrong("tokens", "two or more in a row", tokens)
    found: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        if isinstance(model, HAMForCausalLM):
            layers = attention_layers(model)
            stack.enter_context(_everything_stored(layers))
        else:
            layers = stack.enter_context(attach_policy(model, lambda layer, dims: {})).layers
        for index, layer in enumerate(layers):
            hook = _hook(found, index, layer.dims.num_kv_heads, tokens.shape[1])
            handle = layer.attention.register_forward_hook(hook)  # type: ignore[union-attr]
            stack.callback(handle.remove)
        model(tokens.repeat(1, 2), use_cache=False)
    return torch.stack([found[index] for index in range(len(layers))])


def attention_layers(model: HAMForCausalLM) -> list[HAMLayer]:
    """The layers of a model that have attention, from the first to the last."""
    return [
        module
        for module in model.modules()
        if isinstance(module, HAMLayer) and module.attention is not None
    ]


def _hook(found: dict[int, Tensor], index: int, kv_heads: int, period: int) -> Any:
    def measure(module: Any, args: tuple[Tensor, Keys], output: Tensor) -> None:
        q, keys = args
        dense = keys.dense()
        logits = dense.logits(q, scale=getattr(module, "scale", None))
        weights = dense.softmax(logits)[:, :, period:-1]
        # query t = period + i sees the earlier copy at i, and what followed it at i + 1
        mass = sum(weights.diagonal(shift, 2, 3).mean((0, 2)) for shift in (0, 1))
        assert isinstance(mass, Tensor)
        found[index] = mass.view(kv_heads, -1).amax(1).float()

    return measure


@contextlib.contextmanager
def _everything_stored(layers: list[HAMLayer]) -> Any:
    before = [layer.selector for layer in layers]
    try:
        for layer in layers:
            layer.selector = None
        yield
    finally:
        for layer, selector in zip(layers, before, strict=True):
            layer.selector = selector
