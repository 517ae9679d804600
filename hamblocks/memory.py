"""Memories: recurrent states that see every token and tell what they failed to predict."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks.protocols import Built, LayerDims, MemoryTrace, check_count
from hamblocks_ops import gated_delta_rule
from hamblocks_ops.arguments import check_tensor, wrong
from hamblocks_ops.packing import sequence_of
from hamblocks_ops.precision import wide


class DeltaMemoryState(NamedTuple):
    """State of a delta-rule memory.

    Attributes:
        conv: `[N, conv_size - 1, channels]`, the inputs that the short convolution still needs.
        recurrent: `[N, H, D, D]`, float32 (float64 for float64 models): the associative memory, keys by values.
    """

    conv: Tensor
    recurrent: Tensor


@final
class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time, followed by SiLU; reset at the borders of packed sequences."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        check_count("size", size, 1)
        self.size = size
        self.weight = nn.Parameter(self.fresh(channels, size))

    @staticmethod
    def fresh(channels: int, size: int) -> Tensor:
        """Weights to begin with, uniform in +-size ** -0.5."""
        return torch.empty(channels, size).uniform_(-1, 1) / math.sqrt(size)

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """X `[B, T, channels]`, state `[N, size - 1, channels]` -> the same shapes."""
        past = self.size - 1
        if cu_seqlens is None:
            if state is None:
                state = x.new_zeros(x.shape[0], past, x.shape[2])
            tokens = x.shape[1]
            table = torch.cat([state.to(x.dtype), x], 1)
            y = self._taps(lambda tap: table[:, past - tap : past - tap + tokens])
            return F.silu(y), table[:, tokens:]
        sequences = cu_seqlens.shape[0] - 1
        if state is None:
            state = x.new_zeros(sequences, past, x.shape[2])
        # rows of one table: first every sequence's past, then the tokens
        table = torch.cat([state.to(x.dtype).flatten(0, 1), x[0]])
        borders = cu_seqlens.long()
        sequence = sequence_of(cu_seqlens, x.shape[1])
        token = torch.arange(x.shape[1], device=x.device)

        def row(sequence: Tensor, offset: Tensor) -> Tensor:
            """Row of a sequence's token; a negative offset reaches into its past."""
            inside = sequences * past + borders[sequence] + offset
            return torch.where(offset >= 0, inside, sequence * past + past + offset)

        y = self._taps(lambda tap: table[row(sequence, token - borders[sequence] - tap)])
        every = torch.arange(sequences, device=x.device)[:, None]
        last = borders.diff()[:, None] + torch.arange(-past, 0, device=x.device)
        return F.silu(y)[None], table[row(every.expand_as(last), last)]

    def _taps(self, delayed: Callable[[int], Tensor]) -> Tensor:
        """Weighted sum over taps; delayed(n) is x as it was n tokens ago."""
        y = self.weight[:, -1] * delayed(0)
        for tap in range(1, self.size):
            y = torch.addcmul(y, self.weight[:, self.size - 1 - tap], delayed(tap))
        return y


