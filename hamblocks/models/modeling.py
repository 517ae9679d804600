"""HAM models for transformers.

Importing this file registers the models with `AutoModel` and `AutoModelForCausalLM`.
Shape letters are explained in docs/reference/shapes.md.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers import initialization as init
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from hamblocks.block import HAMBlock
from hamblocks.combiners import ConstantStart
from hamblocks.controllers import FixedThreshold, SampledThreshold
from hamblocks.convolution import ShortConvolution
from hamblocks.experts import Experts, SparseMLP
from hamblocks.gates.prediction_entropy import UntrainedHead
from hamblocks.layer import HAMLayer
from hamblocks.memory import GatedDeltaMemory
from hamblocks.models.batches import (
    IGNORE,
    BatchLayout,
    batch_layout,
    check_beside_shard,
    check_kept,
    last_columns,
)
from hamblocks.models.cache import CACHE, HAMCache, checked_cache, either_cache
from hamblocks.models.configuration import EXPERTS, LAYER_TYPES, HAMConfig
from hamblocks.models.framework import list_as_causal_lm
from hamblocks.models.policies import part_of
from hamblocks.models.saving import FollowsModel
from hamblocks.models.tensor_parallel import HEAD
from hamblocks.models.weights import is_loaded, keep_weights, lacks, repeated
from hamblocks.outputs import LayerStats
from hamblocks.parallel.shard import ContextShard
from hamblocks.stack import Stack, StackOutput, entropy_gates
from hamblocks.state import HAMState
from hamblocks_ops.arguments import check_integer, check_range, check_tensor, wrong

logger = logging.get_logger(__name__)


@dataclass
class HAMModelOutput(BaseModelOutputWithPast):
    """Result of a `HAMModel`.

    Attributes:
        stats: what each layer decided. For a padded batch, the stats describe its real tokens,
            packed into one batch row.
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
    """A `HAMBlock` that supports transformers' activation checkpointing."""

    def __init__(self, layer: HAMLayer, config: HAMConfig, index: int) -> None:
        """Makes block number `index` of the model that a configuration describes."""
        super().__init__()
        self.block = HAMBlock(
            layer,
            intermediate_size=config.intermediate_size,
            norm_eps=config.rms_norm_eps,
            mlp_bias=config.mlp_bias,
            mlp=experts_of(config, index),
        )

    @property
    def layer(self) -> HAMLayer:
        """The sequence mixer."""
        return self.block.layer

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        """See `HAMBlock.forward`."""
        return self.block(x, **kwargs)


def experts_of(config: HAMConfig, index: int) -> SparseMLP | None:
    """The mixture of experts of layer number `index`; None: its MLP is dense."""
    if (config.mlp_layer_types or [])[index] == "dense":
        return None
    names = (*EXPERTS, "shared_expert_intermediate_size", "norm_topk_prob")
    return SparseMLP(config.hidden_size, **{name: getattr(config, name) for name in names})


def layer_of(config: HAMConfig, index: int) -> HAMLayer:
    """Makes layer number `index` of the model that a configuration describes."""
    parts: dict[str, Any] = dict.fromkeys(("memory", "gate", "selector", "attention"))
    for name in LAYER_TYPES[(config.layer_types or [])[index]]:
        policy = config.policy(name, index)
        if policy is not None:
            parts[name] = part_of(name, policy)
    return HAMLayer(
        config.hidden_size,
        config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        qkv_bias=config.qkv_bias,
        **parts,
    )


