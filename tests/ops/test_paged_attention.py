from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hamblocks.testing import (
    PagedInputs,
    Problem,
    assert_close,
    assert_close_to_reference,
    paged_inputs,
    seeds,
)
from hamblocks.testing.inputs.paged import DTYPES, INF, LAST, NAN, paged, slabs_of
from hamblocks_ops import (
    NEVER,
    PageMemo,
    Pages,
    UnsupportedError,
    explain,
    implementations,
    paged_attention,
    selected_attention,
    unpage,
)

op = import_module("hamblocks_ops.paged_attention")
layout = import_module("hamblocks_ops.paged_attention.layout")
pages = import_module("hamblocks_ops.paged_attention.pages")
IMPLS = ("reference", "pages")


def problem(case: PagedInputs, **options: object) -> Problem:
    return Problem(paged, case.tensors(), options)


def split(case: PagedInputs) -> tuple[Tensor, list[Pages], Tensor, Tensor]:
    """q, slabs, block_table, query_position."""
    fields = case.tensors()
    q, table, asks = (fields.pop(name) for name in ("q", "block_table", "query_position"))
    return q, slabs_of(fields), table, asks


IN_PLACE, LISTED, ALL = "in place", "gathered as listed", "gathered without a look"


@contextmanager
def path(way: str) -> Iterator[dict[str, object]]:
    """Forces a path and yields the options for it."""

    def wrong(*_args: object, **_kwargs: object) -> None:
        raise AssertionError(f"not {way}")

    with (
        patch.object(pages, "MAX_PAGES_PER_ENTRY", 0 if way == ALL else 10**6),
        ExitStack() as stack,
    ):
        stack.enter_context(
            patch.object(pages, "_gathered" if way == IN_PLACE else "_lying", wrong)
        )
        yield {"shared": way == LISTED}


@contextmanager
def arithmetic_of_other_devices() -> Iterator[None]:
    """Has `pages` take the branch that it takes for tensors that are not on the CPU."""

    class Elsewhere(Tensor):
        device = torch.device("meta")

    def attend(*args: Any) -> tuple[Tensor, ...]:
        moved = [x.as_subclass(Elsewhere) if isinstance(x, Tensor) else x for x in args]
        return tuple(x.as_subclass(Tensor) for x in real(*moved))

    real = pages.attend
    with (
        patch.object(pages, "attend", attend),
        patch.object(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None),
    ):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", [IN_PLACE, LISTED, ALL])
