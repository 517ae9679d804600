"""Assisted generation and prompt lookup give the tokens of greedy decoding, and leave no trace.

Every comparison is exact: a rejected token that changed a threshold, a ledger, a page or the state
of a memory would change a later decision.
"""

from __future__ import annotations

import pytest
import torch
from hf_cases import SELECTORS, VOCAB, model, padded, rows, text
from transformers import LlamaConfig, LlamaForCausalLM

import hamblocks as hb
from hamblocks.models import HAMCache

KINDS = ["linear_attention", "hybrid"]
STEPS = 8


def tiny(seed, selector, **changes):
    """A model without a padding token: its random weights may predict any token."""
    sizes = {"layer_types": KINDS, "num_hidden_layers": len(KINDS), "pad_token_id": None}
    return model(seed, selector=selector, **{**sizes, **changes})


def llama(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=VOCAB, num_hidden_layers=1, initializer_range=0.3, pad_token_id=None, **sizes
    )
    return LlamaForCausalLM(config).double().eval()


def prompt_of(seed):
    return text(seed + 5, 1, 6).repeat(1, 2)  # repeated, so that prompt lookup finds candidates


def generated(made, ids, **how):
    # transformers 5.6 looks up candidates only where some token ends a text; here none does
    ends = {"eos_token_id": VOCAB, "pad_token_id": VOCAB}
    given = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True}
    return made.generate(ids, **given | ends | how)


def content(cache):
    """What the layers hold, without the places of tokens in their pools."""
    found = []
    for state in cache.states:
        found.append(state.trees)
        if state.cache is not None:
            found.append(state.cache.state_dict())
    return found


def close(one, other):
    if isinstance(one, torch.Tensor):
        exact = one.dtype in (torch.int32, torch.int64, torch.bool)
        assert torch.equal(one, other) if exact else True
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, equal_nan=True)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            close(one[name], other[name])
    elif isinstance(one, (tuple, list)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            close(a, b)
    else:
        assert one == other


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "name"), [*enumerate(SELECTORS)])
def test_tokens_and_cache_are_those_of_greedy_decoding(seed, name, monkeypatch):
    made = tiny(seed, SELECTORS[name]())
    ids = prompt_of(seed)
    greedy = generated(made, ids)
    removed = []
    crop = HAMCache.crop
    monkeypatch.setattr(HAMCache, "crop", lambda self, n: (removed.append(n), crop(self, n))[1])
    hows = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "another model": {"assistant_model": tiny(seed + 1, SELECTORS[name]())},
        "itself": {"assistant_model": made},
        "a transformer": {"assistant_model": llama(seed)},
    }
    for how in hows.values():
        removed.clear()
        found = generated(made, ids, **how)
        assert torch.equal(found.sequences, greedy.sequences)
        assert removed
        cache = found.past_key_values
        assert cache.columns == greedy.past_key_values.columns
        close(content(cache), content(greedy.past_key_values))
        # the caller's cache records no longer
        assert not cache.is_recording
        assert all(state.ring is None for state in cache.states)


def test_a_model_helps_a_transformer():
    helper, target = tiny(0, hb.TopK(3) | hb.Window(2)), llama(3)
    ids = prompt_of(2)
    found = generated(target, ids, assistant_model=helper)
    assert torch.equal(found.sequences, generated(target, ids).sequences)


def test_more_and_more_candidates_are_recorded():
    made = tiny(0, hb.TopK(3))
    greedy = generated(made, prompt_of(0), max_new_tokens=20)
    made.generation_config.num_assistant_tokens = 1
    made.generation_config.num_assistant_tokens_schedule = "heuristic"
    made.generation_config.assistant_confidence_threshold = 0
    asked = []
    handle = made.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = generated(made, prompt_of(0), max_new_tokens=20, assistant_model=made)
    handle.remove()
    assert torch.equal(found.sequences, greedy.sequences)
    assert max(asked[1:]) >= 8  # all candidates are right, so every round has two more


def test_a_conversation_goes_on_with_a_cache_that_recorded():
    made = tiny(0, hb.TopK(3) | hb.Window(2))
    first = generated(made, prompt_of(0), prompt_lookup_num_tokens=3, max_new_tokens=5)
    said = torch.cat([first.sequences, text(9, 1, 4)], 1)
    right = generated(made, said, max_new_tokens=5).sequences
    # transformers runs all tokens again when it begins to check candidates
    with pytest.raises(ValueError, match=r"^(position_ids|attention_mask): expected"):
        generated(made, said, past_key_values=first.past_key_values, prompt_lookup_num_tokens=3)
    again = generated(made, said, past_key_values=first.past_key_values, max_new_tokens=5)
    assert torch.equal(again.sequences, right)
    cache = HAMCache(rollback=1)
    how = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 5}
    assert torch.equal(generated(made, said, past_key_values=cache, **how).sequences, right)
    assert all(state.ring.size == 1 for state in cache.states)


