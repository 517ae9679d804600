"""Kernels for tests of what kernels share, and of the interpreter."""

import triton
import triton.language as tl

from hamblocks_ops.selected_attention.triton.keys import tile_of_queries


@triton.jit
def arithmetic(x, y, found, scalars, size: tl.constexpr):
    place = tl.arange(0, size)
    a, b = tl.load(x + place), tl.load(y + place)
    tl.store(found + place, a * b)
    tl.store(found + size + place, a + b)
    tl.store(found + 2 * size + place, (a / b).to(tl.bfloat16))
    tl.store(found + 3 * size + place, tl.maximum(a, b))
    tl.store(found + 4 * size + place, (a.to(tl.float32) * 1.001).to(tl.bfloat16))
    tl.store(found + 5 * size + place, tl.exp2(a.to(tl.float32)).to(tl.bfloat16))
    tl.store(scalars, tl.sum(b, 0))
    tl.store(scalars + 1, tl.max(b, 0))
    for index in range(2):
        tl.store(scalars + 2 + index, tl.load(y + index) * index.to(tl.float32))


@triton.jit
def product(x, y, found, size: tl.constexpr):
    row, column = tl.arange(0, size)[:, None], tl.arange(0, size)[None, :]
    here = row * size + column
    tl.store(found + here, tl.dot(tl.load(x + here), tl.load(y + here)))


@triton.jit
def rows(x, found, stride, BLOCK: tl.constexpr):
    tile = tile_of_queries(x, 0, BLOCK, stride, 1, 16, BLOCK)
    tl.store(found + tl.arange(0, BLOCK), tl.sum(tile.to(tl.int32), 1))
