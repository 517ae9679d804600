"""A cache policy over the attention of a transformers model, without a conversion.

transformers lets a model call any attention function. The one registered here sends queries, keys
and values of every layer through a `HAMLayer` with projections that only take columns: gate,
selector, cache and attention are the same parts as in every other layer of hamblocks.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from hamblocks.keys import Keys
from hamblocks.layer import HAMLayer
from hamblocks.models.cache import CACHE, StateCache
from hamblocks.models.key_value_memory import KeyValueMemory
from hamblocks.outputs import LayerStats
from hamblocks.protocols import LayerDims
from hamblocks_ops.arguments import wrong

NAME = "hamblocks_policy"
"""The name of the attention function in transformers."""

CHANGES_NOTHING = (
    "position_ids",
    "cache_position",
    "position_embeddings",
    "use_cache",
    "output_hidden_states",
    "return_dict",
)
"""Arguments of an attention function that do not change what it reads, or are checked elsewhere."""

Parts = Callable[[int, LayerDims], Mapping[str, Any]]
"""Returns gate, selector and, where the gate reads one, memory for a layer: its number and sizes."""


@final
class AttachedCache(StateCache):
    """The stored tokens of a model with an attached policy; transformers calls `update`."""

    def __init__(
        self, policy: AttachedPolicy, *, page_size: int = 32, max_pages: int | None = None
    ) -> None:
        """Called by `AttachedPolicy.cache`."""
        super().__init__(page_size=page_size, max_pages=max_pages)
        self.policy = policy

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns the new keys and values as they are: attention gets the stored ones itself."""
        self.policy.expect(self, layer_idx, key_states)
        return key_states, value_states

    def state(self, layer_idx: int, layer: HAMLayer, batch: int) -> Any:
        """The state of a layer before the call.

        Raises:
            ValueError: the cache holds another number of sequences.
        """
        if self.states is None:
            self.states = [
                one.init_state(batch, page_size=self.page_size, max_pages=self.max_pages)
                for one in self.policy.layers
            ]
        if self.batch_size != batch:
            raise wrong("input_ids", f"{self.batch_size} sequences, as past_key_values", str(batch))
        return self.states[layer_idx]

    def advance(self, layer_idx: int, state: Any, tokens: int) -> None:
        """Stores the state of a layer after a call."""
        assert self.states is not None
        self.states = [*self.states[:layer_idx], state, *self.states[layer_idx + 1 :]]
        if layer_idx == len(self.states) - 1:
            self.columns += tokens

    @property
    def tokens(self) -> list[Tensor]:
        """Number of stored tokens, int64 `[N, Hkv]`, per layer."""
        return [state.cache.tokens for state in self.states or [] if state.cache is not None]


