"""The tables and switches by which transformers treats a class of models.

Each has an entry here, or a refusal that says what to use instead. The Auto classes know the
configuration from `configuration.py`, and the models from `modeling.py`.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hamblocks.models.tensor_parallel import HAS_PLANS
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
        """As in transformers, without pipeline and expert parallelism.

        Tensor parallelism (`DistributedConfig(tp_size=...)`) shares the heads of every layer, by the
        plan of the model (see `hamblocks.parallelize.split_heads`).

        Raises:
            ValueError: other parallelism is asked for, a plan for parts of a layer, FSDP2 beside
                tensor parallelism, or this transformers cannot use the plan of the model.
        """
        for name in ("tp_plan", "tp_size", "distributed_config"):
            check_parallel(name, kwargs.get(name))
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


def check_parallel(name: str, value: Any) -> None:
    """Checks what is asked of `from_pretrained`: a plan, a number of ranks or a `DistributedConfig`.

    Raises:
        ValueError: it is not tensor parallelism by the plan of the model.
    """
    is_config = not (value is None or isinstance(value, (int, str, dict)))
    size, plan = (
        (getattr(value, "tp_size", None), getattr(value, "tp_plan", None))
        if is_config
        else (value, None)
        if isinstance(value, int)
        else (None, value)
    )
    other = ("pp_size", "ep_size", "ep_plan")
    if any((getattr(value, one, None) or 1) != 1 for one in other):
        expected = "no parallelism within layers or between them but tp_size"
        raise wrong(name, expected, repr(value))
    if (size or 1) == 1 and not plan:
        return
    if not HAS_PLANS:
        expected = "none in this release of transformers (use hamblocks.parallelize.split_heads)"
        raise wrong(name, expected, repr(value))
    inside = [rule for rule in plan if "stack." in rule] if isinstance(plan, dict) else []
    if inside:
        raise wrong(name, "no rule for parts of layers, which share heads as a whole", inside[0])
    if (getattr(value, "dp_size", None) or 1) > 1 and (size or 1) > 1:
        expected = "tp_size alone (beside FSDP2 use hamblocks.parallelize.parallelize)"
        raise wrong(name, expected, repr(value))
