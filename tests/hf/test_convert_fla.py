"""A converted Gated DeltaNet of flash-linear-attention computes what its weights say.

The kernels of fla compute in float32 at most, so the law in float64 compares with a plain loop over
tokens, and the loop with fla in Triton's interpreter.
"""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch
from hf_cases import PAD, VOCAB, padded, rows, text
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hamblocks as hb
from hamblocks.cli import app
from hamblocks.models import HAMForCausalLM, convert, convert_recorded

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 8,
    "norm_eps": 1e-3,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_v_heads": 6, "expand_v": 1.5, "allow_neg_eigval": True},
    "sigmoid gate": {"output_gate_activation": "sigmoid", "conv_size": 2, "expand_v": 1.0},
    "no gate": {"use_gate": False, "tie_word_embeddings": True},
    "no convolution": {"use_short_conv": False, "fuse_norm": False, "fuse_swiglu": False},
    "layers of attention": {
        "num_hidden_layers": 3,
        "attn": [
            {"layers": [1], "num_heads": 3, "num_kv_heads": 1, "qkv_bias": True, "rope_theta": 50},
            {"layers": [2], "num_heads": 3, "num_kv_heads": 1, "qkv_bias": True},
        ],
    },
}
EVERYTHING = hb.Threshold(-math.inf)


@pytest.fixture(autouse=True)
def attention_without_flash_attn(monkeypatch):
    """`fla.layers.Attention` asks for flash-attn, which needs a GPU, when it is made."""

    def causal(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        assert named == {"causal": True, "window_size": (-1, -1)}
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2)

    monkeypatch.setattr("fla.layers.attn.flash_attn_func", causal)


