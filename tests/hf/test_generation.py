"""generate(): greedy decoding, beam search and sampling give the same with a cache and without."""

import pytest
import torch
from hf_cases import MIXED, SELECTORS, greedy, model, padded, rows, text

import hamblocks as hb

LENGTHS = [3, 9, 1, 6]


@pytest.mark.parametrize(
    ("name", "layer_types"),
    [
        *((name, kinds) for name in SELECTORS for kinds in (MIXED, ["hybrid"] * 2)),
        ("window", ["linear_attention"] * 2),
    ],
)
def test_greedy_is_argmax_over_full_passes(name, layer_types):
    made = model(
        layer_types=layer_types, num_hidden_layers=len(layer_types), selector=SELECTORS[name]()
    )
    prompts = rows(1, LENGTHS)
    ids, mask = padded(prompts)
    out = made.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for row, prompt in enumerate(prompts):
        assert torch.equal(out[row, ids.shape[1] - len(prompt) :], greedy(made, prompt, 8))
    assert torch.equal(
        out,
        made.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=False),
    )


def test_finished_rows_leave_the_others_alone():
    made = model(selector=hb.TopK(3))
    prompts = rows(1, LENGTHS)
    ids, mask = padded(prompts)
    free = [greedy(made, prompt, 8)[len(prompt) :] for prompt in prompts]
    eos = int(free[0][2])
    out = made.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    for row, tokens in enumerate(free):
        ends = (tokens == eos).nonzero()[:, 0]
        length = int(ends[0]) + 1 if len(ends) else 8
        assert torch.equal(out[row, ids.shape[1] :][:length], tokens[:length])


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunked_prefill_changes_nothing(chunk):
    made = model(selector=hb.TopK(3) | hb.Window(2))
    ids, mask = padded(rows(1, LENGTHS))
    plain = made.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    pieces = made.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, prefill_chunk_size=chunk
    )
    assert torch.equal(plain, pieces)


def test_sampling_repeats_with_its_seed_and_without_the_cache():
    made = model(selector=hb.TopK(3))
    ids, mask = padded(rows(1, LENGTHS))

    def sample(seed, **how):
        torch.manual_seed(seed)
        return made.generate(
            ids, attention_mask=mask, max_new_tokens=5, do_sample=True, top_k=0, **how
        )

    assert torch.equal(sample(0), sample(0))
    assert torch.equal(sample(0), sample(0, use_cache=False))
    assert not torch.equal(sample(0), sample(1))
    many = sample(0, num_return_sequences=3)
    assert torch.equal(many, sample(0, num_return_sequences=3, use_cache=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("returned", [1, 3])
def test_beams_need_no_cache(name, returned):
    made = model(selector=SELECTORS[name]())
    ids, mask = padded(rows(1, LENGTHS))
    how = {
        "num_beams": 3,
        "num_return_sequences": returned,
        "max_new_tokens": 7,
        "do_sample": False,
        "eos_token_id": 5,
    }
    found = made.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **how
    )
    plain = made.generate(
        ids,
        attention_mask=mask,
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
        **how,
    )
    assert torch.equal(found.sequences, plain.sequences)
    torch.testing.assert_close(found.sequences_scores, plain.sequences_scores)
    assert found.past_key_values.batch_size == 12


def test_sampled_beams_need_no_cache():
    made = model(selector=hb.TopK(3))
    ids, mask = padded(rows(1, LENGTHS))

    def sample(**how):
        torch.manual_seed(0)
        return made.generate(
            ids, attention_mask=mask, num_beams=3, do_sample=True, max_new_tokens=7, **how
        )

    assert torch.equal(sample(), sample(use_cache=False))


def test_a_conversation_goes_on_from_its_cache():
    made = model(selector=hb.TopK(3) | hb.Window(2))
    ids, mask = padded(rows(1, LENGTHS))
    first = made.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
    )
    cache = first.past_key_values
    # the last generated token was not fed to the model
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    said = torch.cat([first.sequences, text(7, 4, 6)], 1)
    mask = torch.cat([mask, mask.new_ones(4, 11)], 1)
    plain = made.generate(said, attention_mask=mask, max_new_tokens=5, do_sample=False)
    twin = cache.fork()
    assert torch.equal(
        made.generate(
            said, attention_mask=mask, max_new_tokens=5, do_sample=False, past_key_values=cache
        ),
        plain,
    )
    assert cache.get_seq_length() == said.shape[1] + 4
    assert twin.get_seq_length() == first.sequences.shape[1] - 1
    assert torch.equal(
        made.generate(
            said, attention_mask=mask, max_new_tokens=5, do_sample=False, past_key_values=twin
        ),
        plain,
    )


def test_embeddings_instead_of_tokens():
    made = model(selector=hb.TopK(3))
    ids = text(1, 2, 7)
    out = made.generate(
        inputs_embeds=made.model.embed_tokens(ids), max_new_tokens=5, do_sample=False
    )
    assert torch.equal(out, made.generate(ids, max_new_tokens=5, do_sample=False)[:, 7:])


def test_what_generate_cannot_do_is_said():
    made, ids = model(), text(0, 1, 5)
    with pytest.raises(ValueError, match=r"^cache_implementation: expected None, got 'static'"):
        made.generate(ids, cache_implementation="static", max_new_tokens=3)
    with pytest.raises(ValueError, match=r"^output_attentions: expected False"):
        made.generate(ids, output_attentions=True, return_dict_in_generate=True, max_new_tokens=3)


def test_hidden_states_of_every_step():
    made = model()
    out = made.generate(
        text(0, 2, 5),
        output_hidden_states=True,
        return_dict_in_generate=True,
        max_new_tokens=3,
        do_sample=False,
    )
    assert [[tuple(x.shape) for x in step] for step in out.hidden_states] == [
        [(2, t, 16)] * 4 for t in (5, 1, 1)
    ]
