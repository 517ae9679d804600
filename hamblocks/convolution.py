"""The short causal convolution over time, with a state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks import blocked
from hamblocks.blocked.convolution import convolve, weighted
from hamblocks.heads import Split
from hamblocks.protocols import check_count
from hamblocks_ops.arguments import wrong
from hamblocks_ops.packing import sequence_of


def check_options(init: object, activation: object, prefix: str = "") -> None:
    """Checks how a convolution starts and what follows it; `prefix` stands before their names.

    Raises:
        ValueError: there is no such initialisation or activation.
    """
    if init not in ("uniform", "identity"):
        raise wrong(f"{prefix}init", '"uniform" or "identity"', repr(init))
    if activation not in ("silu", None):
        raise wrong(f"{prefix}activation", '"silu" or None', repr(activation))


@final
class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time, by default followed by SiLU.

    The convolution of `fla.modules.ShortConvolution`, without a bias. Its state holds the last
    `kernel_size - 1` inputs, and packed sequences never see each other's inputs.

    Attributes:
        hidden_size: number of channels.
        kernel_size: number of taps.
        activation: "silu" or None.
        init: "uniform" or "identity".
        weight: `[hidden_size, kernel_size]`; the last tap weighs the token itself, the one before
            it the token before, and so on.
    """

    used: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        activation: str | None = "silu",
        init: str = "uniform",
        *,
        taps: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Makes the convolution with fresh weights.

        Args:
            hidden_size: number of channels, at least 1.
            kernel_size: number of taps, at least 1; 1 convolves nothing over time.
            activation: "silu", or None for the plain sum.
            init: the weights at the start: "uniform" in +-kernel_size ** -0.5, or "identity", which
                weighs the token itself 1 and the tokens before it 0.
            taps: groups of channels with fewer taps, as pairs (channels, taps): their earlier taps
                are 0 and stay 0. None: all channels have `kernel_size` taps.

        Raises:
            ValueError: a size is not an integer of at least 1, or there is no such activation or
                init.
        """
        super().__init__()
        check_options(init, activation)
        hidden_size = check_count("hidden_size", hidden_size, 1)
        kernel_size = check_count("kernel_size", kernel_size, 1)
        self.hidden_size, self.kernel_size = hidden_size, kernel_size
        self.activation, self.init = activation, init
        used = self._used(taps)
        if used is None:  # code that iterates over buffers fails on one that is None
            self.used = None
        else:
            self.register_buffer("used", used, persistent=False)
        self.weight = nn.Parameter(self.fresh())

    def _used(self, taps: Sequence[tuple[int, int]] | None) -> Tensor | None:
        """Which taps are used, bool `[hidden_size, kernel_size]`; None: all."""
        if taps is None or all(size == self.kernel_size for _, size in taps):
            return None
        channels = [channels for channels, _ in taps]
        if sum(channels) != self.hidden_size or not all(
            1 <= size <= self.kernel_size for _, size in taps
        ):
            expected = f"groups of {self.hidden_size} channels, of 1 to {self.kernel_size} taps"
            raise wrong("taps", expected, repr(taps))
        sizes = torch.tensor([size for _, size in taps]).repeat_interleave(torch.tensor(channels))
        return torch.arange(self.kernel_size) >= self.kernel_size - sizes[:, None]

    def fresh(self) -> Tensor:
        """Initial weights `[hidden_size, kernel_size]`; uniform in +-(number of taps) ** -0.5."""
        weight = torch.zeros(self.hidden_size, self.kernel_size)
        if self.init == "identity":
            weight[:, -1] = 1
            return weight
        weight.uniform_(-1, 1)
        if self.used is None:
            return weight / math.sqrt(self.kernel_size)
        used = self.used.to(weight.device)
        return weight * used / used.sum(1, keepdim=True).sqrt()

    def split_blocks(self, blocks: Sequence[int], ranks: int) -> dict[str, Split]:
        """Becomes the convolution of a rank's share of channels (`hamblocks.heads.SplitsHeads`).

        Args:
            blocks: sizes of consecutive groups of channels; each rank gets an equal run of each.
            ranks: how many ranks share the channels.

        Returns:
            How its tensors are cut.
        """
        self.hidden_size //= ranks
        split = Split(0, blocks, is_small=True)
        return {"weight": split} if self.used is None else {"weight": split, "used": split}

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolves x and returns what the next call needs.

        Args:
            x: `[B, T, hidden_size]`, or `[1, sum(T), hidden_size]` with `cu_seqlens`.
            state: `[N, kernel_size - 1, hidden_size]`, the inputs before x, oldest first; None:
                zeros.
            cu_seqlens: int32 `[N+1]`, borders of packed sequences; None for a batch of N = B.

        Returns:
            The result with the shape of x, and the next state.
        """
        if state is None:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            state = x.new_zeros(sequences, self.kernel_size - 1, x.shape[2])
        state = state.to(x.dtype)
        if cu_seqlens is None:
            return self._batch(x, state)
        return self._packed(x, state, cu_seqlens)

    def _batch(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        past, tokens, taps = self.kernel_size - 1, x.shape[1], self._taps()
        if tokens > 1 and past and blocked.runs(x, state, taps):
            y = convolve(x, state, taps, self.activates)
            return y, torch.cat([state, x[:, -past:]], 1)[:, -past:]
        # every sequence's past, then its tokens: token t stands at index past + t
        inputs = torch.cat([state, x], 1)
        if tokens == 1:  # decoding: the inputs are exactly those of the taps, in order
            y = (inputs * taps.mT).sum(1, keepdim=True)
            return F.silu(y) if self.activates else y, inputs[:, tokens:]
        delayed = [inputs[:, past - delay : past - delay + tokens] for delay in range(past + 1)]
        return weighted(delayed, taps, self.activates), inputs[:, tokens:]

    def _packed(self, x: Tensor, state: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        past, sequences = self.kernel_size - 1, cu_seqlens.shape[0] - 1
        # one tensor of inputs: first the pasts of all sequences, then all tokens
        inputs = torch.cat([state.flatten(0, 1), x[0]])
        borders = cu_seqlens.long()

        def index(sequence: Tensor, offset: Tensor) -> Tensor:
            """Row of `inputs` with a sequence's token; a negative offset lies in its past."""
            in_tokens = sequences * past + borders[sequence] + offset
            in_past = sequence * past + past + offset
            return torch.where(offset >= 0, in_tokens, in_past)

        sequence = sequence_of(cu_seqlens, x.shape[1])
        offset = torch.arange(x.shape[1], device=x.device) - borders[sequence]
        delayed = [inputs[index(sequence, offset - delay)] for delay in range(past + 1)]
        # the next state: the last inputs before each sequence's end, its old past included
        every = torch.arange(sequences, device=x.device)[:, None]
        last = borders.diff()[:, None] + torch.arange(-past, 0, device=x.device)
        y = weighted(delayed, self._taps(), self.activates)
        return y[None], inputs[index(every.expand_as(last), last)]

    @property
    def activates(self) -> bool:
        """Whether SiLU follows."""
        return self.activation == "silu"

    def _taps(self) -> Tensor:
        """Weights `[hidden_size, kernel_size]`, 0 for taps that a channel does not have."""
        return self.weight if self.used is None else self.weight * self.used
