"""Floors: the least time that a computation can take at the rates measured in the same run.

    floor = max(operations / rate of a product, bytes / rate of a copy)

A forward and a backward pass each read every input once and write every output once. Intermediate
results are not counted, and neither is what a backward pass keeps from the forward pass. A floor is
therefore a lower bound and not an estimate.

Letters: C tokens in a chunk, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

CHUNK = 64
"""Tokens in a chunk of the delta rule, as in fla."""
BACKWARD_ATTENTION = 2.5
"""Operations of attention's backward pass, relative to its forward pass: five products to two."""


class Ceilings(NamedTuple):
    """Rates that the device reaches."""

    operations_per_second: float
    bytes_per_second: float


class Work(NamedTuple):
    """Multiplications and additions of tensor cores, and bytes moved from and to device memory."""

    operations: float
    bytes: float

    def floor(self, ceilings: Ceilings) -> float:
        """The floor in seconds."""
        return max(
            self.operations / ceilings.operations_per_second, self.bytes / ceilings.bytes_per_second
        )


def delta_rule(
    tokens: int, heads: int, dim: int, *, item: int, residual: bool, score: bool, learns: bool
) -> Work:
    """Work of the gated delta rule in chunks. An entry has `item` bytes, a scalar is float32.

    Forward, per chunk:

    - 5 products of C C D: k k^T, A^-1 (beta e^g k), A^-1 (beta v), q k^T, P v_new
    - 3 products of C D D: w S, k^T v_new, q S
    - a triangular inverse, C^3 / 3 operations

    A product counts two operations per multiplication, so a token and head take
    10 C D + 6 D D + C C / 3 operations.

    Backward, per chunk:

    - w and u again: 2 of C C D
    - S and v_new again: 2 of C D D
    - P^T do: 2 of C C D
    - gradients of the state and of v_new: 3 of C D D
    - do v_new^T, dq, dk: 3 of C C D
    - do S^T, v_new dS^T, dv S^T: 3 of C D D
    - gradient of the inverse: 2 of C C D, 2 of C C C
    - through the inverse to k, v and beta: 5 of C C D

    A token and head take 28 C D + 16 D D + 4 C C operations.

    Bytes per token and head, forward: q, k, v, out, and the residual if written (D entries each);
    beta, g, and the score if asked for (a scalar each). Backward: q, k, v, the gradients of out, q,
    k and v (7 D entries); beta, g and their gradients (4 scalars).
    """
    token_heads = tokens * heads
    operations = 10 * CHUNK * dim + 6 * dim * dim + CHUNK * CHUNK / 3
    moved = (4 + residual) * dim * item + (2 + score) * 4
    if learns:
        operations += 28 * CHUNK * dim + 16 * dim * dim + 4 * CHUNK * CHUNK
        moved += 7 * dim * item + 4 * 4
    return Work(token_heads * operations, token_heads * moved)


def attention(
    tokens: int, heads: int, dim: int, *, pairs: int, kept: int, item: int, learns: bool
) -> Work:
    """Work of attention where `pairs` (query, key, head) see each other.

    `kept` (key, head) are stored. Forward: q k^T and P v take 4 D operations per pair. It moves q
    and out of all tokens, k and v of the stored ones, lse and lifetimes (4 bytes each per token and
    head). Backward: it reads q, out, the gradient of out, k, v and lse, and writes the gradients of
    q, k and v for every token.
    """
    token_heads = tokens * heads
    operations = 4.0 * dim * pairs
    moved = 2 * (token_heads + kept) * dim * item + 8 * token_heads
    if learns:
        operations *= 1 + BACKWARD_ATTENTION
        moved += (6 * token_heads + 2 * kept) * dim * item + 4 * token_heads
    return Work(operations, moved)


def causal_pairs(tokens: int) -> int:
    """Number of (query, key) that see each other if nothing is evicted."""
    return tokens * (tokens + 1) // 2


def layer(
    tokens: int,
    hidden: int,
    heads: int,
    dim: int,
    *,
    pairs: int,
    kept: int,
    item: int,
    learns: bool = True,
) -> Work:
    """Work of a HAM layer, forward and, with `learns`, backward.

    Weights: q, k, v and out (4 of hidden x heads dim), and four numbers per head (two gates, beta,
    decay). An entry takes 2 operations per token forward, and twice that backward. Bytes: x, y, the
    gradient of y, x again, the gradient of x; the weights twice, and their gradient. The delta rule
    and attention add operations and no bytes, because their inputs could come from the products
    without passing through memory.
    """
    weights = 4 * hidden * heads * dim + 4 * heads * hidden
    delta = delta_rule(tokens, heads, dim, item=item, residual=False, score=True, learns=learns)
    attending = attention(tokens, heads, dim, pairs=pairs, kept=kept, item=item, learns=learns)
    operations = (6 if learns else 2) * tokens * weights + delta.operations + attending.operations
    moved = 5 * tokens * hidden + 3 * weights if learns else 2 * tokens * hidden + weights
    return Work(operations, item * moved)


def decode(cache_bytes: int) -> Work:
    """Work of one token per sequence: the cache in use is read once; operations are negligible."""
    return Work(0, cache_bytes)
