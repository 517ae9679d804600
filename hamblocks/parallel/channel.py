"""Exchanges between the ranks of a call, with gradients, in one order on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _Exchange(Function):
    """Sends rows to every rank and receives rows from every rank; backward sends gradients back."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        ticket: Tensor,
        sent: list[int],
        received: list[int],
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(rows, sent, received, group), torch.zeros_like(ticket)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        rows, ticket = gradients
        back = _exchanged(rows, ctx.received, ctx.sent, ctx.group)
        return back, torch.zeros_like(ticket), None, None, None


def _exchanged(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result


@final
class Channel:
    """The exchanges of one call of a layer.

    Backward passes of exchanges are collective too: every rank must run all of them, in the same
    order, also a rank whose own output depends on nothing that it received. So every exchange takes
    a ticket, a scalar 0, from the one before it, and the last one is added to the output.

    Attributes:
        group: the process group.
        nbytes: bytes that this rank has sent to other ranks, forward.
    """

    def __init__(self, group: dist.ProcessGroup | None, *inputs: Tensor) -> None:
        """Begins a call.

        Args:
            group: the process group.
            inputs: tensors that the call depends on; the backward passes of all exchanges run
                before those of the ops that computed these tensors.
        """
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        # the sum of nothing is 0 even where an input is not finite
        self.ticket: Tensor = sum((x.flatten()[:0].sum() for x in inputs), torch.zeros(()))
        self.nbytes = 0

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Sends the first `sent[0]` rows to rank 0, the next to rank 1 and so on.

        Args:
            rows: `[sum(sent), ...]`.
            sent: numbers of rows for every rank.
            received: numbers of rows from every rank.

        Returns:
            `[sum(received), ...]`, in the order of ranks.
        """
        self._count(rows, sum(sent) - sent[self.rank])
        if not rows.is_floating_point():
            return _exchanged(rows, list(sent), list(received), self.group)
        arrived: tuple[Tensor, Tensor] = _Exchange.apply(
            rows, self.ticket.to(rows.device), list(sent), list(received), self.group
        )  # type: ignore[no-untyped-call]
        result, self.ticket = arrived
        return result

    def gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have equal shapes."""
        each = [1] * self.ranks
        return list(self.exchange(x.expand(self.ranks, *x.shape), each, each).unbind())

    @torch.no_grad()
    def counts(self, sent: Sequence[int]) -> list[int]:
        """How many rows each rank sends to this one, from what every rank sends to each.

        The host waits for the device.
        """
        rows = torch.tensor(list(sent), device=self.ticket.device)
        each = [1] * self.ranks
        self._count(rows, self.ranks - 1)
        return [int(x) for x in _exchanged(rows, each, each, self.group)]

    @torch.no_grad()
    def largest(self, *numbers: int) -> list[int]:
        """Each number's largest value on any rank. The host waits for the device."""
        rows = torch.tensor(numbers, device=self.ticket.device)
        self._count(rows, len(numbers))
        dist.all_reduce(rows, dist.ReduceOp.MAX, group=self.group)
        return [int(x) for x in rows]

    @torch.no_grad()
    def send(self, tensors: Sequence[Tensor], rank: int) -> None:
        """Sends some tensors to a rank, which calls `receive`; their shapes go with them."""
        to = self._global(rank)
        header = [len(tensors)]
        for x in tensors:
            header += [_DTYPES.index(x.dtype), x.dim(), *x.shape]
        device = self.ticket.device
        head = torch.tensor(header, device=device)
        data = [x.detach().contiguous().flatten().view(torch.uint8) for x in tensors if x.numel()]
        body = torch.cat(data) if data else torch.empty(0, dtype=torch.uint8, device=device)
        for x in (torch.tensor([len(head), len(body)], device=device), head, body):
            if x.numel():
                dist.send(x, to, group=self.group)
                self._count(x, x.numel())

    @torch.no_grad()
    def receive(self, rank: int) -> list[Tensor]:
        """The tensors that a rank sends to this one. The host waits for the device."""
        origin, device = self._global(rank), self.ticket.device
        sizes = torch.empty(2, dtype=torch.int64, device=device)
        dist.recv(sizes, origin, group=self.group)
        head = torch.empty(int(sizes[0]), dtype=torch.int64, device=device)
        body = torch.empty(int(sizes[1]), dtype=torch.uint8, device=device)
        for x in (head, body):
            if x.numel():
                dist.recv(x, origin, group=self.group)
        header, at, tensors = head.tolist()[1:], 0, []
        while header:
            dtype, dims = _DTYPES[header[0]], header[1]
            shape, header = header[2 : 2 + dims], header[2 + dims :]
            like = torch.empty(shape, dtype=dtype, device=device)
            part = body[at : at + like.nbytes]
            # a copy, because a view of another dtype needs aligned bytes
            tensors.append(part.clone().view(dtype).view(shape) if like.numel() else like)
            at += like.nbytes
        return tensors

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _count(self, like: Tensor, rows: int) -> None:
        self.nbytes += rows * like[:1].numel() * like.element_size()


_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
)