class HAMPreTrainedModel(FollowsModel):
    """Initial weights, loading of weights, and thresholds: what both models share."""

    config_class = HAMConfig
    config: HAMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HAMDecoderLayer"]  # noqa: RUF012 - transformers' own form
    _skip_keys_device_placement = ["past_key_values", "cache", "state"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]  # noqa: RUF012
    # transformers refuses assisted generation for stateful models; a `HAMCache` records what it
    # needs to drop rejected candidate tokens
    _is_stateful = False

    def post_init(self) -> None:
        """Finishes the construction, as every transformers model does.

        A module with several names, such as a controller that several layers share, is saved under
        its first name only. The heads of `PredictionEntropy` gates are tied to that of the model,
        and are not saved.
        """
        source = self._output_weight()
        if source is not None:
            for gate in entropy_gates(self).values():
                gate.tie(self.get_parameter(source))
        self._keys_to_ignore_on_save = repeated(self) | self._tied_heads().keys()
        super().post_init()  # type: ignore[no-untyped-call]

    def _output_weight(self) -> str | None:
        """The name of the weight that predicts tokens; None: the model has none."""
        raise NotImplementedError

    def _tie_gates(self) -> None:
        """Ties the heads of gates to a weight that was replaced, perhaps by one of another size."""
        source = self._output_weight()
        if source is None:
            return
        weight = self.get_parameter(source)
        for gate in entropy_gates(self).values():
            gate.vocab_size = weight.shape[0]
            gate.tie(weight)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; the gates that predict tokens follow, in the configuration too."""
        resized: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        self._tie_gates()
        self.config.follow_vocabulary()
        return resized

    def _tied_heads(self) -> dict[str, str]:
        """Names of the heads of gates, and of the weight that each is tied to."""
        source = self._output_weight()
        heads = () if source is None else entropy_gates(self)
        return {f"{name}.head.weight": str(source) for name in heads}

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Tied weights by name, as in transformers, and the heads of gates."""
        keys: dict[str, str] = super().get_expanded_tied_weights_keys(all_submodels)
        return keys | self._tied_heads()

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """Marks tied weights, and removes repeated names of shared modules from the missing keys.

        A shared module is saved under its first name only. transformers 5.6 reports its other names
        as missing, although the weights were loaded.
        """
        super().mark_tied_weights_as_initialized(loading_info)  # type: ignore[no-untyped-call]
        # heads of gates stay missing until transformers ties them
        again = (set(self._keys_to_ignore_on_save or ()) - self._tied_heads().keys()) & set(
            loading_info.missing_keys
        )
        loading_info.missing_keys -= {
            name for name in again if is_loaded(self.get_parameter_or_buffer(name))
        }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, UntrainedHead):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, Experts):
            for weight in (module.up_proj, module.down_proj):
                init.normal_(weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, ShortConvolution):
            init.copy_(module.weight, module.fresh())
        elif isinstance(module, GatedDeltaMemory):
            for weight, initial in zip(
                (module.A_log, module.dt_bias), module.initial_decay(len(module.A_log)), strict=True
            ):
                init.copy_(weight, initial)
        elif isinstance(module, ConstantStart):
            init.zeros_(module.weight)
            init.copy_(module.bias, module.fresh_bias())
        elif isinstance(module, (FixedThreshold, SampledThreshold)) and lacks(self, module.tau_sum):
            module.reset()

    def set_keep_fraction(self, fraction: float) -> None:
        """Moves the threshold of every controller with a sample, as `TargetFraction` has.

        A smaller fraction makes decoding cheaper and loses quality. The target fractions of
        training, and so the configuration, stay as they are.

        Args:
            fraction: the fraction of tokens to keep, in [0, 1].

        Raises:
            ValueError: `fraction` is outside [0, 1], the model has no `TargetFraction` or other
                controller with a sample, or its buffers are offloaded.
        """
        controllers = [module for module in self.modules() if isinstance(module, SampledThreshold)]
        if not controllers:
            raise wrong("fraction", "a model with a TargetFraction to set", "one without")
        if any(controller.tau_sum.is_meta for controller in controllers):
            expected = "a model with its buffers in memory (offload_buffers=False)"
            raise wrong("fraction", expected, "offloaded ones")
        for controller in controllers:
            controller.set_fraction(fraction)


