"""HAMCache has the interface of transformers' Cache, and an error leaves it unchanged."""

import copy

import pytest
import torch
from hf_cases import MIXED, model, padded, rows, text
from transformers import Cache, DynamicCache

import hamblocks as hb
from hamblocks.models import HAMCache

LENGTHS = [3, 9, 1, 6]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def filled(made, seed=1):
    """Returns a cache that has seen ragged prompts, with their ids and mask."""
    ids, mask = padded(rows(seed, LENGTHS))
    with torch.no_grad():
        return made(ids, attention_mask=mask).past_key_values, ids, mask


def snapshot(cache):
    """A comparable copy of everything that a cache holds."""
    dicts = [state.fork().state_dict() for state in cache.states or []]
    return copy.deepcopy([cache.columns, cache.config is None, [flat(one) for one in dicts]])


def flat(tree):
    if isinstance(tree, torch.Tensor):
        return tree.nan_to_num().tolist()
    if isinstance(tree, dict):
        return {name: flat(branch) for name, branch in tree.items()}
    return [flat(branch) for branch in tree] if isinstance(tree, (list, tuple)) else tree


def test_it_counts_tokens_seen():
    made = model(selector=hb.TopK(2))
    cache, ids, mask = filled(made)
    assert isinstance(cache, Cache)
    assert cache.get_seq_length() == cache.get_seq_length(2) == ids.shape[1]
    assert cache.get_mask_sizes(5, 0) == (ids.shape[1] + 5, 0)
    assert cache.get_max_length() == cache.get_max_cache_shape() == -1
    assert cache.max_cache_len is None
    assert (cache.is_compileable, cache.is_croppable) == (False, False)
    assert cache.is_initialized
    assert cache.has_previous_state()
    assert cache.is_sliding == cache.is_linear == cache.is_dummy == [False] * 3
    assert (len(cache), cache.batch_size) == (3, 4)
    assert cache.seen.tolist() == LENGTHS
    assert repr(cache) == "HAMCache(4 sequences, 9 columns seen)"
    # the number of stored tokens is smaller, and differs between layers
    assert [tokens.tolist() for tokens in cache.tokens] == [
        [[0, 0]] * 4,
        [[min(length, 2)] * 2 for length in LENGTHS],
        [[length] * 2 for length in LENGTHS],
    ]
    assert cache.nbytes > 0
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, len(cache), cache.nbytes, cache.tokens) == (
        0,
        -1,
        0,
        0,
        [],
    )
    assert not cache.is_initialized
    with pytest.raises(ValueError, match=r"^past_key_values: expected a HAMModel to fill"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    again = made(ids, attention_mask=mask, past_key_values=cache)
    assert again.past_key_values is cache
    close(again.logits, made(ids, attention_mask=mask).logits)


@torch.no_grad()
def test_any_pieces_with_padding_in_each():
    made = model(selector=hb.TopK(3) | hb.Window(2))
    said = [
        rows(seed, lengths)
        for seed, lengths in ((1, LENGTHS), (2, [2, 0, 4, 1]), (3, [1, 1, 1, 1]))
    ]
    cache, mask, out = HAMCache(), torch.zeros(4, 0, dtype=torch.long), []
    for turn, side in zip(said, ("right", "left", "left"), strict=True):
        ids, new = padded(turn, side)
        mask = torch.cat([mask, new], 1)
        logits = made(ids, attention_mask=mask, past_key_values=cache).logits
        out.append([logits[row][new[row] == 1] for row in range(4)])
    for row in range(4):
        whole = torch.cat([turn[row] for turn in said])
        close(torch.cat([turn[row] for turn in out]), made(whole[None]).logits[0])
    assert cache.get_seq_length() == mask.shape[1]


@torch.no_grad()
def test_sequences_are_reordered_repeated_and_chosen():
    made = model(selector=hb.TopK(3) | hb.Window(2))
    new = text(5, 4, 1)

    def after(change, ids):
        cache, _, mask = filled(made)
        chosen = torch.arange(4)[change(cache)]
        mask = torch.cat([mask[chosen], torch.ones(len(chosen), 1).long()], 1)
        return made(ids[chosen], attention_mask=mask, past_key_values=cache).logits, chosen

    plain, _ = after(lambda cache: slice(None), new)

    def reorder(cache):
        order = torch.tensor([3, 0, 0, 2])
        cache.reorder_cache(order)
        return order

    def repeat(cache):
        cache.batch_repeat_interleave(2)
        return torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])

    def choose(cache):
        cache.batch_select_indices(torch.tensor([2, 1]))
        return torch.tensor([2, 1])

    def by_mask(cache):
        cache.batch_select_indices(torch.tensor([True, False, False, True]))
        return torch.tensor([0, 3])

    for change in (reorder, repeat, choose, by_mask):
        logits, chosen = after(change, new)
        close(logits, plain[chosen])


