"""The least time that a computation can take: its operations or its bytes, at the rates measured in the same run.

    floor = max(operations / product rate, bytes / copy rate)

Every input is counted read once and every output written once, in a forward and in a backward pass each; what lies
between, and what a backward pass keeps from the forward pass, is not counted: a floor is no estimate.
"""

from __future__ import annotations

from typing import NamedTuple

CHUNK = 64


class Ceilings(NamedTuple):
    """Rates that the device reaches."""

    operations_per_second: float
    bytes_per_second: float


class Work(NamedTuple):
    """What has to be done: multiplications and additions of tensor cores, and bytes of device memory."""

    operations: float
    bytes: float

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds."""
        return max(
            self.operations / ceilings.operations_per_second, self.bytes / ceilings.bytes_per_second
        )

    def plus(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(self.operations + other.operations, self.bytes + other.bytes)


def delta_rule(
    tokens: int, heads: int, dim: int, *, item: int, residual: bool, score: bool, learns: bool
) -> Work:
    """The gated delta rule in chunks of C = 64, keys and values of D; `item` bytes an entry, scalars float32.

    Forward, per chunk: k k^T, A^-1 (beta e^g k), A^-1 (beta v), q k^T, P v_new are products of C C D (5); w S, k^T
    v_new and q S of C D D (3); a triangular inverse is C^3 / 3. Two operations to a product's multiplication:

        per token and head: 10 C D + 6 D D + C C / 3

    Backward, per chunk: w and u again (2 of C C D), S and v_new again (2 of C D D), P^T do (2 of C C D), gradients of
    state and v_new (3 of C D D), do v_new^T, dq, dk (3 of C C D), do S^T, v_new dS^T, dv S^T (3 of C D D), of the
    inverse (2 of C C D, 2 of C C C), and through it to k, v and beta (5 of C C D):

        per token and head: 28 C D + 16 D D + 4 C C

    Bytes per token and head, forward: q, k, v, out, the residual if written (D each); beta, g, the score (a scalar
    each). Backward: q, k, v, the gradient of out, and those of q, k, v (7 D); beta, g and their gradients (4 scalars).
    """
    rows = tokens * heads
    operations = 10 * CHUNK * dim + 6 * dim * dim + CHUNK * CHUNK / 3
    moved = (4 + residual) * dim * item + (2 + score) * 4
    if learns:
        operations += 28 * CHUNK * dim + 16 * dim * dim + 4 * CHUNK * CHUNK
        moved += 7 * dim * item + 4 * 4
    return Work(rows * operations, rows * moved)


def attention(
    tokens: int, heads: int, dim: int, *, pairs: int, kept: int, item: int, learns: bool
) -> Work:
    """Attention where `pairs` (query, key, head) see each other and `kept` (key, head) are stored.

    Forward: q k^T and P v, 4 D operations a pair; q and out of all tokens, k and v of the stored ones, lse and
    lifetimes (4 bytes each per token and head). Backward: five products instead of two, 2.5 times as much; it reads q,
    out, the gradient of out, k, v and lse and writes the gradients of q and, for every token, k and v.
    """
    rows = tokens * heads
    operations = 4.0 * dim * pairs
    moved = 2 * (rows + kept) * dim * item + 8 * rows
    if learns:
        operations *= 3.5
        moved += (6 * rows + 2 * kept) * dim * item + 4 * rows
    return Work(operations, moved)


def causal_pairs(tokens: int) -> int:
    """(query, key) that see each other where nothing is evicted."""
    return tokens * (tokens + 1) // 2


def layer(
    tokens: int, hidden: int, heads: int, dim: int, *, pairs: int, kept: int, item: int
) -> Work:
    """A HAM layer, forward and backward: its products with weights, the delta rule with the score, and attention.

    Weights: q, k, v and out (4 of hidden x heads dim), and four numbers a head (two gates, beta, decay). Forward 2
    operations an entry and token, backward twice that. Bytes: x, y, the gradient of y, x again, the gradient of x;
    weights read twice, their gradient written. Of the delta rule and attention operations alone are counted: what they
    read could come from the products without passing through memory.
    """
    weights = 4 * hidden * heads * dim + 4 * heads * hidden
    delta = delta_rule(tokens, heads, dim, item=item, residual=False, score=True, learns=True)
    attending = attention(tokens, heads, dim, pairs=pairs, kept=kept, item=item, learns=True)
    operations = 6 * tokens * weights + delta.operations + attending.operations
    return Work(operations, item * (5 * tokens * hidden + 3 * weights))


def decode(cache_bytes: int) -> Work:
    """A token of every sequence: the cache in use is read once; operations do not count beside that."""
    return Work(0, cache_bytes)
