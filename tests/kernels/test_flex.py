"""FlexAttention over all keys and over the stored ones, forward; its gradient on the path that torch
has for tests, for FlexAttention has no backward on a CPU; and its mask of blocks, with blocks of a
few tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from host_graph import HostGraph
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hamblocks.testing import (
    AttentionInputs,
    OpImplementation,
    assert_close,
    assert_close_to_reference,
    attention_inputs,
)
from hamblocks.testing.kinds.ops import visible
from hamblocks_ops import UnsupportedError, explain, selected_attention
from hamblocks_ops.dispatch import WHEN_NAMED
from hamblocks_ops.selected_attention import block_mask, flex_compact
from hamblocks_ops.selected_attention.lists import Times, times

flex = import_module("torch.nn.attention.flex_attention")
NAMES = ("flex", "flex-compact")
both = pytest.mark.parametrize("impl", NAMES)


def part(impl: str) -> OpImplementation:
    return OpImplementation(selected_attention, impl=impl)


def forward(
    impl: str, case: AttentionInputs, tensors: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    return part(impl).problem(case, tensors).run("it", backward=False)


def time_of(call: dict[str, Any]) -> Times:
    checked = selected_attention.call_of(**call)
    return times(checked.query_position, checked.key_position, checked.evict_at, checked.cu_seqlens)


@contextmanager
def differentiable() -> Iterator[None]:
    """torch refuses a backward pass on a CPU, but can run one unfused."""
    with (
        patch.object(flex, "_validate_device", lambda *_: None),
        patch.object(block_mask, "learns", lambda _: False),
    ):
        yield


@pytest.mark.slow
@both
@settings(max_examples=12)
@given(case=attention_inputs(tokens=st.integers(0, 40)))
@example(case=AttentionInputs(tokens=65, group=3, bias="some", policy="window"))
@example(case=AttentionInputs(packed=(0, 3, 0, 0, 40, 1, 0), bias="shared", dtype=torch.bfloat16))
@example(case=AttentionInputs(tokens=33, cache=50, bias="hidden", seed=3))
def test_is_the_reference(impl: str, case: AttentionInputs) -> None:
    problem = part(impl).problem(case)
    exact, own = problem.run("reference", dtype=torch.float64, backward=False), problem.noise()
    plain = problem.run("reference", backward=False)
    for name, x in forward(impl, case).items():
        error = float((plain[name].double() - exact[name]).nan_to_num().norm())
        assert x.dtype == plain[name].dtype
        assert_close(x, exact[name], name, own=max(error, 2 * own[name]))


@pytest.mark.slow
@both
@pytest.mark.parametrize(
    "case",
    [
        AttentionInputs(tokens=40, group=2, bias="some", policy="topk", dtype=torch.float32),
        AttentionInputs(packed=(5, 0, 20, 1), bias="shared", policy="any", dtype=torch.float64),
        AttentionInputs(tokens=9, cache=20, bias="hidden", dtype=torch.float32),
        AttentionInputs(tokens=0, bias="some"),
        AttentionInputs(tokens=3, cache=0, bias="some"),
    ],
    ids=repr,
)
def test_gradients_are_those_of_the_reference(impl: str, case: AttentionInputs) -> None:
    with differentiable():
        assert_close_to_reference(part(impl).problem(case), "it")


@pytest.mark.slow
@both
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_what_is_not_seen_does_not_leak(impl: str, garbage: float) -> None:
    for case in (
        AttentionInputs(tokens=20, bias="hidden"),
        AttentionInputs(tokens=6, cache=20, policy="any"),
    ):
        tensors = case.tensors()
        unseen = ~visible(tensors).any(1)[..., None]
        filled = [
            tensors | {x: tensors[x].masked_fill(unseen, value) for x in ("k", "v")}
            for value in (garbage, 0.0)
        ]
        for name, x in forward(impl, case, filled[1]).items():
            assert torch.equal(forward(impl, case, filled[0])[name], x)


@pytest.mark.slow
def test_compiled_it_skips_blocks_and_is_the_reference() -> None:
    """Compiled for a CPU, where FlexAttention reads the lists of blocks, as on a GPU.

    Two keys of five are never stored, and hold NaN.
    """
    case = AttentionInputs(tokens=3 * block_mask.BLOCK + 5, group=2, dim=16, dtype=torch.float32)
    call = case.tensors()
    position = torch.arange(case.tokens, dtype=torch.int32)[None, :, None].expand(case.batch, -1, 1)
    call["evict_at"] = torch.where(position % 5 < 1, position + 150, position + 9 * (position % 2))
    unseen = (call["evict_at"] <= position)[..., None]
    call |= {name: call[name].masked_fill(unseen, float("nan")) for name in "kv"}
    compiled = torch.compile(flex.flex_attention, fullgraph=True)

    def without_lse(q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return compiled(q, *args, **kwargs), q[..., 0]  # which has no lse, compiled for a CPU

    wanted = selected_attention(**call, impl="reference").out
    with torch.no_grad(), patch.object(block_mask, "_kernel", lambda _: without_lse):
        got = selected_attention(**call, impl="flex-compact").out
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@settings(max_examples=40)
@given(case=attention_inputs(dtype=torch.float64, bias="none", tokens=st.integers(1, 40)))
@example(case=AttentionInputs(packed=(9, 0, 4, 12), policy="window", bias="some"))
def test_lists_hold_every_key_once_and_those_in_use_first(case: AttentionInputs) -> None:
    call = selected_attention.call_of(**case.tensors())
    if not call.q.numel() or not call.k.numel():
        return
    time = time_of(case.tensors())
    seen = block_mask.seen_at_all(time).transpose(1, 2)
    kinds = flex_compact.classes(time, seen.transpose(1, 2)).transpose(1, 2)
    keys = flex_compact.side_by_side(call, time)
    assert torch.equal(kinds == flex_compact.UNSEEN, ~seen)
    assert torch.equal((kinds == 0), time.lasting.transpose(1, 2) & seen)
    # every key is marked by a number in place of its values
    number = torch.arange(call.k.shape[1])[None, :, None, None].expand(call.k.shape)
    marked = call._replace(k=number.to(call.k.dtype), v=number.to(call.k.dtype))
    moved = flex_compact.side_by_side(marked, time).k[..., 0].long()
    used = keys.evict_at > keys.position
    assert torch.equal(used.sum(2), seen.sum(2))
    assert bool((used[:, :, 1:] <= used[:, :, :-1]).all())
    assert bool((kinds.gather(2, moved).masked_fill(~used, 127).diff(dim=2) >= 0).all())
    for b, h in ((b, h) for b in range(used.shape[0]) for h in range(used.shape[1])):
        own = moved[b, h, used[b, h]]
        assert sorted(own.tolist()) == seen[b, h].nonzero()[:, 0].tolist()
        for name, x in (("k", call.k), ("v", call.v), ("position", time.position)):
            assert torch.equal(getattr(keys, name)[b, h, used[b, h]], x[b, own, h])


def test_a_block_is_skipped_once_its_keys_are_evicted() -> None:
    """One key in eight for good, the others in a window: what is visited is what is stored, rounded
    up to blocks, and the block that has keys of both kinds."""
    tokens, window = 512, 16
    position = torch.arange(tokens, dtype=torch.int32)[None, :, None]
    call = AttentionInputs(tokens=tokens, batch=1, kv_heads=1, dim=2, dtype=torch.float32).tensors()
    call["evict_at"] = torch.where(position % 8 == 0, 2**31 - 1, position + window).int()
    time = time_of(call)
    with patch.object(block_mask, "BLOCK", 16):
        keys = flex_compact.side_by_side(selected_attention.call_of(**call), time)
        compact, _ = block_mask.visited(time.asked, keys.position, keys.evict_at)
        every, _ = block_mask.visited(
            time.asked, *(x.transpose(1, 2) for x in (time.position, time.evict_at))
        )
    # 32 blocks of queries: 1 to 32 blocks of all keys, or 1 to 4 of those for good, 3 of the window
    # and the one with both
    assert int(every.sum()) == 32 * 33 // 2
    assert int(compact.sum()) <= sum(n // 8 + 1 for n in range(32)) + 32 * 4


def test_no_value_is_read_on_the_host() -> None:
    """Building lists and the block mask; FlexAttention itself stands for what a GPU runs."""

    def stand_in(q: Tensor, k: Tensor, v: Tensor, **_more: Any) -> tuple[Tensor, Tensor]:
        summed = (k + v).sum(2, keepdim=True).repeat_interleave(q.shape[1] // k.shape[1], 1)
        return q * summed, q[..., 0].detach()

    for case in (
        AttentionInputs(tokens=20, group=2, bias="some", dtype=torch.float32),
        AttentionInputs(packed=(5, 0, 7), policy="window", dtype=torch.float32),
    ):
        call = case.tensors()
        call = {name: x.requires_grad_() if name in "qkv" else x for name, x in call.items()}

        def step(call: dict[str, Any] = call) -> None:
            out = selected_attention.unchecked(**call, impl="flex-compact").out
            torch.autograd.grad(out, [call[name] for name in "qkv"], torch.ones_like(out))

        with differentiable(), patch.object(block_mask, "_kernel", lambda _: stand_in):
            HostGraph(step)


@given(case=attention_inputs(dtype=torch.float64, bias="none", tokens=st.integers(1, 40)))
@example(case=AttentionInputs(packed=(9, 0, 4, 12), policy="window"))
def test_blocks_leave_out_nothing_visible_and_unmask_nothing_hidden(case: AttentionInputs) -> None:
    call = case.tensors()
    if not call["q"].numel() or not call["k"].numel():
        return
    time = time_of(call)
    mask = visible(call).permute(0, 3, 1, 2)
    position, evict_at = (x.transpose(1, 2) for x in (time.position, time.evict_at))
    with patch.object(block_mask, "BLOCK", 4):
        some, whole = block_mask.visited(time.asked, position, evict_at)
    for n, m in ((n, m) for n in range(some.shape[2]) for m in range(some.shape[3])):
        tile = mask[:, :, 4 * n : 4 * n + 4, 4 * m : 4 * m + 4].flatten(2)
        assert bool((some[:, :, n, m] | ~tile.any(2)).all())
        assert bool((~whole[:, :, n, m] | tile.all(2)).all())
    assert torch.equal(block_mask.seen_at_all(time), mask.any(2).transpose(1, 2))
    assert torch.equal(block_mask.sees_at_all(time, 1), mask.any(3).transpose(1, 2))


@pytest.mark.slow
@both
def test_traces_whole(impl: str) -> None:
    call = AttentionInputs(tokens=20, group=2, bias="some", dtype=torch.float32).tensors()

    def run() -> Tensor:
        with torch.no_grad():
            return selected_attention(**call, impl=impl).out

    traced = torch.compile(run, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(traced, run())


def test_reasons() -> None:
    call = AttentionInputs(dtype=torch.float32).tensors()
    answers = explain(selected_attention, **call)
    assert answers["flex"] == (
        WHEN_NAMED + "it is the baseline: it visits keys that are not stored"
    )
    assert answers["flex-compact"] == (
        WHEN_NAMED + "it is not measured to be faster than the implementations before it; it runs "
        "FlexAttention's own kernels and not those of FlashAttention-4: they have no kernel for "
        "tensors on cpu"
    )
    call["k"].requires_grad_()
    for impl in NAMES:
        answer = explain(selected_attention, **call)[impl]
        assert answer == "FlexAttention has no backward on a CPU"
        with pytest.raises(UnsupportedError, match="no backward on a CPU"):
            selected_attention(**call, impl=impl)
        with torch.no_grad():
            assert bool(selected_attention(**call, impl=impl).out.isfinite().all())
        with patch.object(torch, "__version__", "2.8.1+cpu"):
            assert explain(selected_attention, **call)[impl].endswith("this is 2.8.1+cpu")


class Elsewhere(NamedTuple):
    """What is asked of a tensor on a GPU."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    requires_grad: bool = True