@torch.no_grad()
def test_back_to_a_checkpoint():
    made = model(selector=hb.TopK(3) | hb.Window(2))
    cache, _, mask = filled(made)
    mask = torch.cat([mask, torch.ones(4, 5).long()], 1)
    new = text(5, 4, 5)
    cache.checkpoint()
    first = made(new, attention_mask=mask, past_key_values=cache).logits
    cache.crop(0)
    for count in (-1.0, True, "1", -15, torch.tensor(-1.0)):
        with pytest.raises(ValueError, match=r"^tokens_to_remove: .* integer >= -14, got"):
            cache.crop(count)
    with pytest.raises(
        ValueError,
        match=r"^tokens_to_remove: expected the length of a checkpoint \(9\), .* 13",
    ):
        cache.crop(-1)
    assert cache.get_seq_length() == 14
    cache.reorder_cache(torch.tensor([1, 0, 2, 3]))
    for back in (-5, 9):
        cache.crop(back)
        assert cache.get_seq_length() == 9
        order = [1, 0, 2, 3]
        close(
            made(new[order], attention_mask=mask[order], past_key_values=cache).logits, first[order]
        )
    cache.reset()
    with pytest.raises(ValueError, match=r"^tokens_to_remove: .* integer >= 0, got int -1"):
        cache.crop(-1)


@torch.no_grad()
def test_forks_and_copies_go_their_own_ways():
    made = model(selector=hb.TopK(3) | hb.Window(2))
    cache, _, mask = filled(made)
    mask = torch.cat([mask, torch.ones(4, 2).long()], 1)
    a, b = text(5, 4, 2), text(6, 4, 2)
    plain = [
        made(new, attention_mask=mask, past_key_values=filled(made)[0]).logits for new in (a, b, a)
    ]
    caches = [cache, cache.fork(), copy.deepcopy(cache)]
    for twin, new, expected in zip(caches, (a, b, a), plain, strict=True):
        close(made(new, attention_mask=mask, past_key_values=twin).logits, expected)


def bad(cache, ids, mask):
    grown = torch.cat([mask, torch.ones(4, 2).long()], 1)
    new = text(5, 4, 2)
    other = grown.clone()
    other[1, 0] = 0
    return {
        "another batch size": (
            {"input_ids": new[:3]},
            r"^input_ids: expected 4 sequences, as past_key_values, got 3",
        ),
        "mask of the new columns alone": (
            {"input_ids": new, "attention_mask": grown[:, -2:]},
            r"^attention_mask: expected shape \[B, past \+ T\] = \[4, 9 \+ 2\]",
        ),
        "another past": (
            {"input_ids": new, "attention_mask": other},
            r"^attention_mask: expected \[3, 9, 1, 6\] tokens in its first 9 columns, "
            r"as the cache has seen, got \[3, 8, 1, 6\]",
        ),
        "backwards": (
            {
                "input_ids": new,
                "attention_mask": grown,
                "position_ids": torch.arange(2)[None].expand(4, -1),
            },
            r"^position_ids: expected 3, which continues from the tokens seen, "
            r"got 0 in batch row 0, column 0",
        ),
        "the same again": (
            {
                "input_ids": new,
                "attention_mask": grown,
                "position_ids": cache.seen[:, None] + torch.tensor([[-1, 0]]),
            },
            r"^position_ids: expected 3, .* got 2 in batch row 0, column 0",
        ),
        "packed": (
            {"input_ids": new.view(1, -1), "cu_seq_lens_q": torch.tensor([0, 8])},
            r"^input_ids: expected 4 sequences",
        ),
        "labels": (
            {"input_ids": new, "attention_mask": grown, "labels": new[:, 1:]},
            r"^labels: expected shape",
        ),
        "tokens": (
            {"input_ids": new + 99, "attention_mask": grown},
            r"^input_ids: expected values in \[0, 18\]",
        ),
    }


