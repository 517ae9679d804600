"""Context parallel in models of transformers and in other dtypes, and what it sends."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hamblocks as hb
from hamblocks.parallel import ContextShard
from hamblocks_ops import NEVER

VOCAB, HIDDEN = 17, 16


def batch(tokens: int) -> torch.Tensor:
    return torch.randint(VOCAB, (2, tokens), generator=torch.Generator().manual_seed(1))


def in_dtype(group: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = hb.HAMLayer(HIDDEN, 2, selector=hb.FirstTokens(3) | hb.Window(9))
    x = torch.randn(2, 41, HIDDEN)
    exact = layer.double()(x.double()).y
    layer = layer.to(dtype)
    one = (layer(x.to(dtype)).y.double() - exact).norm()
    shard = ContextShard(41, group=group)
    many = shard.gather(layer(shard.take(x).to(dtype), shard=shard).y)
    assert many.dtype == dtype
    # the error that one process makes in this dtype
    assert (many.double() - exact).norm() <= 2 * one + torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_as_near_as_in_one_process(workers, dtype):
    workers.run(in_dtype, 4, dtype)


# the models of transformers


def causal_lm(**changed: Any) -> Any:
    from hamblocks.models import HAMConfig, HAMForCausalLM

    torch.manual_seed(0)
    kinds = ["hybrid", "linear_attention", "full_attention"]
    selector = hb.Threshold(hb.FixedThreshold(0.9)) | hb.TopK(3)
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_attention_heads": 2}
    config = HAMConfig(
        **sizes, num_hidden_layers=3, layer_types=kinds, selector=selector, **changed
    )
    model = HAMForCausalLM(config).double().train()
    model.loss_function = exact_loss
    return model


def exact_loss(logits, labels, vocab_size, *, shift_labels, num_items_in_batch):
    """transformers' own computes in float32."""
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), shift_labels.flatten(), ignore_index=-100, reduction="sum"
    )
    return loss / num_items_in_batch


def labelled(tokens: torch.Tensor) -> torch.Tensor:
    """Labels of which some do not count."""
    return tokens.masked_fill(tokens % 5 == 2, -100)


BORDERS = torch.tensor([0, 9, 10, 10, 22, 27], dtype=torch.int32)


def loses(group: Any, packed: bool, order: str, checkpoints: bool) -> None:
    tokens = batch(27)[: 1 if packed else 2]
    borders = BORDERS if packed else None
    whole = causal_lm()
    wanted = whole(tokens, labels=labelled(tokens), cu_seq_lens_q=borders)
    wanted.loss.backward()

    model = causal_lm()
    if checkpoints:
        model.gradient_checkpointing_enable()
    shard = ContextShard(27, cu_seqlens=borders, group=group, order=order)
    own = shard.take(tokens)
    found = model(own, labels=shard.take(labelled(tokens)), shard=shard)
    torch.testing.assert_close(shard.gather(found.logits), wanted.logits, rtol=1e-9, atol=1e-10)
    found.loss.backward()
    loss = found.loss.detach().clone()
    dist.all_reduce(loss, group=group)
    torch.testing.assert_close(loss, wanted.loss.detach(), rtol=1e-9, atol=1e-10)
    for (name, weight), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        summed = weight.grad.clone()
        dist.all_reduce(summed, group=group)
        torch.testing.assert_close(summed, other.grad, rtol=1e-9, atol=1e-10, msg=name)

    for argument in ("attention_mask", "position_ids"):
        with pytest.raises(ValueError, match=f"{argument}: expected None beside a shard"):
            model(own, shard=shard, **{argument: torch.ones_like(own)})
    with pytest.raises(ValueError, match="use_cache: expected None beside a shard"):
        model(own, shard=shard, use_cache=True)
    with pytest.raises(ValueError, match="input_ids: expected the tokens of this rank"):
        model(own[:, 1:], shard=shard)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packed", "order", "checkpoints"),
    [(False, "head-tail", True), (True, "head-tail", False), (True, "contiguous", False)],
)
def test_the_loss_of_a_causal_lm_is_that_of_one_process(workers, packed, order, checkpoints):
    workers.run(loses, 4, packed, order, checkpoints)


