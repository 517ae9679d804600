"""The tables and switches by which transformers treats a class of models.

Each has an entry here, or a refusal that says what to use instead. The Auto classes know the
configuration from `configuration.py`, and the models from `modeling.py`.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hamblocks_ops.arguments import wrong


def list_as_causal_lm(model: type[PreTrainedModel]) -> None:
    """Adds a class to the names of the models that predict the next token.

    The Trainer's label smoothing looks a class up in this table by its name, and trains a class
    that it misses on the same token instead of the next. `AutoModelForCausalLM.register` adds to
    another table. The key is the model type for the first class, and then unique: nothing else
    reads it.
    """
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if model.__name__ in names.values():
        return
    kind = getattr(model.config_class, "model_type", "")
    names[kind if kind and kind not in names else f"{kind}:{model.__name__}"] = model.__name__


class FrameworkModel(PreTrainedModel):
    """What HAM models tell transformers, and what they refuse.

    Flags that are not set here have transformers' default, which is off: none of `_supports_sdpa`,
    `_supports_flash_attn`, `_supports_flex_attn` and `_supports_attention_backend`, because the
    policy of attention chooses the implementation; not `_can_compile_fullgraph`, because the cache
    grows.
    """

    # it would drop the memory's state and the visibility of tokens at the borders of the ranks
    _supports_context_parallel = False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, without tensor, pipeline and expert parallelism.

        Raises:
            ValueError: one of them is asked for. Without a plan transformers would load all weights
                on all ranks, and a plan would shard projections that the layer takes for whole.
        """
        for name in ("tp_plan", "tp_size", "distributed_config"):
            if _is_parallel(kwargs.get(name)):
                expected = "no parallelism within layers or between them (shard with FSDP instead)"
                raise wrong(name, expected, repr(kwargs[name]))
        return super().from_pretrained(*args, **kwargs)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """transformers calls this when a model is made, and by `set_attn_implementation`.

        Raises:
            ValueError: any implementation but "eager", which stands for the model's own, is named.
        """
        if attn_implementation in (None, "eager"):
            return "eager"
        expected = (
            '"eager" or None (the policy of attention names the implementation: '
            'attention={"type": "selected_attention", "impl": ...})'
        )
        raise wrong("attn_implementation", expected, repr(attn_implementation))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported. `generate_batch` and the context manager of transformers call it.

        Raises:
            ValueError: always: its paged cache holds keys and values alone, so it has no place for
                the state of a memory.
        """
        raise ValueError(
            f"{type(self).__name__}: expected generate() with padded prompts, got continuous "
            "batching, whose cache cannot hold the state of a memory"
        )


def _is_parallel(value: Any) -> bool:
    """Whether a plan, a number of ranks or a `DistributedConfig` asks for parallelism in a model."""
    if value is None or isinstance(value, int):
        return (value or 1) > 1
    if isinstance(value, (str, dict)):
        return bool(value)
    names = ("tp_size", "tp_plan", "pp_size", "ep_size", "ep_plan")
    return any(_is_parallel(getattr(value, name, None)) for name in names)