@final
class AttachedPolicy:
    """A policy while it is attached to a model; see `attach_policy`.

    Attributes:
        layers: one `HAMLayer` per layer of the model, whose gate and selector may be replaced.
        stats: what each layer decided in the last call, or None before the first.
    """

    layers: list[HAMLayer]
    stats: list[LayerStats | None]

    def __init__(self, model: PreTrainedModel, parts: Parts) -> None:
        self._modules = _attention_modules(model)
        self._hidden: dict[int, Tensor] = {}
        self._given: Tensor | None = None
        self._expected: tuple[AttachedCache, int, Tensor] | None = None
        weight = next(model.parameters())
        self.layers = [
            _layer_of(model, module, index, parts).to(weight.device, weight.dtype).eval()
            for index, module in enumerate(self._modules)
        ]
        self.stats = [None] * len(self.layers)

    def cache(self, *, page_size: int = 32, max_pages: int | None = None) -> AttachedCache:
        """An empty cache, for `model(..., past_key_values=cache)` and `model.generate`.

        Args:
            page_size: tokens in a page of a layer's cache.
            max_pages: limit to the pages of a layer's cache; None: no limit.
        """
        return AttachedCache(self, page_size=page_size, max_pages=max_pages)

    @contextlib.contextmanager
    def given(self, score: Tensor) -> Iterator[None]:
        """Hands a score `[B, T, heads]` to the gates (`GivenScore`) of the calls in this context."""
        before, self._given = self._given, score
        try:
            yield
        finally:
            self._given = before

    def expect(self, cache: AttachedCache, layer_idx: int, k: Tensor) -> None:
        """Notes that the next attention call continues a cache."""
        self._expected = cache, layer_idx, k

    def check_positions(self, position_ids: Tensor | None, tokens: int) -> None:
        """Checks that positions go on from the tokens seen: a layer counts them itself."""
        if position_ids is None:
            return
        begin = self._expected[0].columns if self._expected is not None else 0
        counted = torch.arange(begin, begin + tokens, device=position_ids.device)
        if not torch.equal(position_ids, counted.expand_as(position_ids)):
            raise wrong("position_ids", f"{begin}, {begin + 1}, ... (or none)", "others")

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Attention of one layer.

        Args:
            index: number of the layer.
            q: `[B, H, T, D]`.
            k: `[B, Hkv, T, D]`.
            v: `[B, Hkv, T, D]`.
            scale: factor of the logits.

        Returns:
            `[B, T, H, D]`.
        """
        layer, expected = self.layers[index], self._expected
        self._expected = None
        cache = expected[0] if expected is not None and expected[2] is k else None
        if q.shape[2] != k.shape[2]:
            expected_cache = "a cache of this policy (AttachedPolicy.cache()), or none"
            raise wrong("past_key_values", expected_cache, "one that returns older keys too")
        assert isinstance(layer.attention, _Scaled)
        layer.attention.scale = scale
        joined = torch.cat(
            [self._hidden.pop(index), *(x.transpose(1, 2).flatten(2) for x in (q, k, v))], -1
        )
        state = None if cache is None else cache.state(index, layer, len(q))
        y, state, self.stats[index] = layer(joined, state=state, given_score=self._given)
        if cache is not None:
            cache.advance(index, state, q.shape[2])
        read: Tensor = y[..., : q.shape[1] * q.shape[3]].unflatten(-1, (q.shape[1], q.shape[3]))
        return read.contiguous()

    @contextlib.contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[AttachedPolicy]:
        """Attaches the policy to the model it was made for, until the context ends."""
        taken = [module for module in self._modules if module in _ATTACHED]
        if taken:
            raise wrong("model", "one without an attached policy", "one that has one")
        before, forward = model.config._attn_implementation, model.forward
        own = "forward" in vars(model)
        hooks = []
        try:
            for index, module in enumerate(self._modules):
                _ATTACHED[module] = self, index
                note = functools.partial(self._note_hidden, index)
                hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
            model.set_attn_implementation(NAME)
            model.forward = self._guarded(forward)
            yield self
        finally:
            if own:
                model.forward = forward
            else:
                vars(model).pop("forward", None)
            model.set_attn_implementation(before)
            for hook in hooks:
                hook.remove()
            for module in self._modules:
                _ATTACHED.pop(module, None)

    def _note_hidden(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = kwargs.get("hidden_states", args[0] if args else None)
        if not isinstance(x, Tensor):
            raise wrong("model", "attention modules that are given hidden_states", type(module))
        self._hidden[index] = x

    def _guarded(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of the model, which leaves a cache as it was if it raises."""
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if "past_key_values" in kwargs:
                kwargs[CACHE] = kwargs.pop("past_key_values")
            given = signature.bind_partial(*args, **kwargs).arguments
            cache = given.get(CACHE)
            if cache is not None and not isinstance(cache, AttachedCache):
                expected = "a cache of the attached policy (AttachedPolicy.cache())"
                raise wrong("past_key_values", expected, type(cache).__name__)
            if cache is not None and cache.policy is not self:
                raise wrong("past_key_values", "a cache of the attached policy", "one of another")
            if cache is None and given.get("use_cache"):
                cache = kwargs[CACHE] = self.cache()
            elif cache is None:
                kwargs["use_cache"] = False  # else transformers makes a cache of its own
            with contextlib.nullcontext() if cache is None else cache.unchanged_on_error():
                try:
                    return forward(*args, **kwargs)
                finally:
                    self._hidden.clear()
                    self._expected = None

        return guarded


