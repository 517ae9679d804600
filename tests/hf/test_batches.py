"""Padding, packed batches and the loss: every sequence gives what it gives alone."""

import numpy as np
import pytest
import torch
from hf_cases import SELECTORS, config, model, padded, rows, text
from transformers import DataCollatorWithFlattening

import hamblocks as hb
from hamblocks.models import HAMCache, HAMForCausalLM

LENGTHS = [5, 11, 1, 8]


def close(a, b):
    # transformers computes every loss in float32
    tolerance = 1e-9 if a.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def positions(lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_padding_changes_nothing(name, use_cache):
    made, prompts = model(selector=SELECTORS[name]()), rows(3, LENGTHS)
    alone = [made(prompt[None]).logits[0] for prompt in prompts]
    for side in ("left", "right", "both"):
        ids, mask = padded(prompts, side)
        out = made(ids, attention_mask=mask, use_cache=use_cache, output_hidden_states=True)
        for row, expected in enumerate(alone):
            close(out.logits[row][mask[row] == 1], expected)
        assert not out.hidden_states[-1][mask == 0].any()
        close(made(ids, attention_mask=mask.bool(), use_cache=use_cache).logits, out.logits)
    one, mask = padded(prompts[:1], "both")
    close(made(one, attention_mask=mask, use_cache=use_cache).logits[mask == 1], alone[0])


@pytest.mark.parametrize("name", SELECTORS)
@torch.no_grad()
def test_packed_is_one_by_one(name):
    made, prompts = model(selector=SELECTORS[name]()), rows(3, LENGTHS)
    expected = torch.cat([made(prompt[None]).logits for prompt in prompts], 1)
    ids, borders = torch.cat(prompts)[None], torch.tensor([0, *LENGTHS]).cumsum(0)
    close(made(ids, position_ids=positions(LENGTHS)).logits, expected)
    for border in (borders, borders.to(torch.int32)):
        close(made(ids, cu_seq_lens_q=border).logits, expected)
        close(made(ids, cu_seq_lens_q=border, position_ids=positions(LENGTHS)).logits, expected)
    # two batch rows with several sequences each
    two = torch.cat([ids, ids.flip(1)])
    both = torch.cat([positions(LENGTHS), positions(LENGTHS[::-1])])
    expected = [
        made(two[row : row + 1], position_ids=both[row : row + 1]).logits for row in range(2)
    ]
    close(made(two, position_ids=both).logits, torch.cat(expected))
    # one sequence per batch row is not a packed batch, so a cache is returned
    assert made(two, position_ids=torch.arange(25)[None]).past_key_values.get_seq_length() == 25


def test_loss_is_the_mean_over_separate_sequences():
    made, prompts = model(selector=hb.TopK(3)), rows(3, LENGTHS)
    alone = [
        made(prompt[None], labels=prompt[None]).loss * (len(prompt) - 1)
        for prompt in prompts
        if len(prompt) > 1
    ]
    expected = torch.stack(alone).sum() / (sum(LENGTHS) - len(LENGTHS))
    ids = torch.cat(prompts)[None]
    close(made(ids, position_ids=positions(LENGTHS), labels=ids).loss, expected)
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(
        [{"input_ids": row.tolist()} for row in prompts]
    )
    close(made(**batch).loss, expected)
    close(
        made(**{name: batch[name] for name in ("input_ids", "labels", "position_ids")}).loss,
        expected,
    )
    for side in ("left", "right", "both"):
        ids, mask = padded(prompts, side)
        # padding is never a target
        close(made(ids, attention_mask=mask, labels=ids).loss, expected)
        summed = made(
            ids, attention_mask=mask, labels=ids, num_items_in_batch=torch.tensor(10)
        ).loss
        close(summed, expected * (sum(LENGTHS) - len(LENGTHS)) / 10)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.5, -100)
    kept = labels.masked_fill(mask == 0, -100)[:, 1:]
    logits = made(ids, attention_mask=mask).logits[:, :-1]
    first = (mask.cumsum(1) == 1)[:, 1:]
    expected = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), kept.masked_fill(first, -100).flatten()
    )
    close(made(ids, attention_mask=mask, labels=labels).loss, expected)


def test_loss_and_gradient_know_nothing_of_padding():
    made, prompts = model(selector=hb.TopK(3)).train(), rows(3, LENGTHS)
    gradients = []
    for side in ("left", "right"):
        ids, mask = padded(prompts, side)
        made.zero_grad()
        made(ids, attention_mask=mask, labels=ids).loss.backward()
        gradients.append([weight.grad for weight in made.parameters()])
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-9)


