"""benchmarks/measuring/estimates/: what it counts is what kernels do, and laws of its numbers."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hamblocks_ops import select_topk, select_window, selected_attention

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """The folder of the benchmarks, as when one of its scripts runs."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def lifetimes(policy, tokens, heads, seed):
    from measuring.attend import scattered

    torch.manual_seed(seed)
    score = torch.rand(1, tokens, heads)
    window, topk = select_window(score, tokens // 4), select_topk(score, tokens // 8)
    return {
        "a third": scattered(1 / 3, tokens, heads, "cpu"),
        "all": scattered(1.0, tokens, heads, "cpu"),
        "none": scattered(0.0, tokens, heads, "cpu"),
        "window": window,
        "topk": topk,
        "either": torch.maximum(select_window(score, 3), topk),
    }[policy]


POLICIES = "a third", "all", "none", "window", "topk", "either"


def planned(evict_at, configs, group, cu_seqlens):
    """Tiles without and with a mask of every program, by the plans that the kernels walk."""
    stored = import_module("hamblocks_ops.selected_attention.triton.stored")
    tokens, heads = evict_at.shape[1:]
    q, k = torch.zeros(1, tokens, group * heads, 16), torch.zeros(1, tokens, heads, 16)
    call = selected_attention.call_of(q, k, k, evict_at, cu_seqlens=cu_seqlens)
    plans = stored.store_keys(stored.AttentionCall(*call), configs, keep=True).plans
    *of_queries, of_keys = stored.Sizes.of(q, k, configs, keep=True).split(plans)
    found = []
    for plan, config in zip(of_queries, configs, strict=False):
        rows = plan.view(heads, -(-tokens // config.queries), stored.FIELDS.value).tolist()
        # as the programs of each query head take them
        own = [row for rows_of_head in rows for _ in range(group) for row in reversed(rows_of_head)]
        whole = [row[1] - row[0] for row in own]
        ends = [row[4 : 4 + 2 * row[2]] for row in own]
        found.append((whole, [sum(x[1::2]) - sum(x[::2]) for x in ends]))
    # the first blocks of all lists first
    rows = of_keys.view(heads, -1, stored.KEY_FIELDS.value).transpose(0, 1).flatten(0, 1).tolist()
    whole = [group * (row[2] - row[1]) for row in rows]
    found.append(
        (whole, [group * (row[3] - row[0]) - x for row, x in zip(rows, whole, strict=True)])
    )
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("packed", [False, True])
def test_tiles_are_those_that_the_kernels_visit(policy, packed):
    from measuring.visits import visits

    config = import_module("hamblocks_ops.selected_attention.triton.sizes").Config
    configs = config(32, 16, 4, 1), config(16, 16, 4, 1), config(16, 32, 4, 1)
    own = lifetimes(policy, 90, 2, seed=0)
    evict_at, cu_seqlens, until = own, None, None
    if packed:
        cu_seqlens = torch.tensor([0, 25, 90], dtype=torch.int32)
        begin = torch.tensor([0, 25]).repeat_interleave(cu_seqlens.diff())[None, :, None]
        until = cu_seqlens[1:].repeat_interleave(cu_seqlens.diff())[None, :, None]
        # within its sequence, and over the whole batch row
        lived = own.long() - torch.arange(90)[None, :, None]
        own = (torch.arange(90)[None, :, None] - begin + lived).clamp(max=2**31 - 1).int()
        evict_at = torch.minimum(own.long() + begin, until.long()).int()
    found = visits(evict_at, configs, group=2, keep=True, until=until)
    exact = planned(own, configs, 2, cu_seqlens)
    assert [(x.whole.tolist(), x.masked.tolist()) for x in found] == exact
    assert (found[0].tiles > 0) == (policy != "none")


sizes = st.tuples(st.integers(1, 3000), st.sampled_from([1, 4]), st.sampled_from([32, 64, 128]))


@given(sizes, st.sampled_from(POLICIES), st.booleans(), st.integers(0, 9))
def test_no_estimate_lies_below_its_floor(size, policy, learns, seed):
    from measuring import chips, estimates

    tokens, group, dim = size
    evict_at = lifetimes(policy, tokens, 2, seed)
    for chip in chips.CHIPS:
        for case in ("triton", "flash", "cudnn", "flash-3", "flex", "flex-compact"):
            one = estimates.of_case(case, chip, evict_at, 2 * group, dim, learns=learns)
            assert all(part.seconds >= part.floor for part in (one, *one.parts)), case
        given = {"residual": learns, "score": True, "learns": learns}
        one = estimates.delta_rule(chip, tokens, group, dim, **given)
        assert all(part.seconds >= part.floor for part in (one, *one.parts))
        for graphed in (False, True):
            one = estimates.decode(chip, tokens, 2, 64, group, dim, graphed=graphed)
            assert one.seconds >= one.floor
            assert all(part.seconds >= part.floor for part in one.parts)
    assert estimates.of_case("gather", chip, evict_at, 2 * group, dim, learns=learns) is None


@given(st.integers(0, 9), st.booleans())
def test_estimates_grow_with_what_is_stored_and_with_length(seed, learns):
    from measuring import chips, estimates
    from measuring.attend import scattered

    def took(tokens, fraction):
        torch.manual_seed(seed)  # what a smaller fraction stores, a larger one stores too
        evict_at = scattered(fraction, tokens, 2, "cpu")
        return estimates.attention(chips.H100, evict_at, 2, 128, learns=learns).seconds

    times = {(n, f): took(n, f) for n in (1024, 4096, 16384) for f in (0.1, 0.4, 1.0)}
    for n in (1024, 4096, 16384):
        assert times[n, 0.1] < times[n, 0.4] < times[n, 1.0]
    for f in (0.1, 0.4, 1.0):
        assert times[1024, f] < times[4096, f] < times[16384, f]
    tokens = [
        estimates.decode(chips.H100, stored, 8, 2048, 16, 128, graphed=True).seconds
        for stored in (1024, 8192, 131072)
    ]
    assert tokens == sorted(tokens)


def test_kernels_by_hand():
    from measuring.chips import H100
    from measuring.estimates import kernel, together

    # 3.35 TB/s, of which a copy reaches 0.9
    one = kernel("copy", H100, moved=1e6)
    assert (one.bound, one.seconds) == ("latency", pytest.approx(0.9e-6 + 1e-6))
    two = kernel("copy", H100, moved=3.015e9)
    assert (two.bound, two.seconds) == ("memory", pytest.approx(0.9e-6 + 1e-3))
    assert two.floor == pytest.approx(1e-3)
    three = kernel("product", H100, tensor_cores=2e-3, last=2.2e-3)
    assert (three.bound, three.seconds) == ("tensor cores", pytest.approx(2.2e-3 + 0.9e-6))
    four = kernel("product", H100, tensor_cores=2e-3, last=3e-3)
    assert (four.bound, four.seconds) == ("uneven programs", pytest.approx(3e-3 + 0.9e-6))
    assert kernel("many", H100, launches=9, accesses=1).bound == "launches"
    both = together("both", [two, four], 1e-3)
    assert (both.launches, both.bound) == (2, "uneven programs")
    assert both.seconds == two.seconds + four.seconds


def test_the_last_program_ends_by_hand():
    from measuring.estimates import makespan

    assert makespan([], 2) == 0
    assert makespan([3, 1, 1, 1], 2) == 3
    assert makespan([1, 1, 1, 3], 2) == 4
    assert makespan([1, 2], 9) == 2


def test_blocks_at_once_are_those_of_the_compiled_table():
    from measuring.chips import H100
    from measuring.estimates import blocks_at_once

    table = import_module("hamblocks_ops.selected_attention.triton.sizes")
    forward, of_queries, of_keys = table.SM90[128]
    assert blocks_at_once(H100, "forward", 128, forward) == 1
    assert blocks_at_once(H100, "queries_grad", 128, of_queries) == 2
    assert blocks_at_once(H100, "keys_grad", 128, of_keys) == 1
    # not listed: what its warps leave room for
    assert blocks_at_once(H100, "forward", 128, table.Config(64, 32, 4, 2)) == 2


def test_a_pool_grows_by_the_slabs_that_estimates_expect():
    from measuring.estimates import slabs_of

    from hamblocks.cache.pool import Pool

    pages, pieces = 40, 12
    pool = Pool(4, 1, 2, torch.zeros(1), logit_bias=False, max_pages=None)
    for piece in range(1, pieces + 1):
        pool.ensure(pages)
        pool.users[: piece * pages] = 1
    assert [len(k) - 1 for k, _ in pool.keys] == slabs_of(pieces, pages)


def test_launches_of_a_token_are_those_of_the_docs():
    from measuring.chips import H100
    from measuring.estimates import DECODE_LAUNCHES, decode

    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.*)` \| (\d+) \| \d+ \|$", text, re.MULTILINE)
    # without the arguments of the selectors
    plain = {re.sub(r"\([^|]*\)", "", name): int(n) for name, n in rows}
    assert plain == DECODE_LAUNCHES
    for launches in DECODE_LAUNCHES.values():
        for slabs in ((1.0,), (0.5, 0.5)):
            token = decode(H100, 64, 1, 64, 1, 64, graphed=True, slabs=slabs, launches=launches)
            assert token.launches == launches + 2 * (len(slabs) - 1)


def test_ops_of_torch_in_a_layer_are_counted():
    from measuring.counts import passes_of_a_layer
    from measuring.estimates import ELEMENTWISE

    for (ops, passes), (counted, units) in zip(
        ELEMENTWISE.values(), passes_of_a_layer(), strict=True
    ):
        assert counted == pytest.approx(ops, rel=0.05)
        assert units == pytest.approx(passes, rel=0.05)


def test_only_chips_with_public_times_have_estimates():
    from measuring.chips import H100, H200, chip_named, chip_of

    assert chip_named("NVIDIA H100 80GB HBM3") == H100
    assert chip_named("NVIDIA H200") == H200
    others = "A100-SXM4-80GB", "H100 PCIe", "H100 NVL", "H200 NVL", "GH200 480GB"
    assert [chip_named(f"NVIDIA {name}") for name in others] == [None] * len(others)
    assert chip_of("cpu") is None


@pytest.mark.slow
def test_the_docs_hold_the_tables_of_the_command():
    import estimate

    page = (ROOT / "docs" / "estimates.md").read_text(encoding="utf-8")
    same = estimate.written(page, estimate.tables()) == page
    assert same, "write them: PYTHONPATH=.:ops python benchmarks/estimate.py --write"


def test_tables_are_written_into_the_page():
    import estimate

    page = "# A\n\n| a | b |\n| 1 |\n\ntext\n\n| c |\n| 2 |\n"
    assert estimate.written(page, ["| a | b |\n| 3 |\n| 4 |", "| c |\n| 5 |"]) == (
        "# A\n\n| a | b |\n| 3 |\n| 4 |\n\ntext\n\n| c |\n| 5 |\n"
    )