class Asked(NamedTuple):
    """What is asked of a call."""

    q: Elsewhere
    logit_bias: Elsewhere | None = None


def test_reasons_against_flash_attention_4(request: pytest.FixtureRequest) -> None:
    cuda = torch.device("cuda")

    def reason(
        dtype: torch.dtype = torch.bfloat16,
        dim: int = 64,
        bias: bool = False,
        capability: tuple[int, int] = (9, 0),
        packages: tuple[str, ...] = ("flash_attn", "flash_attn.cute"),
    ) -> str | None:
        call = Asked(
            Elsewhere(cuda, dtype, (1, 9, 2, dim)),
            Elsewhere(cuda, torch.float32, (1, 9, 2)) if bias else None,
        )
        with (
            patch.object(flex_compact, "installed", lambda name: name in packages),
            patch.object(flex_compact, "_capability", lambda _: capability),
            patch.object(torch, "__version__", "2.13.0"),
        ):
            found = flex_compact.without_flash_4(call)  # type: ignore[arg-type]
            passed = flex_compact.passed_over(call)  # type: ignore[arg-type]
        assert passed.endswith(found or "it runs the kernels of FlashAttention-4")
        return found

    assert "not deterministic" in str(reason())  # as all tests run
    torch.use_deterministic_algorithms(False)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(True))
    assert reason() is None
    for packages in ((), ("flash_attn",)):
        assert reason(packages=packages) == "flash-attn-4 is not installed"
    assert reason(dtype=torch.float32) == "they take bfloat16 and float16, not float32"
    assert "up to 128, not 256" in str(reason(dim=256))
    assert "up to 128, not 68" in str(reason(dim=68))
    assert "9.0" in str(reason(capability=(8, 0)))
    assert reason(bias=True) == "they have no gradient of logit_bias"
    with torch.no_grad():
        assert reason(bias=True) is None


@pytest.mark.parametrize("allowed", [True, False])
def test_flash_attention_4_is_asked_for_where_it_can_run(allowed: bool) -> None:
    asked: list[Any] = []

    def stand_in(q: Tensor, *_args: Any, kernel_options: Any, **_more: Any) -> Any:
        asked.append(kernel_options)
        return q, q[..., 0]

    call = AttentionInputs(tokens=9, dtype=torch.float32).tensors()
    with (
        patch.object(block_mask, "_kernel", lambda _: stand_in),
        patch.object(flex_compact, "without_flash_4", lambda _: None if allowed else "no"),
    ):
        for impl in NAMES:
            selected_attention(**call, impl=impl)
    assert asked == [None, {"BACKEND": "FLASH"} if allowed else None]
