"""When queries ask and keys are stored, on one clock: what the kernels that make lists compute first.

The positions of an unpacked batch row are a clock already. Packed sequences are put on one clock:
the time of a sequence begins where that of the one before it ended, and what a sequence stores is
evicted at its end. One list then serves the whole batch row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hamblocks_ops.packing import NEVER

NOT_YET = tl.constexpr(NEVER)
LEAST = tl.constexpr(-NEVER - 1)


@triton.jit
def span_kernel(
    query_position, position, cu_seqlens, spans, q_b, q_t, p_t, p_h, queries, heads, sequences,
    BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The first moment of every sequence, and the moment after its last: spans int64 [2, N].

    A program owns a sequence. Unpacked, these are the moments at which its queries ask; packed, also
    those from which its keys are stored.
    """
    sequence = tl.program_id(0).to(tl.int64)
    if PACKED:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        stop = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        asked = query_position
    else:
        start, stop = sequence * 0, sequence * 0 + queries
        asked = query_position + sequence * q_b
    low, high = tl.full([BLOCK], NOT_YET, tl.int32), tl.full([BLOCK], LEAST, tl.int32)
    for block in range(tl.cdiv(stop - start, BLOCK)):
        token = start + block * BLOCK + tl.arange(0, BLOCK)
        inside = token < stop
        asks = asked + token * q_t
        low = tl.minimum(low, tl.load(asks, mask=inside, other=NOT_YET))
        high = tl.maximum(high, tl.load(asks, mask=inside, other=LEAST))
        if PACKED:
            for head in range(heads):
                begins = position + token * p_t + head * p_h
                low = tl.minimum(low, tl.load(begins, mask=inside, other=NOT_YET))
                high = tl.maximum(high, tl.load(begins, mask=inside, other=LEAST))
    # an empty sequence takes no time
    none = stop <= start
    tl.store(spans + sequence, tl.where(none, 0, tl.min(low, 0).to(tl.int64)))
    tl.store(spans + sequences + sequence, tl.where(none, 0, tl.max(high, 0).to(tl.int64) + 1))


@triton.jit
def shift_kernel(spans, shifts, sequences, BLOCK: tl.constexpr):
    """What to add to the times of every packed sequence: shifts int64 [N]; one program."""
    before = tl.full([], 0, tl.int64)
    for block in range(tl.cdiv(sequences, BLOCK)):
        sequence = block * BLOCK + tl.arange(0, BLOCK)
        inside = sequence < sequences
        low = tl.load(spans + sequence, mask=inside, other=0)
        end = tl.load(spans + sequences + sequence, mask=inside, other=0)
        # the running sum of lengths is where the sequence ends on the clock, so sequences neither
        # overlap nor leave a gap
        tl.store(shifts + sequence, before + tl.cumsum(end - low, 0) - end, mask=inside)
        before += tl.sum(end - low, 0)


@triton.jit
def sequence_of(token, cu_seqlens, sequences, steps):
    """The sequence of packed tokens, by a binary search of `steps` steps for its end."""
    low, high = token * 0, token * 0 + sequences
    for _ in range(steps):
        middle = (low + high) // 2
        ended = tl.load(cu_seqlens + 1 + middle, mask=low < high, other=0).to(tl.int64) <= token
        low = tl.where((low < high) & ended, middle + 1, low)
        high = tl.where((low < high) & ~ended, middle, high)
    return tl.minimum(low, sequences - 1)
