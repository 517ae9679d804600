"""HAM models for transformers; loading this file makes the Auto classes know them."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from hamblocks.block import HAMBlock
from hamblocks.controllers import FixedThreshold, TargetFraction
from hamblocks.layer import HAMLayer
from hamblocks.memory import GatedDeltaMemory, ShortConvolution
from hamblocks.models.batches import batch_layout
from hamblocks.models.cache import HAMCache
from hamblocks.models.configuration import LAYER_TYPES, HAMConfig
from hamblocks.models.policies import part_of
from hamblocks.models.saving import FollowsModel
from hamblocks.models.stack import Stack
from hamblocks.outputs import LayerStats
from hamblocks.state import HAMState
from hamblocks_ops.arguments import check_integer, check_range, check_tensor, wrong

logger = logging.get_logger(__name__)


@dataclass
class HAMModelOutput(BaseModelOutputWithPast):
    """Result of a `HAMModel`.

    Attributes:
        stats: what each layer decided; of a padded batch, for its tokens packed into one row.
    """

    stats: tuple[LayerStats, ...] | None = None


@dataclass
class HAMCausalLMOutput(CausalLMOutputWithPast):
    """Result of a `HAMForCausalLM`.

    Attributes:
        stats: as in `HAMModelOutput`.
    """

    stats: tuple[LayerStats, ...] | None = None


class HAMDecoderLayer(GradientCheckpointingLayer):
    """A block whose activations transformers may checkpoint."""

    def __init__(self, layer: HAMLayer, config: HAMConfig) -> None:
        super().__init__()
        self.block = HAMBlock(
            layer, intermediate_size=config.intermediate_size, norm_eps=config.rms_norm_eps
        )

    @property
    def layer(self) -> HAMLayer:
        """The sequence mixer."""
        return self.block.layer

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        """As `HAMBlock.forward`."""
        return self.block(x, **kwargs)


def layer_of(config: HAMConfig, index: int) -> HAMLayer:
    """The layer that a configuration describes."""
    parts: dict[str, Any] = dict.fromkeys(("memory", "gate", "selector", "attention"))
    for name in LAYER_TYPES[(config.layer_types or [])[index]]:
        parts[name] = part_of(name, config.policy(name, index))
    return HAMLayer(
        config.hidden_size,
        config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        **parts,
    )


class HAMPreTrainedModel(FollowsModel):
    """What both models share: how weights begin, how they are loaded, and the thresholds."""

    config_class = HAMConfig
    config: HAMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HAMDecoderLayer"]  # noqa: RUF012 - transformers' own form
    _skip_keys_device_placement = ["past_key_values", "state"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]  # noqa: RUF012
    # a recurrence cannot forget a candidate: transformers then refuses assisted generation by name
    _is_stateful = True

    def post_init(self) -> None:
        """As transformers has it; a controller that several layers share is saved once."""
        self._keys_to_ignore_on_save = _repeated(self)
        super().post_init()  # type: ignore[no-untyped-call]

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """As transformers has it; what was loaded at its first place is not missing at the others (5.6 thinks so)."""
        super().mark_tied_weights_as_initialized(loading_info)  # type: ignore[no-untyped-call]
        again = {
            name for name in self._keys_to_ignore_on_save or () if name in loading_info.missing_keys
        }
        loading_info.missing_keys -= {
            name for name in again if _is_loaded(self.get_parameter_or_buffer(name))
        }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, ShortConvolution):
            init.copy_(module.weight, module.fresh(*module.weight.shape))
        elif isinstance(module, GatedDeltaMemory):
            for weight, initial in zip(
                (module.A_log, module.dt_bias), module.initial_decay(len(module.A_log)), strict=True
            ):
                init.copy_(weight, initial)
        elif isinstance(module, (FixedThreshold, TargetFraction)) and self._lacks(module.tau):
            module.reset()

    def _lacks(self, weight: Tensor) -> bool:
        """Whether the checkpoint that others were loaded from has no such weight, so that nobody has filled it yet."""
        return not _is_loaded(weight) and any(_is_loaded(other) for other in self.parameters())

    def set_keep_fraction(self, fraction: float) -> None:
        """Moves a trained model along the trade-off: a new target for every `TargetFraction` in it.

        Raises:
            ValueError: fraction is outside [0, 1], the model has no `TargetFraction`, or one has not seen a score yet.
        """
        controllers = [module for module in self.modules() if isinstance(module, TargetFraction)]
        if not controllers:
            raise wrong("fraction", "a model with a TargetFraction to set", "one without")
        for controller in controllers:
            controller.set_fraction(fraction)


class HAMModel(HAMPreTrainedModel):
    """Embedding, blocks and a norm."""

    def __init__(
        self, config: HAMConfig, *, layer: Callable[[int], HAMLayer] | None = None
    ) -> None:
        """Makes the model.

        Args:
            config: sizes and policies.
            layer: makes the layers instead of the policies: called with 0 ... num_hidden_layers - 1, returns a new
                layer each time. Their weights stay as they were made.

        Raises:
            ValueError: a bad size, or a configuration whose layers came from `layer` and none is given.
        """
        config = _checked(config, layer)
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        make_layer = layer or functools.partial(layer_of, config)
        layers = [make_layer(index) for index in range(config.num_hidden_layers)]
        if layer is not None:
            _keep_weights(layers)
        self.stack = Stack(
            (HAMDecoderLayer(own, config) for own in layers), norm_eps=config.rms_norm_eps
        )
        if self.stack.hidden_size != config.hidden_size:
            raise wrong(
                "layer",
                f"layers of hidden_size = {config.hidden_size}",
                f"of {self.stack.hidden_size}",
            )
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HAMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> HAMModelOutput:
        """Runs a batch, or its next columns.

        Args:
            input_ids: int `[B, T]`.
            attention_mask: `[B, past + T]`, 1 for tokens, 0 for padding on either side of them. None: no padding.
            position_ids: int `[B, T]`, of each token within its sequence; it need not be given. Without a mask and a
                cache, every 0 begins a sequence of a packed batch.
            past_key_values: a cache to go on from, which is moved along.
            inputs_embeds: `[B, T, hidden]`, instead of input_ids.
            use_cache: return the cache. None: as the configuration says, but not in training, nor for packed batches.
            output_hidden_states: return what went into each block, and the last hidden state.
            output_attentions: there are none to return.
            cu_seq_lens_q: `[N+1]`, borders of sequences packed into one row.
            kwargs: others that transformers passes, which are not needed here.

        Raises:
            ValueError: a bad argument; the message names it, what was expected and what came. The cache is as it was.
        """
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise wrong(
                "output_attentions",
                "False (attention over stored tokens has no matrix of weights)",
                "True",
            )
        x = self._embedded(input_ids, inputs_embeds)
        cache = _checked_cache(past_key_values, self.config, x.shape[0])
        layout = batch_layout(
            x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seqlens=cu_seq_lens_q,
            past=0 if cache is None else cache.columns,
            seen=None if cache is None else cache.seen,
        )
        if use_cache is None:
            use_cache = (
                bool(self.config.use_cache) and not self.training and layout.sequences == x.shape[0]
            )
        if use_cache and self.training and self.is_checkpointing:
            logger.warning_once(
                "`use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`."
            )
            use_cache = False
        if cache is not None and self.training and self.is_checkpointing:
            raise wrong("past_key_values", "None under gradient checkpointing", "a cache")
        if cache is None and use_cache:
            cache = HAMCache(self.config)
        if cache is not None and layout.sequences != x.shape[0]:
            raise wrong("use_cache", "False for a packed batch", "True")
        keep = (
            self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states
        )
        with contextlib.nullcontext() if cache is None else cache.unchanged_on_error():
            states = None if cache is None else cache.states or self._first(cache, x.shape[0])
            result = self.stack(
                layout.pack(x), state=states, cu_seqlens=layout.cu_seqlens, keep_inputs=bool(keep)
            )
            if cache is not None:
                cache.advance(self.config, result.state, x.shape[1])
        y = layout.unpack(result.y)
        return HAMModelOutput(
            last_hidden_state=y,
            past_key_values=cache if use_cache else None,
            hidden_states=(*(layout.unpack(x) for x in result.inputs), y) if keep else None,
            stats=tuple(result.stats),
        )

    def _first(self, cache: HAMCache, sequences: int) -> list[HAMState]:
        """The states before the first token."""
        return self.stack.init_state(
            sequences, page_size=cache.page_size, max_pages=cache.max_pages
        )

    @property
    def is_checkpointing(self) -> bool:
        """Whether some block's activations are checkpointed."""
        return any(getattr(block, "gradient_checkpointing", False) for block in self.stack.blocks)

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise wrong(
                "input_ids",
                "either input_ids or inputs_embeds",
                "both" if input_ids is not None else "neither",
            )
        if inputs_embeds is not None:
            check_tensor(
                "inputs_embeds",
                inputs_embeds,
                "[B, T, hidden]",
                [None, None, self.config.hidden_size],
            )
            return inputs_embeds
        check_tensor("input_ids", input_ids, "[B, T]", [None, None])
        assert input_ids is not None
        check_integer("input_ids", input_ids)
        check_range("input_ids", input_ids, 0, self.embed_tokens.num_embeddings - 1)
        x: Tensor = self.embed_tokens(input_ids)
        return x