def follows(group: Any) -> None:
    for tokens in (0, 3, 9, 27):
        for borders in (None, [0, tokens // 3, tokens // 3, tokens]):
            for order in ("head-tail", "contiguous"):
                shard = ContextShard(tokens, cu_seqlens=borders, group=group, order=order)
                x = torch.arange(2 * tokens).view(2, tokens)
                wanted = torch.nn.functional.pad(x, [0, 1])[:, 1:]
                for end in borders or [tokens]:
                    if end:
                        wanted[:, end - 1] = -1
                assert torch.equal(shard.next_of(shard.take(x), -1), shard.take(wanted))
    with pytest.raises(ValueError, match="x: expected"):
        shard.next_of(x[0], -1)


def test_the_next_token_may_be_on_another_rank(workers):
    workers.run(follows, 4)


class EveryNth:
    """Stores every n-th token."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        kept = (position % self.n == 0)[..., None].expand(score.shape)
        evict_at = torch.where(kept, NEVER, position[..., None]).to(torch.int32)
        return hb.Selection(evict_at)


def sent(group: Any, tokens: int, n: int, window: int) -> int:
    torch.manual_seed(0)
    layer = hb.HAMLayer(64, 1, selector=EveryNth(n) if n else hb.Window(window))
    shard = ContextShard(tokens, group=group)
    with torch.no_grad():
        layer(shard.take(torch.randn(1, tokens, 64)), shard=shard)
    sent = torch.tensor([shard.sent_nbytes])
    dist.all_reduce(sent, group=group)
    return int(sent)


def test_bytes_follow_what_is_stored(workers):
    def bytes_of(tokens, n=0, window=0):
        return workers.run(sent, 4, tokens, n, window)[0]

    # the state of the memory and short convolutions do not grow
    fixed = bytes_of(512, window=8)
    assert bytes_of(2048, window=8) == fixed
    everything = bytes_of(2048, 1) - fixed
    # every rank but the last holder of the row gets all keys and values before it
    ring = 3 * 2048 * 2 * 64 * 4
    assert 0.7 * ring < everything <= 1.1 * ring
    for n in (2, 4, 8):
        assert (bytes_of(2048, n) - fixed) / everything == pytest.approx(1 / n, rel=0.1)


class Sum(torch.nn.Module):
    """A memory whose state does not say how it passes on."""

    def forward(self, x, q, k, v, *, position, state=None, cu_seqlens=None, metric=None):
        nothing = torch.zeros_like(v)
        return nothing, hb.MemoryTrace(k, v, None, v, v.norm(dim=-1), position), state


def wrong_use(group: Any) -> None:
    layer = hb.HAMLayer(HIDDEN, 2, selector=hb.Window(3))
    shard = ContextShard(24, group=group)
    x = torch.randn(1, shard.local_tokens, HIDDEN)
    with pytest.raises(ValueError, match="x: expected"):
        layer(x[:, 1:], shard=shard)
    with pytest.raises(ValueError, match="state: expected None beside a shard"):
        layer(x, shard=shard, state=layer.init_state(1))
    with pytest.raises(ValueError, match="cu_seqlens: expected None beside a shard"):
        layer(x, shard=shard, cu_seqlens=torch.tensor([0, 6], dtype=torch.int32))
    other = hb.HAMLayer(HIDDEN, 2, memory=Sum(), gate=None, selector=hb.Window(3))
    with pytest.raises(ValueError, match="memory: expected one that passes its state on"):
        other(x, shard=shard)
    with pytest.raises(ValueError, match="order: expected one of head-tail, contiguous"):
        ContextShard(24, order="ring")
    with pytest.raises(ValueError, match="cu_seqlens: expected ascending borders"):
        ContextShard(24, cu_seqlens=[0, 20])
    with pytest.raises(ValueError, match="x: expected 24 tokens along dimension 1"):
        shard.take(torch.zeros(1, 23))


def test_wrong_use_is_named_on_every_rank(workers):
    workers.run(wrong_use, 4)


def test_without_a_process_group_there_is_no_shard():
    with pytest.raises(ValueError, match="group: expected a process group"):
        ContextShard(8)


def one_raises(group: Any) -> str:
    layer = hb.HAMLayer(HIDDEN, 2, selector=hb.TopK(3))
    shard = ContextShard(24, group=group)
    x = torch.randn(1, shard.local_tokens, HIDDEN)
    if dist.get_rank() == 2:
        raise ZeroDivisionError
    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        layer(x, shard=shard)
    assert time.monotonic() - begin < 30
    return "ended"


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_others(tmp_path):
    """One that dies ends them in `test_thresholds`."""
    from ranks import Workers

    workers = Workers(tmp_path)
    try:
        with pytest.raises(AssertionError, match="ZeroDivisionError"):
            workers.run(one_raises, 4)
        assert workers.answers.count((True, "ended")) == 3
    finally:
        workers.close()