@given(data=st.data())
def test_every_path_is_the_reference(way: str, dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(
        paged_inputs(dtype=dtype, forked=st.just(False) if way != LISTED else st.booleans())
    )
    with path(way) as options:
        assert_close_to_reference(problem(case, **options), "pages")


@given(case=paged_inputs())
@example(case=PagedInputs(queries=4, group=2, bias="hidden"))
def test_arithmetic_of_other_devices_is_the_reference(case: PagedInputs) -> None:
    with arithmetic_of_other_devices():
        assert_close_to_reference(problem(case), "pages")


@given(case=paged_inputs(forked=st.just(False)))
@example(case=PagedInputs(slabs=((5, 2), (9, 1)), queries=1, group=2, together=2))
def test_a_memo_changes_no_bit(case: PagedInputs) -> None:
    """Calls with one page table and other keys, values, lifetimes and queries each time."""
    q, slabs, table, asks = split(case)
    memo = PageMemo()
    for turn in range(3):
        now = [
            slab._replace(
                k=slab.k + turn, v=slab.v * (turn + 1), evict_at=(slab.evict_at - turn).clamp(min=0)
            )
            for slab in slabs
        ]
        args = (q * (turn + 1), now[:-1] + slabs[-1:] if turn == 2 else now, table)
        named = {"query_position": asks, "shared": False, "impl": "pages"}
        expected = paged_attention(*args, **named)
        for got, same in zip(paged_attention(*args, memo=memo, **named), expected, strict=True):
            assert torch.equal(got, same)


@given(case=paged_inputs(queries=st.integers(0, 3), dtype=torch.float64))
def test_reference_is_softmax_over_what_is_visible(case: PagedInputs) -> None:
    """Against one softmax per query over a list of visible slots."""
    q, slabs, table, asks = split(case)
    every = [(slab, page) for slab in slabs for page in range(len(slab.k))]
    result = paged_attention(q, slabs, table, query_position=asks, scale=0.7, impl="reference")
    for n, i, head in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        row, w = divmod(head // case.group, case.together)
        t, logits, values = int(asks[n, i]), [], [q.new_zeros(0, case.dim)]
        for slab, page in (every[entry] for entry in table[n, row].tolist() if entry >= 0):
            for slot in range(slab.k.shape[1]):
                bias = 0.0 if slab.logit_bias is None else float(slab.logit_bias[page, slot])
                if (
                    t >= 0
                    and slab.position[page, slot] <= t < slab.evict_at[page, slot]
                    and bias > -INF
                ):
                    logits.append(0.7 * q[n, i, head] @ slab.k[page, slot, w] + bias)
                    values.append(slab.v[page, slot, w][None])
        found = torch.stack(logits) if logits else q.new_zeros(0)
        lse = found.logsumexp(0) if logits else q.new_tensor(-INF)
        assert torch.allclose(result.lse[n, i, head], lse, rtol=1e-12, atol=1e-12)
        assert torch.allclose(
            result.out[n, i, head], found.softmax(0) @ torch.cat(values), rtol=1e-12, atol=1e-12
        )


@given(case=paged_inputs(garbage=st.sampled_from([None, NAN])))
def test_reference_is_selected_attention_over_unpaged_keys(case: PagedInputs) -> None:
    assume(
        case.slabs and case.bias != "hidden"
    )  # a bias that is garbage there is one that hides here
    q, slabs, table, asks = split(case if case.garbage is None else replace(case, bias="none"))
    rows = unpage(slabs, table)
    position, evict_at, bias = (
        None if x is None else x.repeat_interleave(case.together, 2) for x in rows[2:]
    )
    expected = selected_attention(
        q,
        rows.k,
        rows.v,
        evict_at.masked_fill((asks < 0).all(1)[:, None, None], 0),
        logit_bias=bias,
        query_position=torch.where(asks < 0, NEVER, asks),
        key_position=position,
        impl="reference",
    )
    for got, same in zip(
        paged_attention(q, slabs, table, query_position=asks, impl="reference"),
        expected,
        strict=True,
    ):
        assert torch.equal(got, same)


@given(case=paged_inputs(garbage=None))
@example(case=PagedInputs(slabs=((5, 2), (9, 4)), together=2, bias="some", garbage=None))
def test_unpage_lists_the_pages_of_every_row(case: PagedInputs) -> None:
    assume(case.slabs)
    _, slabs, table, _ = split(case)
    size = max(slab.k.shape[1] for slab in slabs)
    every = [(slab, page) for slab in slabs for page in range(len(slab.k))]
    rows = unpage(slabs, table)
    slots = case.width * size
    assert (
        rows.k.shape == rows.v.shape == (case.sequences, slots, case.rows * case.together, case.dim)
    )
    assert rows.position.shape == rows.evict_at.shape == (case.sequences, slots, case.rows)
    assert rows.position.dtype == rows.evict_at.dtype == torch.int32
    missing = Pages(*(torch.zeros(()) for _ in range(5)))._replace(position=torch.tensor(NEVER))
    for n, h, m in torch.cartesian_prod(*(torch.arange(x) for x in table.shape)).tolist():
        slab, page = every[int(table[n, h, m])] if table[n, h, m] >= 0 else (None, 0)
        for slot in range(size):
            there = slab is not None and slot < slab.k.shape[1]
            heads = slice(h * case.together, (h + 1) * case.together)
            for name, whole in rows._asdict().items():
                if whole is not None:
                    got = whole[n, m * size + slot, heads if name in "kv" else h]
                    expected = getattr(slab, name)[page, slot] if there else getattr(missing, name)
                    assert bool((got == expected).all()), name
    assert (rows.logit_bias is None) == (case.bias == "none")


@pytest.mark.parametrize("impl", IMPLS)
def test_int64_lifetimes_beyond_int32_do_not_wrap_around(impl: str) -> None:
    q, slabs, table, asks = split(PagedInputs(dtype=torch.float32))
    ends = [slab.evict_at.long() for slab in slabs]
    far = [x.masked_fill(x == NEVER, torch.iinfo(torch.int64).max) for x in ends]
    assert any(bool((x == NEVER).any()) for x in ends)
    given = [slab._replace(evict_at=x) for slab, x in zip(slabs, far, strict=True)]
    got = paged_attention(q, given, table, query_position=asks, impl=impl)
    wanted = paged_attention(q, slabs, table, query_position=asks, impl=impl)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("impl", IMPLS)
@given(case=paged_inputs(policy="all", queries=2, garbage=None))
def test_padding_queries_see_nothing(impl: str, case: PagedInputs) -> None:
    q, slabs, table, asks = split(case)
    early = [
        slab._replace(position=slab.position - LAST - 1) for slab in slabs
    ]  # also before position 0
    asks = asks.clone()
    asks[:, 1:] = -1
    got = paged_attention(q, early, table, query_position=asks, impl=impl)
    assert bool((got.lse[:, 1:] == -INF).all())
    assert not bool(got.out[:, 1:].any())


@pytest.mark.parametrize("way", [IN_PLACE, LISTED, ALL, "reference"])
@given(case=paged_inputs(forked=False), garbage=st.sampled_from([NAN, INF, -INF, 6e4]))
@example(case=PagedInputs(queries=4, slabs=((40, 3),)), garbage=NAN)
def test_what_no_query_sees_does_not_leak(way: str, case: PagedInputs, garbage: float) -> None:
    clean, poisoned = (problem(replace(case, garbage=x)) for x in (None, garbage))
    with path(way) as options:
        impl = "reference" if way == "reference" else "pages"
        clean.options = poisoned.options = options
        expected = clean.run(impl)
        for name, x in poisoned.run(impl).items():
            assert torch.equal(x, expected[name]), name


@given(
    case=paged_inputs(garbage=NAN, queries=1, dtype=torch.float64), nan=st.sampled_from([NAN, INF])
)
@example(case=PagedInputs(garbage=NAN, policy="all", sequences=3), nan=NAN)
def test_a_sequence_that_is_not_finite_leaves_the_others_alone(
    case: PagedInputs, nan: float
) -> None:
    assume(case.sequences > 0)
    q, slabs, table, asks = split(case)
    before = paged_attention(q, slabs, table, query_position=asks)
    q = q.clone()
    q[0] = nan
    after = paged_attention(q, slabs, table, query_position=asks)
    for got, expected in zip(after, before, strict=True):
        assert torch.equal(got[1:], expected[1:])


@contextmanager
def watched() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """k and v of every call of SDPA."""
    seen, attend = [], pages.attend

    def watching(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        seen.append((k, v))
        return attend(q, k, v, *rest)

    with patch.object(pages, "attend", watching):
        yield seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bias", ["none", "some"])
@pytest.mark.parametrize("garbage", [NAN, INF])
def test_pages_are_read_once_where_they_lie(dtype: torch.dtype, bias: str, garbage: float) -> None:
    """Unlisted pages may be anything: nothing is copied, cleaned or read again for them."""
    case = PagedInputs(
        slabs=((9, 4), (20, 2)), dtype=dtype, bias=bias, queries=2, policy="all", garbage=None
    )
    q, slabs, table, asks = split(case)
    for begin, slab in ((0, slabs[0]), (9, slabs[1])):
        for page in set(range(len(slab.k))) - set((table - begin).flatten().tolist()):
            slab.k[page] = slab.v[page] = garbage
    with watched() as seen:
        paged_attention(q, slabs, table, query_position=asks.clamp(min=0))
    seen.reverse()  # small pages come first
    assert [(k.data_ptr(), v.data_ptr()) for k, v in seen] == [
        (x.k.data_ptr(), x.v.data_ptr()) for x in slabs
    ]
    last = [
        int(table[(table >= begin) & (table < end)].max()) - begin
        for begin, end in ((0, 9), (9, 29))
    ]
    assert [len(k) for k, _ in seen] == [
        page + 1 for page in last
    ]  # and none behind the last that is listed


def test_only_slabs_with_a_page_that_is_listed_twice_are_gathered() -> None:
    q, slabs, table, asks = split(
        PagedInputs(slabs=((12, 4), (12, 4)), sequences=2, rows=1, width=4, garbage=None)
    )
    table[:] = torch.tensor([[[3, 12, 14, -1]], [[5, 3, 13, 20]]])
    with watched() as seen:
        got = paged_attention(q, slabs, table, query_position=asks)
    assert [len(k) for k, _ in seen] == [3, 9]
    assert seen[1][0].data_ptr() == slabs[1].k.data_ptr()
    expected = paged_attention(q, slabs, table, query_position=asks, impl="reference")
    assert torch.allclose(got.out, expected.out, rtol=1e-12, atol=1e-12)


def test_a_slab_with_many_spare_pages_is_gathered() -> None:
    q, slabs, table, asks = split(PagedInputs(slabs=((12 * 3 + 1, 4),), width=3, garbage=None))
    table[:] = torch.arange(12).view_as(table)
    with watched() as seen:
        for last in (36, 35, 11):  # of 37 pages
            table[1, 1, 2] = last
            paged_attention(q, slabs, table, query_position=asks)
    assert [len(k) for k, _ in seen] == [12, 36, 12]


@given(case=paged_inputs(dtype=torch.float64), seed=seeds)
def test_the_order_of_pages_does_not_matter(case: PagedInputs, seed: int) -> None:
    """Neither in the slabs nor in the table, nor how they are shared out among slabs."""
    assume(len({size for _, size in case.slabs}) == 1)
    q, slabs, table, asks = split(case)
    generator = torch.Generator().manual_seed(seed)
    whole = [torch.cat(x) if x[0] is not None else None for x in zip(*slabs, strict=True)]
    order = torch.randperm(case.pages, generator=generator)
    cut = seed % (case.pages + 1)
    moved = [
        Pages(*(None if x is None else x[order][own] for x in whole))
        for own in (slice(cut), slice(cut, None))
    ]
    new = torch.cat([order.argsort(), torch.tensor([-1])])[table.long()]
    new = new.gather(2, torch.rand(new.shape, generator=generator).argsort(2))
    noise = problem(case).noise()
    before, after = (
        paged_attention(q, x, y, query_position=asks) for x, y in ((slabs, table), (moved, new))
    )
    for name in ("out", "lse"):
        assert_close(getattr(after, name), getattr(before, name), name, own=noise[name])


@given(case=paged_inputs(dtype=torch.float64), size=st.integers(1, 11))
def test_the_page_size_does_not_matter(case: PagedInputs, size: int) -> None:
    assume(case.slabs)
    q, slabs, table, asks = split(case)
    rows = unpage(slabs, table)
    more = -rows.k.shape[1] % size
    fields = []
    for x, fill in zip(rows, (NAN, NAN, 0, 0, NAN), strict=True):
        if x is not None:
            x = torch.cat([x, x.new_full((len(x), more, *x.shape[2:]), fill)], 1).unflatten(
                1, (-1, size)
            )
            x = x.unflatten(3, (case.rows, case.together)) if x.dim() == 5 else x
            x = x.movedim(3, 1).flatten(0, 2)
        fields.append(x)
    width = (rows.k.shape[1] + more) // size
    new = torch.arange(case.sequences * case.rows * width).view(case.sequences, case.rows, width)
    before = paged_attention(q, slabs, table, query_position=asks)
    after = paged_attention(q, [Pages(*fields)], new, query_position=asks)
    noise = problem(case).noise()
    for name in ("out", "lse"):
        assert_close(getattr(after, name), getattr(before, name), name, own=noise[name])


class NothingDependsOnValues(TorchDispatchMode):
    """Raises where a shape or the host would come to depend on what a tensor holds."""

    FORBIDDEN = re.compile(
        r"^(_local_scalar_dense|nonzero|masked_select|_?unique|equal|is_nonzero|bincount)"
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        indices = (
            [x for x in args[1] if x is not None]
            if name.startswith(("index.", "index_put", "_index_put"))
            else []
        )
        if self.FORBIDDEN.match(name) or any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            raise AssertionError(f"{func} depends on values")
        return func(*args, **(kwargs or {}))


@contextmanager
def values_that_may_not_be_read() -> Iterator[None]:
    arguments = import_module("hamblocks_ops.arguments")
    with ExitStack() as stack:
        for module in (arguments, op, pages):
            stack.enter_context(patch.object(module, "values_are_checked", lambda _tensor: False))
        yield


@given(case=paged_inputs(forked=False), way=st.sampled_from([IN_PLACE, ALL]))
@example(case=PagedInputs(queries=3, garbage=NAN, bias="hidden"), way=IN_PLACE)
@example(case=PagedInputs(queries=3, garbage=INF), way=ALL)
def test_no_step_depends_on_values(case: PagedInputs, way: str) -> None:
    """As a CUDA graph needs it. Without a look at the result, unseen slots are always cleared."""
    call = problem(case, shared=False)
    expected = call.run("pages")
    with values_that_may_not_be_read(), path(way), NothingDependsOnValues():
        got = call.run("pages", backward=False)
    if way == IN_PLACE:
        assert_close_to_reference(call, "pages")
    for name, x in got.items():
        assert not bool(x.isnan().any()), name
        own = 0 if way == IN_PLACE else 2 * call.noise()[name]
        assert_close(x, expected[name], name, own=own)


def test_no_step_reads_values_of_fake_tensors() -> None:
    call = PagedInputs(queries=3, bias="some").tensors()
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in call.items()}
        assert paged(**fake, impl="pages", shared=False).out.shape == fake["q"].shape


@pytest.mark.parametrize(
    "step",
    [
        Tensor.nonzero,
        Tensor.unique,
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: bool(x.any()),
    ],
)
def test_dependence_on_values_is_noticed(step: Callable[[Tensor], object]) -> None:
    with pytest.raises(AssertionError, match="depends on values"), NothingDependsOnValues():
        step(torch.ones(3))


@pytest.mark.parametrize("name", ["q", "k1", "v0", "logit_bias1"])
def test_there_is_no_gradient(name: str) -> None:
    fields = PagedInputs(bias="some").tensors()
    fields[name].requires_grad_()
    q, table, asks = (fields.pop(key) for key in ("q", "block_table", "query_position"))
    slabs = slabs_of(fields)
    with pytest.raises(
        ValueError, match=r"^q: expected no gradient.*, got grad required by (q|slabs\[\d\]\.\w+)$"
    ):
        paged_attention(q, slabs, table, query_position=asks)
    with torch.no_grad():
        assert not paged_attention(q, slabs, table, query_position=asks).out.requires_grad


def test_explain_and_impl() -> None:
    q, slabs, table, asks = split(PagedInputs(queries=2))
    explanation = explain(paged_attention, q, slabs, table, query_position=asks)
    assert list(explanation) == ["triton", "pages", "reference"]
    assert explanation["triton"] == "it computes in float32 at the most"
    assert explanation["pages"] == explanation["reference"] == "yes"
    assert explanation.chosen == "pages"
    auto, named = (
        paged_attention(q, slabs, table, query_position=asks, impl=impl)
        for impl in ("auto", "pages")
    )
    assert torch.equal(auto.out, named.out)
    with pytest.raises(
        ValueError,
        match=r"^impl: expected 'auto' or one of 'triton', 'pages', 'reference'.*got 'quick'",
    ):
        paged_attention(q, slabs, table, query_position=asks, impl="quick")
    with pytest.raises(
        ValueError, match=r"^impl: expected the name of an implementation.*, got NoneType"
    ):
        paged_attention(q, slabs, table, query_position=asks, impl=None)
    with pytest.raises(ValueError, match=r"^q: "):
        explain(paged_attention, q[0], slabs, table, query_position=asks)
    refusing = tuple(
        replace(row, refuses=lambda _call: "not here") for row in paged_attention.table
    )
    with (
        patch.object(paged_attention, "table", refusing),
        pytest.raises(UnsupportedError, match="pages: not here"),
    ):
        paged_attention(q, slabs, table, query_position=asks)
    everything = inspect.signature(paged_attention).bind(q, slabs, table, query_position=asks)
    everything.apply_defaults()
    explanation = explain(paged_attention, *everything.args, **everything.kwargs)
    assert tuple(explanation) == implementations(paged_attention)