def test_the_cache_changes_no_gradient():
    made, ids = model(selector=hb.TopK(3)), text(3, 2, 12)
    gradients = []
    for use_cache in (True, False):
        made.zero_grad()
        made(ids, labels=ids, use_cache=use_cache).loss.backward()
        gradients.append([weight.grad for weight in made.parameters()])
    for cached, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(cached, plain, rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_only_the_logits_asked_for():
    made, ids = model(), text(0, 2, 9)
    every = made(ids).logits
    for two in (2, np.int64(2)):
        close(made(ids, logits_to_keep=two).logits, every[:, -2:])
    close(made(ids, logits_to_keep=torch.tensor([0, 4])).logits, every[:, [0, 4]])


@torch.no_grad()
def test_outputs_as_tuples_and_stats():
    made, ids = model(selector=hb.Window(2)), text(0, 2, 9)
    out = made(ids, output_hidden_states=True, return_dict=False, use_cache=False)
    assert torch.equal(out[0], made(ids).logits)
    assert len(out[1]) == 4
    kept = [float(stats.keep_fraction()) for stats in made(ids).stats]
    assert kept == [0.0, pytest.approx(2 / 9), 1.0]


def test_what_is_used_without_being_asked():
    made, ids = model(), text(0, 1, 9)
    assert type(made(ids).past_key_values) is HAMCache
    assert made(ids, use_cache=False).past_key_values is None
    assert made(ids, position_ids=positions([4, 5])).past_key_values is None
    assert made.train()(ids).past_key_values is None
    assert HAMForCausalLM(config(use_cache=False)).eval()(ids).past_key_values is None


IDS, MASK = text(0, 2, 4), torch.ones(2, 4, dtype=torch.long)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"^input_ids: expected either input_ids or inputs_embeds, got neither"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 4, 16)}, r"^input_ids: .* got both"),
        (
            {"inputs_embeds": torch.zeros(2, 4, 15)},
            r"^inputs_embeds: expected shape \[B, T, hidden\] = \[any, any, 16\]",
        ),
        ({"input_ids": IDS + 100}, r"^input_ids: expected values in \[0, 18\]"),
        ({"input_ids": IDS.float()}, r"^input_ids: expected dtype int32 or int64"),
        ({"input_ids": IDS[0]}, r"^input_ids: expected shape \[B, T\]"),
        (
            {"input_ids": IDS, "attention_mask": MASK[:, :3]},
            r"^attention_mask: expected shape .* = \[2, 0 \+ 4\]",
        ),
        (
            {"input_ids": IDS, "attention_mask": MASK[:, None, None]},
            r"^attention_mask: expected a tensor \[B, past \+ T\]",
        ),
        (
            {"input_ids": IDS, "attention_mask": {"full": MASK}},
            r"^attention_mask: expected a tensor",
        ),
        (
            {"input_ids": IDS, "attention_mask": 2 * MASK},
            r"^attention_mask: expected 0 and 1, got other values",
        ),
        (
            {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]])},
            r"^attention_mask: expected no padding between tokens, got some in batch row 1",
        ),
        (
            {"input_ids": IDS, "position_ids": torch.arange(3)[None]},
            r"^position_ids: expected shape \[B, T\]",
        ),
        (
            {"input_ids": IDS, "position_ids": torch.ones(3, 4).long()},
            r"^position_ids: expected shape \[B, T\] = \[2, 4\]",
        ),
        (
            {"input_ids": IDS, "position_ids": torch.arange(4)[None].expand(2, -1) + 3},
            r"^position_ids: expected 0 .*, got 3 in batch row 0, column 0",
        ),
        (
            {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 3], [0, 1, 1, 2]])},
            r"^position_ids: expected 0 or 2 .*, got 1 in batch row 1, column 2",
        ),
        (
            {
                "input_ids": IDS,
                "attention_mask": MASK,
                "position_ids": torch.tensor([[0, 1, 0, 1]]),
            },
            r"^position_ids: expected 2, which continues from the tokens seen, "
            r"got 0 in batch row 0, column 2",
        ),
        (
            {"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 8])},
            r"^cu_seqlens: expected a packed batch",
        ),
        (
            {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 5])},
            r"^cu_seqlens: expected first 0 and last T = 4",
        ),
        (
            {
                "input_ids": IDS[:1],
                "cu_seq_lens_q": torch.tensor([0, 4]),
                "attention_mask": MASK[:1],
            },
            r"^attention_mask: expected None beside cu_seq_lens_q",
        ),
        (
            {
                "input_ids": IDS[:1],
                "cu_seq_lens_q": torch.tensor([0, 2, 4]),
                "position_ids": torch.arange(4)[None],
            },
            r"^position_ids: expected positions that restart at 0",
        ),
        (
            {"input_ids": IDS[:1], "position_ids": torch.tensor([[0, 1, 0, 1]]), "use_cache": True},
            r"^use_cache: expected False for a packed batch",
        ),
        ({"input_ids": IDS, "output_attentions": True}, r"^output_attentions: expected False"),
        (
            {"input_ids": IDS, "past_key_values": ()},
            r"^past_key_values: expected a HAMCache, got tuple",
        ),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"^labels: expected shape \[B, T\] = \[2, 4\]"),
        (
            {"input_ids": IDS, "labels": IDS, "logits_to_keep": 1},
            r"^logits_to_keep: expected 0 beside labels",
        ),
        *(
            ({"input_ids": IDS, "logits_to_keep": kept}, f"^logits_to_keep: expected {wanted}")
            for kept, wanted in (
                (2.0, "an integer >= 0, got float 2.0"),
                (-2, "an integer >= 0, got int -2"),
                (True, "an integer >= 0, got bool True"),
                ("2", "an integer >= 0, got 2"),
                (torch.tensor([0.0]), r"dtype int32 or int64, got float32 \[1\]"),
                (torch.tensor(1), r"shape \[columns\]"),
            )
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        model(dtype=torch.float32)(**arguments)