def test_an_error_leaves_the_recording():
    made = tiny(0, hb.TopK(3))
    cache = HAMCache()
    with pytest.raises(RuntimeError, match="enough"):
        generated(
            made,
            prompt_of(0),
            past_key_values=cache,
            prompt_lookup_num_tokens=3,
            stopping_criteria=[stop],
        )
    assert not cache.is_recording


def stop(ids, scores, **kwargs):
    raise RuntimeError("enough")


def test_beams_have_no_assistant():
    made = tiny(0, hb.TopK(3))
    how = {"num_beams": 2, "max_new_tokens": 3}
    plain = generated(made, prompt_of(0), **how)
    found = generated(made, prompt_of(0), prompt_lookup_num_tokens=3, **how)  # which is ignored
    assert torch.equal(found.sequences, plain.sequences)
    assert not found.past_key_values.is_recording


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_columns_are_taken_back_with_their_padding(side):
    made = model(selector=SELECTORS["target"]())
    first = rows(1, [3, 9, 1, 6])
    wrong_ones = rows(2, [2, 3, 1, 3])
    right_ones = text(3, 4, 2)
    caches = []
    for tries in (True, False):
        cache = HAMCache(rollback=4)
        ids, mask = padded(first, "left")
        made(ids, attention_mask=mask, past_key_values=cache)
        if tries:
            other, more = padded(wrong_ones, side)
            longer = torch.cat([mask, more], 1)
            made(other, attention_mask=longer, past_key_values=cache)
            cache.crop(-other.shape[1])
        assert cache.get_seq_length() == ids.shape[1]
        assert cache.seen.tolist() == [3, 9, 1, 6]
        mask = torch.cat([mask, torch.ones(4, 2, dtype=torch.long)], 1)
        out = made(right_ones, attention_mask=mask, past_key_values=cache).logits
        caches.append((out, content(cache)))
    close(*caches)


@torch.no_grad()
def test_what_can_be_taken_back_is_said_and_follows_the_batch():
    made = model(selector=hb.TopK(3) | hb.Window(2))
    cache = HAMCache(rollback=3)
    assert cache.is_croppable
    ids, mask = padded(rows(1, [3, 9, 1, 6]))
    made(ids, attention_mask=mask, past_key_values=cache)
    cache.checkpoint()
    new = text(5, 4, 4)
    mask = torch.cat([mask, torch.ones(4, 4).long()], 1)
    made(new[:, :2], attention_mask=mask[:, :-2], past_key_values=cache)
    plain = made(new[:, 2:], attention_mask=mask, past_key_values=cache).logits
    order = torch.tensor([2, 0, 0, 1])
    cache.reorder_cache(order)
    twin = cache.fork()
    cache.crop(-2)
    again = made(new[order, 2:], attention_mask=mask[order], past_key_values=cache).logits
    close(again, plain[order])
    twin.crop(11)  # as older releases of transformers count
    assert (twin.columns, twin.is_croppable) == (11, True)
    with pytest.raises(
        ValueError,
        match=r"^tokens_to_remove: expected the length of a checkpoint \(9\) or the last 1 "
        r"columns, got a length of 8",
    ):
        twin.crop(-3)
    assert twin.columns == 11
    twin.crop(-2)
    assert twin.columns == 9
    with pytest.raises(ValueError, match=r"^tokens_to_remove: .* got a length of 8"):
        twin.crop(-1)
    with pytest.raises(ValueError, match=r"^rollback: expected an integer >= 0, got int -1"):
        HAMCache(rollback=-1)


@torch.no_grad()
def test_a_failed_call_keeps_what_can_be_taken_back():
    made = model(selector=hb.TopK(3))
    cache = HAMCache(made.config, rollback=2)
    made(text(1, 2, 5), past_key_values=cache)
    before = content(cache)
    handle = made.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made(text(2, 2, 3), past_key_values=cache)
    handle.remove()
    close(content(cache), before)
    cache.crop(-2)
    assert cache.seen.tolist() == [3, 3]