def source(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A model of fla in eval mode, with every weight moved."""
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ShortConvolution is crucial")
        made = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**{**SIZES, **CASES[name], **changes}))
    with torch.no_grad():
        for weight in made.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return made.to(dtype).eval()


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@torch.no_grad()
def by_loop(model: Any, ids: Tensor) -> Tensor:
    """Logits `[B, T, vocab]`, token by token from the weights, in their dtype."""
    config, weights = model.config, dict(model.named_parameters())
    weights.setdefault("lm_head.weight", weights["model.embeddings.weight"])
    x = weights["model.embeddings.weight"][ids]
    for layer in range(config.num_hidden_layers):
        own = {
            name.removeprefix(f"model.layers.{layer}."): weight
            for name, weight in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        y = normed(x, own["attn_norm.weight"], config.norm_eps)
        spec = next((spec for spec in config.attn or [] if layer in spec["layers"]), None)
        x = x + (attended(spec, own, y) if spec else mixed(config, own, y))
        y = normed(x, own["mlp_norm.weight"], config.norm_eps)
        gate, up = y @ own["mlp.gate_proj.weight"].T, y @ own["mlp.up_proj.weight"].T
        x = x + (F.silu(gate) * up) @ own["mlp.down_proj.weight"].T
    return normed(x, weights["model.norm.weight"], config.norm_eps) @ weights["lm_head.weight"].T


def attended(spec: dict[str, Any], own: dict[str, Tensor], x: Tensor) -> Tensor:
    """The output of a layer of softmax attention for its normed input x."""
    heads, groups = spec["num_heads"], spec["num_heads"] // spec["num_kv_heads"]
    q, k, v = (
        (x @ own[f"attn.{name}_proj.weight"].T + own[f"attn.{name}_proj.bias"]).unflatten(
            2, (-1, x.shape[2] // heads)
        )
        for name in "qkv"
    )
    half = q.shape[3] // 2
    rates = spec["rope_theta"] ** -(torch.arange(half, dtype=torch.float64) / half)
    turns = torch.polar(
        torch.ones(x.shape[1], half, dtype=torch.float64),
        torch.arange(x.shape[1])[:, None] * rates,
    )[:, None]
    q, k = (turns * torch.complex(*y.double().split(half, 3)) for y in (q, k))
    reads = torch.zeros(*x.shape[:2], heads, 2 * half, dtype=x.dtype)
    for t in range(x.shape[1]):
        for head in range(heads):
            keys, values = k[:, : t + 1, head // groups], v[:, : t + 1, head // groups]
            logits = (q[:, t, head, None].conj() * keys).real.sum(-1) / (2 * half) ** 0.5
            weights = logits.softmax(-1).to(x.dtype)
            reads[:, t, head] = (weights[..., None] * values).sum(1)
    return reads.flatten(2) @ own["attn.o_proj.weight"].T


def mixed(config: Any, own: dict[str, Tensor], x: Tensor) -> Tensor:
    """The output of a layer with a memory for its normed input x."""
    heads, key = config.num_heads, config.head_dim
    value_heads, value = config.num_v_heads or heads, int(key * config.expand_v)

    def projected(name: str) -> Tensor:
        return x @ own[f"attn.{name}.weight"].T

    def convolved(name: str) -> Tensor:
        y = projected(f"{name}_proj")
        if not config.use_short_conv:
            return F.silu(y)
        taps = own[f"attn.{name}_conv1d.weight"][:, 0]
        past = torch.cat([y.new_zeros(len(y), config.conv_size - 1, y.shape[2]), y], 1)
        windows = [past[:, tap : tap + y.shape[1]] * taps[:, tap] for tap in range(taps.shape[1])]
        return F.silu(torch.stack(windows).sum(0))

    q, k = (convolved(name).unflatten(2, (heads, key)) for name in "qk")
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    v = convolved("v").unflatten(2, (value_heads, value))
    beta = projected("b_proj").sigmoid() * (2 if config.allow_neg_eigval else 1)
    step = F.softplus(projected("a_proj") + own["attn.dt_bias"])
    decay = (-own["attn.A_log"].exp() * step).exp()
    state = x.new_zeros(len(x), value_heads, key, value)
    reads = torch.zeros_like(v)
    for t in range(x.shape[1]):
        for head in range(value_heads):
            shared = head // (value_heads // heads)
            old = state[:, head] * decay[:, t, head, None, None]
            error = v[:, t, head] - torch.einsum("bkv,bk->bv", old, k[:, t, shared])
            written = beta[:, t, head, None, None] * k[:, t, shared, :, None] * error[:, None]
            state[:, head] = old + written
            read = torch.einsum("bkv,bk->bv", state[:, head], q[:, t, shared])
            reads[:, t, head] = read * key**-0.5
    reads = normed(reads, own["attn.o_norm.weight"], config.norm_eps)
    if config.use_gate:
        gate = projected("g_proj").view(reads.shape)
        sigmoid = config.output_gate_activation == "sigmoid"
        reads = reads * (gate.sigmoid() if sigmoid else F.silu(gate))
    return reads.flatten(2) @ own["attn.o_proj.weight"].T


@torch.no_grad()
def run(model: HAMForCausalLM, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_a_loop_over_the_weights(name):
    old, ids = source(name), text(1, 2, 12)
    expected = by_loop(old, ids)
    for layers in (None, [1]):
        model = convert(old, selector=EVERYTHING, layers=layers)
        assert model.config.layer_types[0] == ("hybrid" if layers is None else "linear_attention")
        torch.testing.assert_close(run(model, ids), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grouped", "layers of attention"])
def test_logits_are_those_of_fla(name):
    old, ids = source(name, torch.float32), text(1, 2, 5)
    with torch.no_grad():
        expected = old(ids, logits_to_keep=None).logits
    torch.testing.assert_close(by_loop(old, ids), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        run(convert(old, selector=EVERYTHING), ids), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["plain", "layers of attention"])
def test_generate_continues_as_the_loop(name):
    old = source(name)
    model = convert(old, selector=EVERYTHING)
    prompts = rows(1, [3, 6, 1])
    ids, mask = padded(prompts)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    for row, prompt in enumerate(prompts):
        for _ in range(5):
            best = by_loop(old, prompt[None])[0, -1:].argmax(-1)
            prompt = torch.cat([prompt, best])
        assert torch.equal(out[row, ids.shape[1] - prompt.shape[0] + 5 :], prompt)


def test_a_saved_model_is_loaded_as_it_was(tmp_path):
    made = convert(source("grouped"), selector=hb.TopK(3) | hb.Window(2), layers=[1])
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.to_dict()["memory"] == made.config.to_dict()["memory"]
    ids = text(1, 2, 12)
    assert torch.equal(run(loaded, ids), run(made, ids))


def test_what_is_kept_and_what_is_new():
    old = source("plain")
    made = convert_recorded(old, selector=EVERYTHING)
    names = {name for name, _ in made.model.named_parameters()}
    assert names == made.copied.keys() | set(made.new)
    assert {name for names in made.copied.values() for name in names} == old.state_dict().keys()
    new = {name.split(".block.layer.")[1] for name in made.new}
    projections = {f"{name}_proj.weight" for name in "qkv"}
    norms = {f"attention.{name}.weight" for name in ("q_norm", "k_norm", "conv")}
    assert new == projections | norms | {"combiner.gate_proj.weight", "combiner.gate_proj.bias"}
    block = "model.stack.blocks.{}.block.layer.combiner.o_proj.weight"
    assert made.widened == {block.format(layer): 16 for layer in (0, 1)}


def test_attention_learns():
    model = convert(source("plain"), selector=EVERYTHING).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the first step moves the weight of attention's read from 0
        optimizer.zero_grad()
        model(text(1, 2, 12), labels=text(2, 2, 12)).loss.backward()
        optimizer.step()
    idle = [name for name, weight in model.named_parameters() if not weight.grad.any()]
    assert idle == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attnres_block_size": 2}, "config.attnres_block_size: expected None"),
        ({"use_l2warp": True}, "config.use_l2warp: expected False"),
        ({"hidden_act": "powlu"}, "config.hidden_act: expected silu"),
        ({"num_v_heads": 1}, "config.num_v_heads: expected a multiple of num_heads = 2"),
        ({"read_scale": 2.0}, "config.read_scale: expected no field that is unknown"),
    ],
)
def test_what_would_be_lost_is_named(changes, named):
    with pytest.raises(ValueError, match="^" + named):
        convert(source("plain", torch.float32, **changes), selector=EVERYTHING)


@pytest.mark.parametrize(
    ("attn", "named"),
    [
        ({"layers": [1], "num_heads": 3, "window_size": 4}, "window_size: expected None, got 4"),
        (
            [{"layers": [0], "num_heads": 3}, {"layers": [1], "num_heads": 2}],
            "num_heads: expected the same in all layers of attention, got [2, 3]",
        ),
        ({"layers": [0, 1, 2], "num_heads": 3}, "expected one or more layers without softmax"),
    ],
)
def test_attention_that_cannot_be_kept_is_named(attn, named):
    old = source("layers of attention", torch.float32, attn=attn)
    with pytest.raises(ValueError, match=r"^config\.attn: " + re.escape(named)):
        convert(old, selector=EVERYTHING)


def test_a_bias_and_a_foreign_module_are_named():
    old = source("plain", torch.float32)
    old.model.layers[0].attn.q_conv1d.bias = nn.Parameter(torch.zeros(16))
    with pytest.raises(ValueError, match=r"got model\.layers\.0\.attn\.q_conv1d\.bias"):
        convert(old, selector=EVERYTHING)

    class Adapter(nn.Linear):
        pass

    old = source("plain", torch.float32)
    old.model.layers[1].attn.a_proj = Adapter(24, 2, bias=False)
    with pytest.raises(ValueError, match=r"^model\.model\.layers\.1\.attn\.a_proj"):
        convert(old, selector=EVERYTHING)


def test_a_memory_for_a_layer_that_has_one_is_an_error():
    old = source("plain", torch.float32)
    with pytest.raises(ValueError, match=r"^memory: expected None: every layer has a memory"):
        convert(old, selector=EVERYTHING, memory=hb.DeltaMemory())
    with pytest.raises(ValueError, match=r"^memory: expected None for layer 1"):
        convert(old, selector=EVERYTHING, memory=[None, hb.DeltaMemory()])
    assert convert(old, selector=EVERYTHING, memory=[None, None]).config.memory["num_heads"] == 2


def test_the_command_converts_a_folder(tmp_path):
    old = source("no gate", torch.float32)
    old.save_pretrained(tmp_path / "old")
    arguments = [str(tmp_path / "old"), str(tmp_path / "new"), "--selector", "Threshold(-inf)"]
    result = CliRunner().invoke(app, ["convert", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "gated_deltanet: 2 hybrid layers" in result.output
    assert "16 new columns" in result.output
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    ids = text(1, 2, 12)
    torch.testing.assert_close(run(loaded, ids), by_loop(old, ids), rtol=1e-3, atol=1e-3)
