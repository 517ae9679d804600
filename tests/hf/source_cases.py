"""Tiny models of transformers to convert, with random weights, and float64 for code that asks for
float32."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from hf_cases import PAD, VOCAB
from torch.overrides import TorchFunctionMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.models.qwen3_next import modeling_qwen3_next

# transformers takes fla's kernels where fla is installed; float64 needs the formulas in torch
for _module in (modeling_qwen3_next, modeling_qwen3_5, modeling_qwen3_5_moe):
    for _name in (
        "torch_chunk_gated_delta_rule",
        "torch_recurrent_gated_delta_rule",
        "causal_conv1d_fn",
        "causal_conv1d_update",
    ):
        setattr(_module, _name, inspect.unwrap(getattr(_module, _name)))

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _scaled(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **numbers}}


LENGTH = {"original_max_position_embeddings": 16}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LENGTH}
MSCALE = {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 4.0, "beta_slow": 0.5}


def _partly(share: float) -> dict[str, Any]:
    """Yarn on a share of the channels, which transformers 5.6 reads beside rope_parameters."""
    scaled = _scaled("yarn", factor=4.0, partial_rotary_factor=share, **LENGTH)
    return {**scaled, "partial_rotary_factor": share}


MEMORY = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 8,
}
ROUTED = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
EXPERTS = {**ROUTED, "shared_expert_intermediate_size": 20}
DENSE = {**EXPERTS, "num_experts": 0}

SOURCES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama biased tied": (
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama wide heads": (LlamaForCausalLM, LlamaConfig, {"head_dim": 12, "rms_norm_eps": 0.1}),
    "llama linear": (LlamaForCausalLM, LlamaConfig, _scaled("linear", factor=3.0)),
    "llama dynamic": (LlamaForCausalLM, LlamaConfig, _scaled("dynamic", factor=3.0)),
    "llama llama3": (LlamaForCausalLM, LlamaConfig, _scaled("llama3", **LLAMA3)),
    "llama yarn": (LlamaForCausalLM, LlamaConfig, _scaled("yarn", factor=4.0, **LENGTH)),
    "llama yarn mscale": (
        LlamaForCausalLM,
        LlamaConfig,
        _scaled("yarn", factor=4.0, truncate=False, **LENGTH, **MSCALE),
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 1}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {"no_rope_layer_interval": 2}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**ROUTED, "mlp_only_layers": [1], "head_dim": 16, "use_sliding_window": False},
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen3_next": (
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        {**MEMORY, **EXPERTS, "mlp_only_layers": [0], "rms_norm_eps": 1e-3},
    ),
    # one size for both reads, all channels turned, biases of attention, tied embeddings
    "qwen3_next dense": (
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        {
            **MEMORY,
            **DENSE,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 4,
            "attention_bias": True,
            "tie_word_embeddings": True,
            **_partly(1.0),
        },
    ),
    "qwen3_next yarn": (
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        {
            **MEMORY,
            **EXPERTS,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            **_partly(0.5),
        },
    ),
    "qwen3_5": (
        Qwen3_5ForCausalLM,
        Qwen3_5TextConfig,
        {
            **MEMORY,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.5,
                "mrope_interleaved": True,
                "mrope_section": [1, 1, 0],
            },
        },
    ),
    "qwen3_5 experts": (
        Qwen3_5MoeForCausalLM,
        Qwen3_5MoeTextConfig,
        {**MEMORY, **EXPERTS, "attention_bias": True},
    ),
}
"""Classes of models and of configurations, and what differs from `SIZES`."""


class InFloat64(TorchFunctionMode):
    """Code that asks for float32 gets float64.

    The norms, angles and softmax of transformers are in float32 whatever the dtype of the model. A
    comparison to nine digits needs the same formulas in float64.
    """

    def __enter__(self) -> Any:
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(torch.float32)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def wide(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        if func is torch.Tensor.float:
            func, args = torch.Tensor.to, (args[0], torch.float64)
        kwargs = {name: wide(x) for name, x in (kwargs or {}).items()}
        return func(*(wide(x) for x in args), **kwargs)


def source(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A model in eval mode; every weight is moved, because an initial value may hide a mistake."""
    model_class, config_class, given = SOURCES[name]
    torch.manual_seed(seed)
    how = {"attn_implementation": "eager", "experts_implementation": "eager"}
    config = config_class(**{**SIZES, **given, **changes}, **how)
    if dtype != torch.float64:
        return _moved(model_class(config).to(dtype))
    with InFloat64():
        return _moved(model_class(config))


@torch.no_grad()
def _moved(model: Any) -> Any:
    for weight in model.parameters():
        weight += 0.1 * torch.randn_like(weight)
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    """The logits of a model of transformers, in float64 where its weights are."""
    if model.dtype != torch.float64:
        return model(ids, **given).logits
    with InFloat64():
        return model(ids, **given).logits
