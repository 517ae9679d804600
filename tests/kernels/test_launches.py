"""What ops launch, with kernels that only take note: sizes of grids, and the number of launches.

Nothing is computed: tensors are on the device "meta", which has no memory, so sizes may be those of
a large GPU and reading a value on the host is an error.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from every_kernel import every_kernel, named
from launched import noted, own
from torch import Tensor

from hamblocks_ops import selected_attention

BF16, INT32 = torch.bfloat16, torch.int32
MAX_X, MAX_Y = 2**31 - 1, 65535
"""Most programs in the first dimension of a grid, and in each other one."""


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(
    batch: int, tokens: int, heads: int, *, packed: bool = False, bias: bool = False
) -> tuple[Any, ...]:
    """The arguments of the operator of selected attention, as the op itself makes them."""
    x = meta(batch, tokens, heads, 16)
    more: dict[str, Tensor] = {}
    if packed:  # as a layer, which counts the positions of packed tokens once for all its calls
        position = meta(batch, tokens, dtype=INT32)
        more = {"query_position": position, "key_position": position}
        more["cu_seqlens"] = meta(9, dtype=INT32)
    if bias:
        more["logit_bias"] = meta(batch, tokens, heads, dtype=torch.float32)
    evict_at = meta(batch, tokens, heads, dtype=INT32)
    return tuple(selected_attention.call_of(x, x, x, evict_at, **more))


def run_attention(arguments: tuple[Any, ...]) -> None:
    """Forward and backward."""
    triton = import_module("hamblocks_ops.selected_attention.triton")
    q, k, _, _, bias, *_, scale = arguments
    out, *kept = own(triton.attend)(*arguments, True)
    own(triton.attend_backward)(out, q, k, bias, *kept, scale)


def run_pages(sequences: int, heads: int) -> None:
    triton = import_module("hamblocks_ops.paged_attention.triton")
    page, times = meta(8, 16, 1, 16), meta(8, 16, dtype=INT32)
    table, asked = meta(sequences, heads, 40, dtype=INT32), meta(sequences, 1, dtype=INT32)
    q = meta(sequences, 1, heads, 16)
    own(triton.attend)(q, [page], [page], [times], [times], [], table, asked, 1.0)


def run_rows(batch: int, heads: int) -> None:
    triton = import_module("hamblocks_ops.surprise.triton")
    x = meta(batch, 1, heads, 16)
    score = own(triton.score)(x, x, "cosine")
    own(triton.score_backward)(score, x, x, "cosine")


def run_delta(batch: int, heads: int) -> None:
    triton = import_module("hamblocks_ops.gated_delta_rule.triton.residual")
    x, beta = meta(batch, 1, heads, 16), meta(batch, 1, heads, dtype=torch.float32)
    triton.residual_and_score(x, beta, x, 2.0**-64, x, beta, "cosine")
    triton.beta_grad(x, meta(batch, 1, heads, 16, 16), beta, beta, x, x, x, 2.0**-64, None)
    steps = import_module("hamblocks_ops.gated_delta_rule.triton").steps
    state = meta(batch, heads, 16, 16, dtype=torch.float32)
    own(steps)(x, x, x, beta, beta, state, None, 1.0, False, "cosine")


def run_decode(batch: int, heads: int) -> None:
    decode = import_module("hamblocks_ops.decode")
    kernels = import_module("hamblocks_ops.decode.triton")
    x, logits = meta(batch, 1, heads, 16), meta(batch, 1, heads)
    conv = decode.Convolution(meta(heads * 16, 4), meta(batch, 3, heads * 16))
    kernels.launch_heads(x, [decode.Heads(x, channel=0)] * 3, conv, None)
    kernels.launch_decay(logits, logits[0, 0], logits[0, 0], logits, 1.0)
    slots = meta(batch, 5, heads, dtype=INT32)
    kernels.launch_compete(logits, slots[:, :1], slots, meta(batch, 5, heads))
    kernels.launch_mix(x, x, (None, None), meta(batch, 2 * heads), 1e-6)


def run_append(sequences: int, heads: int) -> None:
    append = import_module("hamblocks_ops.append")
    launch = import_module("hamblocks_ops.append.triton").launch
    streams, slab = sequences * heads, meta(9, 16, 1, 16)
    table, users, of_stream = (meta(*s, dtype=INT32) for s in ((streams, 40), (10,), (streams,)))
    times, seen = meta(10, 16, dtype=INT32), meta(sequences, dtype=INT32)
    most = meta(streams, dtype=torch.int64)
    paged = append.Paged(table, users, times, times, None, [(slab, slab)], seen, most, 39)
    x = meta(streams, 1, 16)
    launch(table, paged, x, x, of_stream, of_stream, None, seen, None)
    listed = meta(sequences, 5, heads, dtype=INT32)
    kernels = import_module("hamblocks_ops.append.triton")
    until = kernels.launch_lower(table, times, times, seen, listed, listed, 39)
    kernels.launch_show(table, until, times, 39)


def test_grids_hold_4096_sequences_of_64_heads() -> None:
    batch, heads = 4096, 64
    with noted() as launches:
        run_attention(attention(batch, 2, heads, bias=True))
        run_attention(attention(1, batch * 8, heads, packed=True))
        run_pages(batch, heads)
        run_rows(batch, heads)
        run_delta(batch, heads)
        run_append(batch, heads)
        run_decode(batch, heads)
        lifetimes = meta(batch, 2, heads, dtype=INT32)
        own(import_module("hamblocks_ops.compact.triton").lists)(lifetimes, lifetimes, 2)
    defined = {named(kernel) for kernel in every_kernel()}
    assert set(launches.grids) == defined, "a kernel that no call of this test launches"
    for name, grids in launches.grids.items():
        for grid in grids:
            first, *others = grid
            assert 0 < first <= MAX_X, f"{name} {grid}"
            assert all(0 < size <= MAX_Y for size in others), f"{name} {grid}"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_launches_of_a_training_step(packed: bool, bias: bool) -> None:
    """At most 8 launches before the forward kernel; none beside the kernels of the backward."""
    with noted() as launches:
        arguments = attention(1, 1024, 4, packed=packed, bias=bias)
        making = len(launches.names)
        run_attention(arguments)
    names = launches.names
    forward = names.index("selected_attention forward_kernel")
    assert forward <= (6 if not bias else 9), names
    assert forward - making <= (6 if packed else 5), names
    assert names[forward + 1 :] == [
        "selected_attention queries_grad_kernel",
        "selected_attention keys_grad_kernel",
    ]