class _DeltaRuleMemory(Built):
    """What both delta rules share: short convolution, unit keys and queries, the write strength, the recurrence."""

    state_type = DeltaMemoryState

    def __init__(self, conv_size: int, allow_neg_eigval: bool, impl: str) -> None:
        super().__init__()
        check_count("conv_size", conv_size, 1)
        self.conv_size = conv_size
        self.allow_neg_eigval = allow_neg_eigval
        self.impl = impl

    def make(self, dims: LayerDims) -> None:
        self.conv = ShortConvolution(
            (dims.num_heads + 2 * dims.num_kv_heads) * dims.head_dim, self.conv_size
        )
        self.b_proj = nn.Linear(dims.hidden_size, dims.num_heads, bias=False)

    def decay(self, x: Tensor) -> Tensor | None:
        """Log decay `[B, T, H]`, or None."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        position: Tensor,
        state: DeltaMemoryState | None = None,
        cu_seqlens: Tensor | None = None,
        metric: str | None = None,
    ) -> tuple[Tensor, MemoryTrace, DeltaMemoryState]:
        """See `hamblocks.protocols.Memory`."""
        heads, kv_heads = q.shape[2], k.shape[2]
        past = None
        if state is not None:
            if not isinstance(state, DeltaMemoryState):
                raise wrong("state", "a DeltaMemoryState", type(state).__name__)
            sizes = [None, self.conv_size - 1, self.conv.weight.shape[0]]
            check_tensor("state.conv", state.conv, "[N, conv_size - 1, channels]", sizes, like=x)
            past = state.conv
        mixed, conv = self.conv(torch.cat([x.flatten(2) for x in (q, k, v)], -1), past, cu_seqlens)
        q, k, v = mixed.unflatten(-1, (heads + 2 * kv_heads, -1)).split(
            [heads, kv_heads, kv_heads], 2
        )
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if heads != kv_heads:
            k, v = (x.repeat_interleave(heads // kv_heads, 2) for x in (k, v))
        beta = self.b_proj(x).to(wide(x)).sigmoid() * (2 if self.allow_neg_eigval else 1)
        result = gated_delta_rule(
            q,
            k,
            v,
            beta=beta,
            g=self.decay(x),
            initial_state=None if state is None else state.recurrent,
            cu_seqlens=cu_seqlens,
            output_residual=metric is None,
            metric=metric,
            impl=self.impl,
        )
        trace = MemoryTrace(
            k=k, v=v, beta=beta, residual=result.residual, score=result.score, position=position
        )
        return result.out, trace, DeltaMemoryState(conv, result.final_state)


@final
class DeltaMemory(_DeltaRuleMemory):
    """The delta rule without decay (Yang et al., arXiv 2406.06484)."""

    def __init__(
        self, conv_size: int = 4, *, allow_neg_eigval: bool = False, impl: str = "auto"
    ) -> None:
        """Makes the part.

        Args:
            conv_size: taps of the short convolution, 1 for none over time.
            allow_neg_eigval: write strength in (0, 2) instead of (0, 1) (arXiv 2411.12537).
            impl: implementation of `gated_delta_rule`.
        """
        super().__init__(conv_size, allow_neg_eigval, impl)

    def decay(self, x: Tensor) -> None:
        """Nothing decays."""
        return


@final
class GatedDeltaMemory(_DeltaRuleMemory):
    """The gated delta rule (Gated DeltaNet, arXiv 2412.06464): g = -exp(A) softplus(W x + b), per head."""

    def __init__(
        self, conv_size: int = 4, *, allow_neg_eigval: bool = False, impl: str = "auto"
    ) -> None:
        """Makes the part.

        Args:
            conv_size: taps of the short convolution, 1 for none over time.
            allow_neg_eigval: write strength in (0, 2) instead of (0, 1) (arXiv 2411.12537).
            impl: implementation of `gated_delta_rule`.
        """
        super().__init__(conv_size, allow_neg_eigval, impl)

    def make(self, dims: LayerDims) -> None:
        """Makes the parameters."""
        super().make(dims)
        self.a_proj = nn.Linear(dims.hidden_size, dims.num_heads, bias=False)
        self.A_log, self.dt_bias = (nn.Parameter(x) for x in self.initial_decay(dims.num_heads))

    @staticmethod
    def initial_decay(heads: int) -> tuple[Tensor, Tensor]:
        """A_log and dt_bias to begin with, as in Mamba-2: A in [1, 16), steps log-uniform in [0.001, 0.1]."""
        rate = torch.empty(heads).uniform_(1, 16)
        step = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
        return rate.log(), step + (-torch.expm1(-step)).log()  # softplus of it is the step

    def decay(self, x: Tensor) -> Tensor:
        """Log decay `[B, T, H]`, float32 or float64, < 0."""
        dtype = wide(x)
        return -self.A_log.to(dtype).exp() * F.softplus(
            self.a_proj(x).to(dtype) + self.dt_bias.to(dtype)
        )