class HAMForCausalLM(HAMPreTrainedModel, GenerationMixin):
    """A `HAMModel` and a head over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers' own form

    def __init__(
        self, config: HAMConfig, *, layer: Callable[[int], HAMLayer] | None = None
    ) -> None:
        """Makes the model; see `HAMModel`."""
        config = _checked(config, layer)
        super().__init__(config)
        self.model = HAMModel(config, layer=layer)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HAMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> HAMCausalLMOutput:
        """Next-token logits, and their loss.

        Args:
            input_ids: as the other arguments not named here, see `HAMModel.forward`.
            attention_mask: see there.
            position_ids: see there.
            past_key_values: see there.
            inputs_embeds: see there.
            labels: int `[B, T]`, the tokens themselves: the loss shifts them. -100, padding, and the first token of
                every sequence are no target.
            use_cache: see there.
            output_hidden_states: see there.
            output_attentions: see there.
            cu_seq_lens_q: see there.
            logits_to_keep: logits of so many last columns only, or of these columns; 0: of all.
            kwargs: `num_items_in_batch`, to divide the loss by; others are not needed here.

        Raises:
            ValueError: a bad argument; the message names it, what was expected and what came. The cache is as it was.
        """
        cache = past_key_values if isinstance(past_key_values, HAMCache) else None
        past, seen = (0, None) if cache is None else (cache.columns, cache.seen)
        with contextlib.nullcontext() if cache is None else cache.unchanged_on_error():
            outputs: HAMModelOutput = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                cu_seq_lens_q=cu_seq_lens_q,
                return_dict=True,
            )
            hidden = outputs.last_hidden_state
            assert hidden is not None
            loss = None
            kept = (
                slice(-logits_to_keep, None)
                if isinstance(logits_to_keep, int) and logits_to_keep
                else logits_to_keep
            )
            logits = self.lm_head(hidden if isinstance(kept, int) else hidden[:, kept])
            if labels is not None:
                check_tensor("labels", labels, "[B, T]", list(hidden.shape[:2]), like=hidden)
                if not isinstance(kept, int):
                    raise wrong("logits_to_keep", "0 beside labels", f"{logits_to_keep}")
                layout = batch_layout(
                    hidden,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    cu_seqlens=cu_seq_lens_q,
                    past=past,
                    seen=seen,
                )
                loss = self.loss_function(
                    logits=logits,
                    labels=labels,
                    vocab_size=self.config.vocab_size,
                    shift_labels=layout.targets(labels).contiguous(),
                    num_items_in_batch=kwargs.get("num_items_in_batch"),
                )
        return HAMCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            stats=outputs.stats,
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """A HAMCache where generate() would make a cache of transformers' own."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise wrong(
                "cache_implementation", "None", repr(generation_config.cache_implementation)
            )
        given = generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        result: bool = super()._prepare_cache_for_generation(*given)  # type: ignore[misc]
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HAMCache(self.config)
        return result