@pytest.mark.parametrize("name", bad(*[filled(model())[i] for i in range(3)]))
def test_bad_input_leaves_the_cache_as_it_was(name):
    made = model(selector=hb.TopK(3) | hb.Window(2))
    cache, ids, mask = filled(made)
    arguments, message = bad(cache, ids, mask)[name]
    before = snapshot(cache)
    with pytest.raises(ValueError, match=message):
        made(**arguments, past_key_values=cache)
    assert snapshot(cache) == before
    grown = torch.cat([mask, torch.ones(4, 2).long()], 1)
    fresh = filled(made)[0]
    new = text(5, 4, 2)
    with torch.no_grad():
        close(
            made(new, attention_mask=grown, past_key_values=cache).logits,
            made(new, attention_mask=grown, past_key_values=fresh).logits,
        )


@pytest.mark.parametrize(
    "where", ["model.stack.blocks.2.block.layer.combiner", "model.stack.norm", "lm_head"]
)
def test_an_exception_anywhere_leaves_the_cache_as_it_was(where):
    made = model(selector=hb.TopK(3) | hb.Window(2))
    cache, _, mask = filled(made)
    before, new = snapshot(cache), text(5, 4, 2)
    grown = torch.cat([mask, torch.ones(4, 2).long()], 1)
    expected = made(new, attention_mask=grown, past_key_values=filled(made)[0]).logits

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = made.get_submodule(where).register_forward_hook(fail)
    for empty in (HAMCache(), cache):
        with pytest.raises(RuntimeError, match="out of memory"):
            made(new, attention_mask=grown if empty is cache else None, past_key_values=empty)
    hook.remove()
    assert snapshot(cache) == before
    close(made(new, attention_mask=grown, past_key_values=cache).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 32},
            r"^past_key_values: expected a cache of a model with hidden_size = 32, got one with 16",
        ),
        (
            {"num_key_value_heads": 4},
            r"^past_key_values: .* num_key_value_heads = 4, got one with 2",
        ),
        (
            {"layer_types": ["hybrid"] * 3},
            r"^past_key_values: .* layer_types = \['hybrid', .* got one with \['linear_att",
        ),
        (
            {"num_hidden_layers": 2, "layer_types": MIXED[:2]},
            r"^past_key_values: .* num_hidden_layers = 2, got one with 3",
        ),
        ({"selector": hb.TopK(4)}, r"^past_key_values: .* selector = .*'k': 4"),
    ],
)
def test_a_cache_of_another_configuration(changes, message):
    cache, _, _ = filled(model(selector=hb.TopK(3)))
    before = snapshot(cache)
    for other in (cache, HAMCache(model(selector=hb.TopK(3)).config)):
        with pytest.raises(ValueError, match=message):
            model(**{"selector": hb.TopK(3), **changes})(text(5, 4, 2), past_key_values=other)
    assert snapshot(cache) == before


@torch.no_grad()
def test_a_limit_to_what_is_stored():
    made = model(selector=hb.TopK(8), layer_types=["hybrid"] * 3)
    cache, ids = HAMCache(page_size=4, max_pages=4), text(0, 1, 12)
    for piece in ids.split(6, 1):
        made(piece, past_key_values=cache)
    with pytest.raises(ValueError, match=r"^max_pages: expected at least"):
        made(text(0, 2, 12), past_key_values=HAMCache(page_size=4, max_pages=4))
    assert torch.equal(cache.tokens[0], torch.full((1, 2), 8))


def test_a_cache_of_transformers_own():
    with pytest.raises(
        ValueError, match=r"^past_key_values: expected a HAMCache, got DynamicCache"
    ):
        model()(text(0, 1, 3), past_key_values=DynamicCache())


@pytest.mark.parametrize("backbone", [False, True])
@torch.no_grad()
def test_both_names_that_transformers_has_for_a_cache_are_taken(backbone):
    made = model(selector=hb.TopK(2))
    called = made.model if backbone else made
    ids, results = torch.tensor([[3, 1, 4]]), []
    for name in ("past_key_values", "cache"):  # the newer name is that of transformers 5.24
        cache = called(ids).past_key_values
        results.append(called(ids, **{name: cache}))
        assert results[-1].past_key_values is cache
        assert cache.columns == 6
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    others = HAMCache(), HAMCache()
    with pytest.raises(ValueError, match="cache: expected None beside past_key_values"):
        called(ids, past_key_values=others[0], cache=others[1])