@contextlib.contextmanager
def attach_policy(model: PreTrainedModel, parts: Parts) -> Iterator[AttachedPolicy]:
    """Lets a policy decide what a transformers model stores, until the context ends.

        def parts(layer, dims):
            return {"gate": ValueNorm(), "selector": Threshold(TargetFraction(0.25)) | Window(64)}

        with attach_policy(model, parts) as policy:
            model.generate(ids, past_key_values=policy.cache())

    Keys and values are stored as the model's attention gets them, after rotary positions. An
    evicted token is not read, in one pass and piece by piece alike. A gate that reads a prediction
    error needs a memory that has no weights, such as `KeyValueMemory()`; what the memory reads is
    dropped. `x` of a gate is the input of the attention module, followed by q, k and v.

    Args:
        model: a decoder whose attention modules use transformers' attention interface, with full
            causal attention in every layer.
        parts: called with the number of a layer and its sizes; returns its `gate`, `selector` and
            `memory` (each may be missing: no gate, everything is stored, no memory).

    Raises:
        ValueError: the model has other layers than full attention, or already has a policy. A call
            of the model raises it for padding, sliding windows, soft-capping, dropout, attention
            sinks, other positions than 0, 1, 2, ..., and caches that are not the policy's.
    """
    policy = AttachedPolicy(model, parts)
    with policy.attached(model):
        yield policy


class _Columns(nn.Module):
    """A projection that takes columns of x."""

    def __init__(self, begin: int, size: int) -> None:
        super().__init__()
        self.begin, self.size = begin, size

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.begin : self.begin + self.size]


class _Scaled(nn.Module):
    """Attention over keys and queries that the model has prepared."""

    scale: float | None = None

    def forward(self, q: Tensor, keys: Keys) -> Tensor:
        return keys.attend(q, scale=self.scale).out


class _AttentionRead(nn.Module):
    """The read of attention, padded to the width of x."""

    def forward(self, x: Tensor, memory_read: Tensor | None, attention_read: Tensor) -> Tensor:
        read = attention_read.flatten(2)
        return pad(read, (0, x.shape[2] - read.shape[2]))


_ATTACHED: WeakKeyDictionary[nn.Module, tuple[AttachedPolicy, int]] = WeakKeyDictionary()
"""Attention modules with a policy, and their number."""


def _attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of a model by number.

    Raises:
        ValueError: they are not as many as the model has layers.
    """
    found: dict[Any, nn.Module] = {
        module.layer_idx: module
        for module in model.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal")
    }
    count = model.config.num_hidden_layers
    if sorted(found) != list(range(count)):
        got = f"{len(found)} attention modules with a layer_idx and is_causal"
        raise wrong("model", f"a decoder with attention in all of its {count} layers", got)
    for index, module in found.items():
        if not module.is_causal:
            raise wrong("model", "causal attention", f"layer {index} with is_causal=False")
    return [found[index] for index in range(count)]


def _layer_of(model: PreTrainedModel, module: nn.Module, index: int, parts: Parts) -> HAMLayer:
    config = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(module, "head_dim", None) or config.hidden_size // heads
    begin, q, kv = config.hidden_size, heads * dim, kv_heads * dim
    dims = LayerDims(begin + q + 2 * kv, heads, kv_heads, dim)
    chosen = {"gate": None, "selector": None, "memory": None} | dict(parts(index, dims))
    memory = chosen["memory"]
    if memory is not None and next(memory.parameters(), None) is not None:
        raise wrong("memory", "one without weights (nobody has trained them)", memory)
    if isinstance(memory, KeyValueMemory):
        memory.place(begin + q)
    layer = HAMLayer(
        dims.hidden_size,
        heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        attention=_Scaled(),
        combiner=_AttentionRead(),
        **chosen,
    )
    for name, first, size in (("q", 0, q), ("k", q, kv), ("v", q + kv, kv)):
        setattr(layer, f"{name}_proj", _Columns(begin + first, size))
    return layer


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls."""
    if module not in _ATTACHED:
        raise wrong("attn_implementation", "a model with an attached policy", f"{NAME} alone")
    policy, index = _ATTACHED[module]
    if index == 0:
        policy.check_positions(kwargs.get("position_ids"), query.shape[2])
    for name, argument in (("dropout", dropout), *kwargs.items()):
        changes = argument is not None and argument is not False and name not in CHANGES_NOTHING
        if changes and not (isinstance(argument, (int, float)) and argument == 0):
            raise wrong(name, "none: it would change what attention reads", argument)
    if value.shape != key.shape:
        raise wrong("value", "the shape of the keys", list(value.shape))
    return policy.attend(index, query, key, value, scaling), None


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """No mask: the layers know which token sees which."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise wrong("attention_mask", "no padding (one sequence, or several of one length)", "some")


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
