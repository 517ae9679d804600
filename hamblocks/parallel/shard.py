"""Which tokens of a batch a rank holds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, final

import torch
import torch.distributed as dist
from torch import Tensor

from hamblocks.protocols import check_count
from hamblocks_ops.arguments import wrong

ORDERS = ("head-tail", "contiguous")
"""How chunks of a batch are dealt to ranks."""


class Chunk(NamedTuple):
    """Consecutive tokens of a batch row that one rank holds.

    Places are counted along the whole row, over all packed sequences in it.

    Attributes:
        number: its place in the order of chunks.
        begin: place of its first token.
        end: place after its last token.
        continues: whether its first token belongs to the sequence of the token before it.
        goes_on: whether the sequence of its last token has tokens after it.
        last: place of the first token of its last sequence; `begin` if that begins earlier.
        slots: where its tokens are among those of its rank.
    """

    number: int
    begin: int
    end: int
    continues: bool
    goes_on: bool
    last: int
    slots: slice

    @property
    def tokens(self) -> int:
        """Number of its tokens."""
        return self.end - self.begin


@final
class ContextShard:
    """Which tokens of a batch each rank of a process group holds (context parallel).

        shard = ContextShard(tokens.shape[1], group=mesh.get_group("cp"))
        y = layer(shard.take(x), shard=shard).y
        whole = shard.gather(y)

    All rows of a batch are cut at the same places, into chunks whose lengths differ by at most one;
    packed sequences are cut wherever a border falls. With `order="head-tail"` a row has two chunks
    per rank, and rank r of R holds chunks r and 2R - 1 - r: a late query sees more keys than an
    early one, so every rank gets as many late ones as early ones. Context parallel in
    `torch.distributed` uses the same order. With "contiguous" rank r holds chunk r.

    Chunks may be empty. Every rank makes the shard with the same arguments.

    Attributes:
        rank: this rank within the group.
        ranks: number of ranks.
        packed: whether the batch is one row of packed sequences.
        chunks: all chunks, in the order of their tokens.
        own: those of this rank.
        sent_nbytes: bytes that forward passes with this shard have sent to other ranks so far.
    """

    def __init__(
        self,
        tokens: int,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        group: dist.ProcessGroup | None = None,
        order: str = "head-tail",
    ) -> None:
        """Divides the tokens among the ranks.

        Args:
            tokens: T, the length of a row of the whole batch.
            cu_seqlens: int32 `[N+1]`, borders of N sequences packed into the one row of a batch; it
                is read on the host. None: every row is a sequence.
            group: the process group; None: the default group.
            order: "head-tail" or "contiguous".

        Raises:
            ValueError: an argument is wrong, or there is no process group.
        """
        if not (dist.is_available() and dist.is_initialized()):
            expected = "a process group (call torch.distributed.init_process_group first)"
            raise wrong("group", expected, "none")
        if order not in ORDERS:
            raise wrong("order", f"one of {', '.join(ORDERS)}", repr(order))
        self.tokens, self.group, self.order = check_count("tokens", tokens), group, order
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise wrong("group", "a process group that this rank belongs to", "another")
        self.packed = cu_seqlens is not None
        given = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
        self.starts = [0, self.tokens] if given is None else [int(x) for x in given]
        ascending = all(a <= b for a, b in pairwise(self.starts))
        if (
            len(self.starts) < 2
            or self.starts[0]
            or self.starts[-1] != self.tokens
            or not ascending
        ):
            raise wrong("cu_seqlens", f"ascending borders from 0 to tokens = {tokens}", self.starts)
        count = self.ranks * (2 if order == "head-tail" else 1)
        sizes = [self.tokens // count + (v < self.tokens % count) for v in range(count)]
        self.borders = list(accumulate(sizes, initial=0))
        self.chunks = [self._chunk(v) for v in range(count)]
        self.sent_nbytes = 0
        # every layer of a model asks for the same
        self._known: dict[tuple[int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}
        self.own = [chunk for chunk in self.chunks if self.owner(chunk.number) == self.rank]

    def owner(self, chunk: int) -> int:
        """The rank, within the group, that holds a chunk."""
        return chunk if chunk < self.ranks else 2 * self.ranks - 1 - chunk

    def slot(self, chunk: int) -> int:
        """The place of a chunk among those of its rank."""
        return int(chunk >= self.ranks)

    @property
    def local_tokens(self) -> int:
        """Tokens of a row that this rank holds."""
        return sum(chunk.tokens for chunk in self.own)

    def sequence_start(self, place: int) -> int:
        """Place of the first token of the sequence that a token belongs to."""
        return self.starts[bisect_right(self.starts, place) - 1]

    def at(self, place: int) -> Chunk:
        """The chunk that holds a token."""
        return self.chunks[bisect_right(self.borders, place) - 1]

    def _inside(self, border: int) -> bool:
        """Whether a border falls between two tokens of one sequence."""
        return 0 < border < self.tokens and self.sequence_start(border) != border

    def _chunk(self, index: int) -> Chunk:
        begin, end = self.borders[index : index + 2]
        before = sum(
            self.borders[v + 1] - self.borders[v]
            for v in range(index)
            if self.owner(v) == self.owner(index)
        )
        last = begin if begin == end else max(begin, self.sequence_start(end - 1))
        slots = slice(before, before + end - begin)
        return Chunk(index, begin, end, self._inside(begin), self._inside(end), last, slots)

    # what a chunk needs to know of its tokens

    def position(self, chunk: Chunk, device: torch.device) -> Tensor:
        """Position of a chunk's tokens within their sequences, int32 `[1, tokens]`."""
        place, start, _ = self._sequences(chunk, device)
        return (place - start).to(torch.int32)[None]

    def last_position(self, chunk: Chunk, device: torch.device) -> Tensor:
        """Position of the last token of each token's sequence, int32 `[1, tokens]`."""
        _, start, end = self._sequences(chunk, device)
        return (end - start - 1).to(torch.int32)[None]

    def _sequences(self, chunk: Chunk, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Place of every token of a chunk, and first place and end of its sequence, int64."""
        known = self._known.get((chunk.number, device))
        if known is not None:
            return known
        with torch.inference_mode(False):  # so that a call with gradients can use them later
            place = torch.arange(chunk.begin, chunk.end, device=device)
            starts = torch.tensor(self.starts, device=device)
            index = torch.searchsorted(starts, place, right=True)
            known = self._known[chunk.number, device] = place, starts[index - 1], starts[index]
        return known

    def cu_seqlens(self, chunk: Chunk, device: torch.device) -> Tensor | None:
        """Borders of the sequences within a chunk, int32; None for a batch that is not packed."""
        if not self.packed:
            return None
        inner = [x for x in self.starts if chunk.begin < x < chunk.end]
        borders = [0, *(x - chunk.begin for x in sorted(set(inner))), chunk.tokens]
        return torch.tensor(borders, dtype=torch.int32, device=device)

    def place(self, chunk: Chunk, evict_at: Tensor) -> tuple[Tensor, Tensor]:
        """Places of a chunk's tokens along the row, and lifetimes counted along it.

        No token outlives its sequence. So attention sees one sequence, in which a token is evicted
        when its own sequence ends.

        Args:
            chunk: the chunk of the tokens.
            evict_at: int32 `[B, T, H]`, within the sequence.

        Returns:
            int32 `[B, T]` and `[B, T, H]`.
        """
        place, start, end = (x[:, None] for x in self._sequences(chunk, evict_at.device))
        until = torch.minimum(evict_at.long().clamp(max=self.tokens) + start, end)
        return place[:, 0].to(torch.int32).expand(evict_at.shape[:2]), until.to(torch.int32)

    # batches of users

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """The tokens of this rank, from a tensor of the whole batch.

        Args:
            x: a tensor with T tokens along `dim`.
            dim: the dimension of tokens.

        Raises:
            ValueError: x has another number of tokens.
        """
        if x.shape[dim] != self.tokens:
            raise wrong("x", f"{self.tokens} tokens along dimension {dim}", list(x.shape))
        pieces = [x.narrow(dim, chunk.begin, chunk.tokens) for chunk in self.own]
        return torch.cat(pieces, dim)

    @torch.no_grad()
    def next_of(self, x: Tensor, last: int) -> Tensor:
        """The entry of x for the next token of each token, such as labels; exchanges between ranks.

        Args:
            x: an integer tensor `[B, local_tokens]`, the same B on all ranks.
            last: the value for the last token of every sequence.

        Returns:
            `[B, local_tokens]`.

        Raises:
            ValueError: x has another number of tokens.
        """
        if x.dim() != 2 or x.shape[1] != self.local_tokens:
            raise wrong("x", f"[B, {self.local_tokens}], the tokens of this rank", list(x.shape))
        first = torch.full((len(self.own), x.shape[0]), last, dtype=x.dtype, device=x.device)
        for slot, chunk in enumerate(self.own):
            if chunk.tokens:
                first[slot] = x[:, chunk.slots.start]
        every = [torch.empty_like(first) for _ in range(self.ranks)]
        dist.all_gather(every, first, group=self.group)
        shifted = torch.full_like(x, last)
        ends = [start - 1 for start in self.starts]
        for chunk in self.own:
            if not chunk.tokens:
                continue
            begin, after = chunk.slots.start, chunk.slots.stop
            shifted[:, begin : after - 1] = x[:, begin + 1 : after]
            later = next((c for c in self.chunks[chunk.number + 1 :] if c.tokens), None)
            if later is not None:
                shifted[:, after - 1] = every[self.owner(later.number)][self.slot(later.number)]
            stops = [end - chunk.begin + begin for end in ends if chunk.begin <= end < chunk.end]
            if stops:
                shifted[:, torch.tensor(stops, device=x.device)] = last
        return shifted

    @torch.no_grad()
    def gather(self, y: Tensor) -> Tensor:
        """The whole batch `[B, T, ...]` from the tokens of all ranks, without a gradient.

        Args:
            y: `[B, local_tokens, ...]`.

        Raises:
            ValueError: y has another number of tokens.
        """
        if y.shape[1] != self.local_tokens:
            raise wrong("y", f"{self.local_tokens} tokens along dimension 1", list(y.shape))
        most = max(sum(self._size(v) for v in self._owned(rank)) for rank in range(self.ranks))
        padded = y.new_zeros(y.shape[0], most, *y.shape[2:])
        padded[:, : y.shape[1]] = y
        every = [torch.empty_like(padded) for _ in range(self.ranks)]
        dist.all_gather(every, padded, group=self.group)
        return torch.cat([every[self.owner(one.number)][:, one.slots] for one in self.chunks], 1)

    def _size(self, chunk: int) -> int:
        return self.borders[chunk + 1] - self.borders[chunk]

    def _owned(self, rank: int) -> list[int]:
        return [chunk.number for chunk in self.chunks if self.owner(chunk.number) == rank]