class HAMModel(HAMPreTrainedModel):
    """Embedding, blocks and a final norm, without a head."""

    def __init__(
        self, config: HAMConfig, *, layer: Callable[[int], HAMLayer] | None = None
    ) -> None:
        """Makes the model.

        Args:
            config: sizes and policies.
            layer: makes the layers in place of the policies of `config`. It is called with 0 to
                num_hidden_layers - 1 and returns a new layer each time. Weights of these layers
                keep the values that they were made with.

        Raises:
            ValueError: a size is wrong, or `config` is of a model whose layers came from `layer`
                and `layer` is None.
        """
        config = _checked(config, layer)
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        make_layer = layer or functools.partial(layer_of, config)
        layers = [make_layer(index) for index in range(config.num_hidden_layers)]
        if layer is not None:
            keep_weights(layers)
        self.stack = Stack(
            (HAMDecoderLayer(own, config, index) for index, own in enumerate(layers)),
            norm_eps=config.rms_norm_eps,
        )
        if self.stack.hidden_size != config.hidden_size:
            raise wrong(
                "layer",
                f"layers of hidden_size = {config.hidden_size}",
                f"layers of hidden_size = {self.stack.hidden_size}",
            )
        self.gradient_checkpointing = False
        self.post_init()

    def _output_weight(self) -> str | None:
        return "embed_tokens.weight" if self.config.tie_word_embeddings else None

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
        shard: ContextShard | None = None,
        cache: HAMCache | None = None,
        **kwargs: Any,
    ) -> HAMModelOutput:
        """Runs a batch, or the next columns of a batch.

        Args:
            input_ids: int `[B, T]`.
            attention_mask: `[B, past + T]`, 1 for tokens and 0 for padding. Padding stands before
                or after the tokens of a batch row, or both. None: there is no padding.
            position_ids: optional int `[B, T]`, position of each token within its sequence. Without
                a mask and a cache, every 0 begins a sequence of a packed batch.
            past_key_values: the cache of the columns seen so far; the call advances it in place.
            inputs_embeds: `[B, T, hidden]`, in place of `input_ids`.
            use_cache: return the cache. None: as `config` says, except in training, for packed
                batches and on the meta device, where no cache is returned.
            output_hidden_states: return the input of each block and the last hidden state.
            output_attentions: must be False; there is no matrix of attention weights.
            cu_seq_lens_q: int `[N+1]`, borders of sequences packed into one batch row.
            shard: context parallel: the batch holds the tokens of this rank (`shard.take`), and
                every rank of the shard's group calls the model. The shard says where sequences end,
                so there is no mask, no position, no border and no cache beside it.
            cache: the name of `past_key_values` from transformers 5.24 on; either is taken.
            kwargs: `logits_to_keep` says of how many columns the caller makes logits, for a cache
                that records: no other column can be rejected. Further arguments of transformers
                are ignored.

        Raises:
            ValueError: an argument is wrong. The message names it, what was expected and what came.
                The cache is unchanged after an error.
        """
        self._check_output_attentions(output_attentions)
        x = self._embedded(input_ids, inputs_embeds)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        cache = either_cache(past_key_values, cache)
        if shard is not None:
            given: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
            given |= {"past_key_values": cache, "cu_seq_lens_q": cu_seq_lens_q}
            check_beside_shard(x, shard, use_cache=use_cache or None, **given)
            return self._of_slices(x, shard, output_hidden_states)
        cache = checked_cache(cache, self.config, x.shape[0])
        layout = batch_layout(
            x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seqlens=cu_seq_lens_q,
            past=0 if cache is None else cache.columns,
            seen=None if cache is None else cache.seen,
        )
        if use_cache is None and cache is None and x.is_meta:
            use_cache = False
        use_cache = self._returns_cache(use_cache, cache, layout)
        if cache is None and use_cache:
            cache = HAMCache(self.config)
        kept = check_kept(kwargs.get("logits_to_keep", 0))
        # a tensor lists columns: any of them may be rejected
        kept = x.shape[1] if isinstance(kept, Tensor) else kept or x.shape[1]
        result = self._run(x, layout, cache, kept, keep_inputs=output_hidden_states)
        y = layout.unpack(result.y)
        inputs = (*(layout.unpack(x) for x in result.inputs), y)
        named: dict[str, Any] = {CACHE: cache if use_cache else None}
        return HAMModelOutput(
            last_hidden_state=y,
            hidden_states=inputs if output_hidden_states else None,
            stats=tuple(result.stats),
            **named,
        )

    def _of_slices(self, x: Tensor, shard: ContextShard, keep_inputs: bool) -> HAMModelOutput:
        """The result for the tokens of one rank."""
        result: StackOutput = self.stack(x, shard=shard, keep_inputs=keep_inputs)
        return HAMModelOutput(
            last_hidden_state=result.y,
            hidden_states=(*result.inputs, result.y) if keep_inputs else None,
            stats=tuple(result.stats),
        )

    def _run(
        self,
        x: Tensor,
        layout: BatchLayout,
        cache: HAMCache | None,
        kept: int,
        *,
        keep_inputs: bool,
    ) -> StackOutput:
        """Runs the blocks, and advances the cache if there is one; an error leaves it unchanged.

        While the cache records, the last `kept` columns can be taken back.
        """
        with contextlib.nullcontext() if cache is None else cache.unchanged_on_error():
            states = None
            if cache is not None:
                states = cache.states or self._first(cache, x.shape[0])
                states = cache.with_room(states, min(kept, x.shape[1]))
            result: StackOutput = self.stack(
                layout.pack(x), state=states, cu_seqlens=layout.cu_seqlens, keep_inputs=keep_inputs
            )
            if cache is not None:
                assert result.state is not None  # the stack returns states where it is given some
                cache.advance(self.config, result.state, layout)
        return result

    def _check_output_attentions(self, output_attentions: bool | None) -> None:
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions:
            expected = "False (attention over stored tokens has no matrix of weights)"
            raise wrong("output_attentions", expected, "True")

    def _returns_cache(
        self, use_cache: bool | None, cache: HAMCache | None, layout: BatchLayout
    ) -> bool:
        """Whether a call returns its cache.

        Raises:
            ValueError: a cache is given under gradient checkpointing, which would run the blocks
                twice, or a cache is given or wanted for a packed batch.
        """
        packed = layout.sequences != layout.batch
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training and not packed
        if self.training and self.is_checkpointing:
            if use_cache:
                logger.warning_once(
                    "`use_cache=True` is incompatible with gradient checkpointing. "
                    "Setting `use_cache=False`."
                )
                use_cache = False
            if cache is not None:
                expected = "None under gradient checkpointing (generate in eval mode)"
                raise wrong("past_key_values", expected, "a cache")
        if packed and (use_cache or cache is not None):
            raise wrong("use_cache", "False for a packed batch", "True")
        return use_cache

    def _first(self, cache: HAMCache, sequences: int) -> list[HAMState]:
        """The states before the first token, with the page sizes of the cache."""
        return self.stack.init_state(
            sequences, page_size=cache.page_size, max_pages=cache.max_pages
        )

    @property
    def is_checkpointing(self) -> bool:
        """Whether the activations of any block are checkpointed."""
        return any(getattr(block, "gradient_checkpointing", False) for block in self.stack.blocks)

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The embeddings `[B, T, hidden]`, after a check of the one argument that is given."""
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
        # the module may be a wrapper of another library, which has no such attribute
        tokens = getattr(self.embed_tokens, "num_embeddings", self.config.vocab_size)
        check_range("input_ids", input_ids, 0, tokens - 1)
        x: Tensor = self.embed_tokens(input_ids)
        return x


class HAMForCausalLM(HAMPreTrainedModel, GenerationMixin):
    """A `HAMModel` and a linear head over the vocabulary.

    The heads of `PredictionEntropy` gates are tied to it.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = HEAD if HAMConfig.base_model_tp_plan else None

    def __init__(
        self, config: HAMConfig, *, layer: Callable[[int], HAMLayer] | None = None
    ) -> None:
        """Makes the model; see `HAMModel`."""
        config = _checked(config, layer)
        super().__init__(config)
        # transformers derives it from the name of the class, which a subclass may change
        self.loss_type = "ForCausalLM"
        self.model = HAMModel(config, layer=layer)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Lists subclasses as models that predict the next token, those of FSDP2 too."""
        super().__init_subclass__(**kwargs)  # type: ignore[no-untyped-call]
        list_as_causal_lm(cls)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """As in transformers; the heads of gates are tied to the new head."""
        super().set_output_embeddings(new_embeddings)  # type: ignore[no-untyped-call]
        self._tie_gates()

    def _output_weight(self) -> str | None:
        return "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"

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
        shard: ContextShard | None = None,
        cache: HAMCache | None = None,
        **kwargs: Any,
    ) -> HAMCausalLMOutput:
        """Returns next-token logits, and their loss where `labels` are given.

        Args:
            input_ids: see `HAMModel.forward`.
            attention_mask: see `HAMModel.forward`.
            position_ids: see `HAMModel.forward`.
            past_key_values: see `HAMModel.forward`.
            inputs_embeds: see `HAMModel.forward`.
            labels: int `[B, T]`, the tokens themselves; the loss shifts them. Labels of -100,
                padding, and the first token of every sequence do not count.
            use_cache: see `HAMModel.forward`.
            output_hidden_states: see `HAMModel.forward`.
            output_attentions: see `HAMModel.forward`.
            cu_seq_lens_q: see `HAMModel.forward`.
            logits_to_keep: return the logits of the last `logits_to_keep` columns, or of these
                columns if it is a tensor. 0 returns all.
            shard: see `HAMModel.forward`. Labels are `shard.take(labels)`, unshifted as without it:
                the loss gets the labels of tokens that other ranks hold. It is the share of this
                rank, the sum over its tokens over the number of labels on all ranks, so the shares
                of all ranks add up to the loss of one process.
            cache: see `HAMModel.forward`.
            kwargs: `num_items_in_batch` divides the loss; other arguments are ignored.

        Raises:
            ValueError: an argument is wrong. The message names it, what was expected and what came.
                The cache is unchanged after an error.
        """
        logits_to_keep = check_kept(logits_to_keep)
        cache = either_cache(past_key_values, cache)
        known = cache if isinstance(cache, HAMCache) else None  # the model refuses another
        # the model advances the cache, so where it stands now is kept for the labels
        past, seen = (0, None) if known is None else (known.columns, known.seen)
        # an error in the head or in the loss must undo what the model did to the cache
        with contextlib.nullcontext() if known is None else known.unchanged_on_error():
            outputs: HAMModelOutput = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                cu_seq_lens_q=cu_seq_lens_q,
                logits_to_keep=logits_to_keep,
                return_dict=True,
                **({} if shard is None else {"shard": shard}),
            )
            hidden = outputs.last_hidden_state
            assert hidden is not None
            logits = self.lm_head(last_columns(hidden, logits_to_keep))
            loss = None
            if labels is not None:
                check_tensor("labels", labels, "[B, T]", list(hidden.shape[:2]), like=hidden)
                if not isinstance(logits_to_keep, int) or logits_to_keep:
                    raise wrong("logits_to_keep", "0 beside labels", f"{logits_to_keep}")
                if shard is None:
                    layout = batch_layout(
                        hidden,
                        attention_mask=attention_mask,
                        position_ids=position_ids,
                        cu_seqlens=cu_seq_lens_q,
                        past=past,
                        seen=seen,
                    )
                    targets = layout.targets(labels).contiguous().long()
                else:
                    targets = shard.next_of(labels.long(), IGNORE)
                count = kwargs.get("num_items_in_batch")
                if count is None:
                    count = (targets != IGNORE).sum()
                    if shard is not None:
                        torch.distributed.all_reduce(count, group=shard.group)
                loss = self.loss_function(
                    logits=logits,
                    labels=labels,
                    vocab_size=self.config.vocab_size,
                    shift_labels=targets,
                    # a mean over no label would be NaN
                    num_items_in_batch=count + (count == 0),
                )
        return HAMCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            stats=outputs.stats,
            **{CACHE: getattr(outputs, CACHE)},
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
        """Makes a HAMCache where generate() would make one of transformers' own caches."""
        # "dynamic_full" is what earlier releases set for assisted generation
        if generation_config.cache_implementation not in (None, "dynamic", "dynamic_full"):
            raise wrong(
                "cache_implementation", "None", repr(generation_config.cache_implementation)
            )
        given = generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        result: bool = super()._prepare_cache_for_generation(*given)  # type: ignore[misc]
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = HAMCache(self.config)
        cache = model_kwargs.get(CACHE)
        # candidate tokens can be rejected, in the model that checks them and in its assistant
        rejects = generation_mode == GenerationMode.ASSISTED_GENERATION
        if isinstance(cache, HAMCache) and (rejects or generation_config.is_assistant):
            cache.is_recording = True
        return result

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the cache that the caller gets records no longer."""
        try:
            return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]
        finally:
            cache = kwargs.get(CACHE)
            if isinstance(cache, HAMCache):
                cache.stop_recording()


def _checked(config: HAMConfig, layer: Callable[[int], HAMLayer] | None) -> HAMConfig:
    """Returns the configuration, with `own_layers` set where `layer` makes the layers.

    Raises:
        ValueError: `config` is of a model with a user's own layers, and `layer` is None.
    """
    if layer is None and config.own_layers:
        raise wrong(
            "layer", "the function that made the layers of this model (own_layers = True)", "None"
        )
    if layer is None or config.own_layers:
        return config
    config = copy.copy(config)
    config.own_layers = True
    return config


AutoModel.register(HAMConfig, HAMModel)
AutoModelForCausalLM.register(HAMConfig, HAMForCausalLM)
list_as_causal_lm(HAMForCausalLM)
