"""A policy over the attention of models of transformers: laws, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hf_cases import VOCAB
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import hamblocks as hb
from hamblocks.models import AttachedCache, KeyValueMemory, attach_policy, copying_by_head
from hamblocks.ops import gated_delta_rule

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
}


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def model():
    return model_of(CONFIGS["llama"]())


@pytest.fixture
def ids():
    return torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))


def nothing(layer, dims):
    return {}


POLICIES = {
    "error": lambda: {
        "gate": hb.PredictionError("l2"),
        "memory": KeyValueMemory(0.5, 0.01),
        "selector": hb.Threshold(0.5) | hb.Window(3) | hb.FirstTokens(1),
    },
    "key-norm": lambda: {
        "gate": hb.KeyNorm(),
        "selector": hb.HeadThresholds([-torch.inf, -1.0]) | hb.Window(2),
    },
    # norms of equal tokens are equal up to rounding, and ranks would hang on it: errors are not
    "top-k": lambda: {
        "gate": hb.SharedGate(hb.PredictionError("l2")),
        "memory": KeyValueMemory(),
        "selector": hb.TopK(4),
    },
    "value-norm": lambda: {
        "gate": hb.ValueNorm(),
        "selector": hb.HeadThresholds([3.0, 4.0]) | hb.Window(2),
    },
    "written": lambda: {
        "gate": hb.CommittedWrite(),
        "memory": KeyValueMemory(),
        "selector": hb.Threshold(0.3) & hb.TopK(5),
    },
}


def policy_of(name):
    return lambda layer, dims: POLICIES[name]()


def in_pieces(model, ids, cache, sizes=(7, 1, 1, 11)):
    return torch.cat([model(x, past_key_values=cache).logits for x in ids.split(sizes, 1)], 1)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_a_policy_that_stores_everything_changes_nothing(family, ids):
    model = model_of(CONFIGS[family]())
    expected, before = model(ids, use_cache=False).logits, model.config._attn_implementation
    with attach_policy(model, nothing) as policy:
        close(model(ids).logits, expected)
        close(in_pieces(model, ids, policy.cache()), expected)
    assert model.config._attn_implementation == before
    assert "forward" not in vars(model)
    assert torch.equal(model(ids, use_cache=False).logits, expected)


@torch.no_grad()
def test_window_and_sinks_are_a_mask(model, ids):
    query, key = torch.arange(20)[:, None], torch.arange(20)
    seen = (key <= query) & ((query - key < 4) | (key < 2))
    mask = torch.zeros(20, 20, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    expected = model(ids, attention_mask=mask.expand(2, 1, 20, 20), use_cache=False).logits
    with attach_policy(model, lambda *_: {"selector": hb.Window(4) | hb.FirstTokens(2)}) as policy:
        close(model(ids).logits, expected)
        cache = policy.cache(page_size=2)
        close(in_pieces(model, ids, cache), expected)
    # what no later query sees is gone: 2 sinks, and 3 of the window
    assert all(torch.equal(tokens, torch.full((2, 2), 5)) for tokens in cache.tokens)


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_pieces_are_one_pass_and_something_is_evicted(model, ids, name):
    everything = model(ids, use_cache=False).logits
    with attach_policy(model, policy_of(name)) as policy:
        expected = model(ids).logits
        assert all(0 < stats.keep_fraction() < 1 for stats in policy.stats)
        cache = policy.cache(page_size=4)
        close(in_pieces(model, ids, cache), expected)
        close(in_pieces(model, ids, policy.cache(), (20,)), expected)
        rows = [in_pieces(model, row[None], policy.cache()) for row in ids]
        close(torch.cat(rows), expected)
    assert (everything - expected).abs().max() > 1e-3
    assert cache.get_seq_length() == 20


@torch.no_grad()
def test_generation_is_that_of_full_passes(model, ids):
    with attach_policy(model, policy_of("error")) as policy:
        cache = policy.cache()
        given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        found = model.generate(
            ids, past_key_values=cache, max_new_tokens=5, do_sample=False, **given
        )
        rows = ids
        for _ in range(5):
            rows = torch.cat([rows, model(rows).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(found, rows)
        # beams: the cache follows the sequences that go on
        one = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False} | given
        beams = model.generate(ids, past_key_values=policy.cache(), **one)
        alone = [
            model.generate(
                row[None],
                past_key_values=policy.cache(),
                **one | {"attention_mask": row[None] * 0 + 1},
            )
            for row in ids
        ]
        assert torch.equal(beams, torch.cat(alone))


@torch.no_grad()
def test_forks_go_on_alone(model, ids):
    with attach_policy(model, policy_of("top-k")) as policy:
        cache = policy.cache(page_size=2)
        model(ids[:, :9], past_key_values=cache)
        fork = cache.fork()
        model(ids.flip(1), past_key_values=fork)
        after = model(ids[:, 9:], past_key_values=cache).logits
        close(after, model(ids).logits[:, 9:])
    assert isinstance(fork, AttachedCache)


@torch.no_grad()
def test_an_error_leaves_the_cache_as_it_was(model, ids):
    with attach_policy(model, policy_of("key-norm")) as policy:
        cache = policy.cache()
        first = model(ids[:, :9], past_key_values=cache).logits
        before = cache.tokens

        def fail(*args):
            raise RuntimeError("midway")

        hook = model.model.layers[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="midway"):
            model(ids[:, 9:], past_key_values=cache)
        hook.remove()
        assert all(map(torch.equal, before, cache.tokens))
        assert cache.get_seq_length() == 9
        rest = model(ids[:, 9:], past_key_values=cache).logits
        close(torch.cat([first, rest], 1), model(ids).logits)


@torch.no_grad()
def test_given_scores_reach_the_gates(model, ids):
    score = torch.zeros(2, 20, 1, dtype=torch.float64)
    score[:, 3:6] = 1
    parts = {"gate": hb.GivenScore(), "selector": hb.Threshold(0.5) | hb.Window(2)}
    with attach_policy(model, lambda *_: dict(parts)) as policy:
        with policy.given(score):
            model(ids)
        for stats in policy.stats:
            assert torch.equal((stats.evict_at > 100)[..., 0], score[..., 0] == 1)
        with pytest.raises(ValueError, match=r"^given_score: expected a score"):
            model(ids)


@torch.no_grad()
def test_what_would_change_the_result_is_refused(model, ids):
    with attach_policy(model, policy_of("top-k")) as policy:
        padded = torch.ones_like(ids)
        padded[0, 0] = 0
        with pytest.raises(ValueError, match=r"^attention_mask: expected no padding"):
            model(ids, attention_mask=padded)
        with pytest.raises(ValueError, match=r"^past_key_values: .* got DynamicCache"):
            model(ids, past_key_values=DynamicCache())
        with pytest.raises(ValueError, match=r"^position_ids: expected 0, 1, "):
            model(ids, position_ids=torch.arange(1, 21)[None])
        with pytest.raises(ValueError, match=r"^model: expected one without an attached policy"):
            attach_policy(model, nothing).__enter__()
        cache = policy.cache()
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"^input_ids: expected 2 sequences, .* got 1"):
            model(ids[:1], past_key_values=cache)
    with attach_policy(model, nothing), pytest.raises(ValueError, match=r"of another$"):
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"^memory: expected one without weights"):
        attach_policy(model, lambda *_: {"memory": torch.nn.Linear(1, 1)}).__enter__()
    sliding = model_of(MistralConfig(**SIZES, sliding_window=4))
    with attach_policy(sliding, nothing), pytest.raises(ValueError, match=r"^sliding_window: "):
        sliding(ids)
    capped = model_of(Gemma2Config(**SIZES, layer_types=["full_attention"] * 3))
    with attach_policy(capped, nothing), pytest.raises(ValueError, match=r"^softcap: "):
        capped(ids)


@torch.no_grad()
def test_the_memory_without_weights_is_a_delta_rule():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 5 + 12 + 12, dtype=torch.float64, generator=generator)
    memory = KeyValueMemory(0.25, 0.1)
    assert memory.read_size(hb.LayerDims(29, 4, 2, 6)) == (2, 6)
    memory.place(5)
    position = torch.arange(9, dtype=torch.int32).expand(2, 9)
    _, trace, state = memory(x, None, None, None, position=position)
    k, v = x[..., 5:17].unflatten(-1, (2, 6)), x[..., 17:].unflatten(-1, (2, 6))
    k = k / k.norm(dim=-1, keepdim=True)
    beta = torch.full((2, 9, 2), 0.25, dtype=torch.float64)
    given = {"beta": beta, "g": beta * 0 - 0.1, "output_residual": True, "impl": "reference"}
    expected = gated_delta_rule(k, k, v, **given)
    close(trace.residual, expected.residual)
    close(state.recurrent, expected.final_state)
    _, first, half = memory(x[:, :4], None, None, None, position=position[:, :4])
    _, second, after = memory(x[:, 4:], None, None, None, position=position[:, 4:], state=half)
    close(torch.cat([first.residual, second.residual], 1), trace.residual)
    close(after.recurrent, state.recurrent)
    for arguments in ({"beta": 0}, {"beta": 1.5}, {"decay": -1}, {"decay": torch.inf}):
        with pytest.raises(ValueError, match=rf"^{next(iter(arguments))}: expected a number"):
            KeyValueMemory(**arguments)
    with pytest.raises(ValueError, match=r"^memory: expected a layer of attach_policy"):
        hb.HAMLayer(24, 4, memory=KeyValueMemory(), selector=None)(torch.randn(1, 2, 24))


@torch.no_grad()
def test_copying_is_attention_to_the_first_copy(model, ids):
    model.set_attn_implementation("eager")
    weights = model(ids.repeat(1, 2), output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation("sdpa")
    expected = torch.zeros(3, 4)
    for layer, weight in enumerate(weights):
        for t in range(20, 39):
            expected[layer] += (weight[:, :, t, t - 20] + weight[:, :, t, t - 19]).mean(0) / 19
    expected = expected.unflatten(1, (2, 2)).amax(2)
    torch.testing.assert_close(copying_by_head(model, ids), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"^tokens: expected two or more in a row"):
        copying_by_head(model, ids[:, :1])