def _keep_weights(layers: list[HAMLayer]) -> None:
    """Has transformers leave weights as they were made; those without memory behind them are still to come."""
    for layer in layers:
        for module in layer.modules():
            if not any(weight.is_meta for weight in (*module.parameters(), *module.buffers())):
                module._is_hf_initialized = True  # type: ignore[assignment]


def _repeated(model: nn.Module) -> set[str]:
    """Names in the state dict of modules that stand in several places, but for the first."""
    first: dict[int, str] = {}
    places = [(name, module) for name, module in model.named_modules(remove_duplicate=False)]
    again = [
        (name, module) for name, module in places if first.setdefault(id(module), name) != name
    ]
    return {f"{name}.{key}" for name, module in again for key in module.state_dict()}


def _is_loaded(weight: Tensor) -> bool:
    """Whether transformers took it from a checkpoint."""
    return bool(getattr(weight, "_is_hf_initialized", False))


def _checked(config: HAMConfig, layer: Callable[[int], HAMLayer] | None) -> HAMConfig:
    """The configuration, marked where the layers are a user's own."""
    if layer is None and config.own_layers:
        raise wrong(
            "layer", "the function that made the layers of this model (own_layers = True)", "None"
        )
    if layer is None or config.own_layers:
        return config
    config = copy.copy(config)
    config.own_layers = True
    return config


def _checked_cache(cache: Any, config: HAMConfig, batch: int) -> HAMCache | None:
    """The cache, if it fits model and batch."""
    if cache is None:
        return None
    if not isinstance(cache, HAMCache):
        raise wrong("past_key_values", "a HAMCache", type(cache).__name__)
    cache.check(config, batch)
    return cache


AutoConfig.register("ham", HAMConfig)
AutoModel.register(HAMConfig, HAMModel)
AutoModelForCausalLM.register(HAMConfig, HAMForCausalLM)
