"""Memories: recurrent states that see every token and report what they failed to predict."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks.protocols import Built, LayerDims, MemoryTrace, check_count
from hamblocks_ops import gated_delta_rule
from hamblocks_ops.arguments import wrong
from hamblocks_ops.packing import sequence_of
from hamblocks_ops.precision import wide


class DeltaMemoryState(NamedTuple):
    """State of a delta-rule memory. A state of zeros equals the state before the first token.

    Attributes:
        conv: `[N, conv_size - 1, (H + 2 Hkv) D]`, dtype of x: the last inputs of the short
            convolution, oldest first.
        recurrent: `[N, H, D, D]`, float32 (float64 for float64 models): the associative memory,
            keys by values.
    """

    conv: Tensor
    recurrent: Tensor


@final
class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time, followed by SiLU.

    The convolution of `fla.modules.ShortConvolution`, without a bias. Its state holds the last
    `kernel_size - 1` inputs, and packed sequences never see each other's inputs.

    Attributes:
        hidden_size: number of channels.
        kernel_size: number of taps.
        weight: `[hidden_size, kernel_size]`; the last tap weighs the token itself, the one before
            it the token before, and so on.
    """

    def __init__(self, hidden_size: int, kernel_size: int) -> None:
        """Makes the convolution with fresh weights.

        Args:
            hidden_size: number of channels, at least 1.
            kernel_size: number of taps, at least 1; 1 convolves nothing over time.

        Raises:
            ValueError: a size is not an integer of at least 1.
        """
        super().__init__()
        check_count("hidden_size", hidden_size, 1)
        check_count("kernel_size", kernel_size, 1)
        self.hidden_size, self.kernel_size = hidden_size, kernel_size
        self.weight = nn.Parameter(self.fresh(hidden_size, kernel_size))

    @staticmethod
    def fresh(hidden_size: int, kernel_size: int) -> Tensor:
        """Initial weights `[hidden_size, kernel_size]`, uniform in +-kernel_size ** -0.5."""
        return torch.empty(hidden_size, kernel_size).uniform_(-1, 1) / math.sqrt(kernel_size)

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
        past, tokens = self.kernel_size - 1, x.shape[1]
        # every sequence's past, then its tokens: token t stands at index past + t
        inputs = torch.cat([state, x], 1)
        delayed = [inputs[:, past - delay : past - delay + tokens] for delay in range(past + 1)]
        return self._weighted(delayed), inputs[:, tokens:]

    def _packed(self, x: Tensor, state: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        past, sequences = self.kernel_size - 1, cu_seqlens.shape[0] - 1
        # one table for everything: first the pasts of all sequences, then all tokens
        inputs = torch.cat([state.flatten(0, 1), x[0]])
        borders = cu_seqlens.long()

        def index(sequence: Tensor, offset: Tensor) -> Tensor:
            """Where the table has a sequence's token; a negative offset reaches into its past."""
            in_tokens = sequences * past + borders[sequence] + offset
            in_past = sequence * past + past + offset
            return torch.where(offset >= 0, in_tokens, in_past)

        sequence = sequence_of(cu_seqlens, x.shape[1])
        offset = torch.arange(x.shape[1], device=x.device) - borders[sequence]
        delayed = [inputs[index(sequence, offset - delay)] for delay in range(past + 1)]
        # the next state: the last inputs before each sequence's end, its old past included
        every = torch.arange(sequences, device=x.device)[:, None]
        last = borders.diff()[:, None] + torch.arange(-past, 0, device=x.device)
        return self._weighted(delayed)[None], inputs[index(every.expand_as(last), last)]

    def _weighted(self, delayed: list[Tensor]) -> Tensor:
        """SiLU of the sum over taps; `delayed[n]` is x as it was n tokens ago."""
        y = self.weight[:, -1] * delayed[0]
        for delay in range(1, self.kernel_size):
            y = torch.addcmul(y, self.weight[:, self.kernel_size - 1 - delay], delayed[delay])
        return F.silu(y)


class _DeltaRuleMemory(Built):
    """What both delta rules share: convolution, unit keys, write strength, the recurrence.

    A subclass adds the decay.
    """

    state_type: ClassVar[type[DeltaMemoryState]] = DeltaMemoryState
    """Type of the state: a saved state comes back as a plain tuple and is rebuilt with it."""

    def __init__(self, conv_size: int, allow_neg_eigval: bool, impl: str) -> None:
        super().__init__()
        check_count("conv_size", conv_size, 1)
        self.conv_size = conv_size
        self.allow_neg_eigval = allow_neg_eigval
        self.impl = impl

    def make(self, dims: LayerDims) -> None:
        # one convolution for q, k and v side by side
        self.conv = ShortConvolution(
            (dims.num_heads + 2 * dims.num_kv_heads) * dims.head_dim, self.conv_size
        )
        self.b_proj = nn.Linear(dims.hidden_size, dims.num_heads, bias=False)

    def decay(self, x: Tensor) -> Tensor | None:
        """Log decay `[B, T, H]` for x `[B, T, hidden]`, or None for no decay."""
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
        """See `hamblocks.protocols.Memory`.

        Raises:
            ValueError: `state` is not the state of such a memory, or a bad argument of
                `gated_delta_rule`.
        """
        if state is not None:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            self._check_state(state, q, sequences)
        q, k, v, conv = self._convolved(q, k, v, None if state is None else state.conv, cu_seqlens)
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
            k=k,
            v=v,
            beta=beta,
            residual=result.residual,
            score=result.score,
            position=position,
            metric=metric,
        )
        return result.out, trace, DeltaMemoryState(conv, result.final_state)

    def _convolved(
        self, q: Tensor, k: Tensor, v: Tensor, past: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v as the recurrence takes them, all `[B, T, H, D]`, and the convolution's state.

        Queries and keys get unit length; keys and values are repeated under grouped heads.
        """
        heads, kv_heads = q.shape[2], k.shape[2]
        channels = torch.cat([x.flatten(2) for x in (q, k, v)], -1)
        mixed, conv = self.conv(channels, past, cu_seqlens)
        q, k, v = mixed.unflatten(-1, (heads + 2 * kv_heads, -1)).split(
            [heads, kv_heads, kv_heads], 2
        )
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if heads != kv_heads:
            k, v = (x.repeat_interleave(heads // kv_heads, 2) for x in (k, v))
        return q, k, v, conv

    def _check_state(self, state: DeltaMemoryState, q: Tensor, sequences: int) -> None:
        """Checks type, shapes and device; the dtype of a state may differ from that of x."""
        if not isinstance(state, DeltaMemoryState):
            raise wrong("state", "a DeltaMemoryState", type(state).__name__)
        heads, dim = q.shape[2:]
        wanted = (
            ("conv", (sequences, self.conv_size - 1, self.conv.hidden_size)),
            ("recurrent", (sequences, heads, dim, dim)),
        )
        for (name, sizes), tensor in zip(wanted, state, strict=True):
            fits = isinstance(tensor, Tensor) and tuple(tensor.shape) == sizes
            if not fits or tensor.device != q.device:
                raise wrong(f"state.{name}", f"a tensor {list(sizes)} on {q.device}", tensor)


@final
class DeltaMemory(_DeltaRuleMemory):
    """The delta rule without decay (Yang et al., arXiv 2406.06484)."""

    def __init__(
        self, conv_size: int = 4, *, allow_neg_eigval: bool = False, impl: str = "auto"
    ) -> None:
        """Makes the part; the layer that owns it makes the parameters.

        Args:
            conv_size: taps of the short convolution, at least 1; 1 convolves nothing over time.
            allow_neg_eigval: write strength in (0, 2) instead of (0, 1) (arXiv 2411.12537).
            impl: implementation of `gated_delta_rule`.

        Raises:
            ValueError: `conv_size` is not an integer of at least 1.
        """
        super().__init__(conv_size, allow_neg_eigval, impl)

    def decay(self, x: Tensor) -> None:
        """Returns None: nothing decays."""
        return


@final
class GatedDeltaMemory(_DeltaRuleMemory):
    """The gated delta rule (Gated DeltaNet, arXiv 2412.06464).

    The log decay per head is g = -exp(A_log) softplus(a_proj(x) + dt_bias).
    """

    def __init__(
        self, conv_size: int = 4, *, allow_neg_eigval: bool = False, impl: str = "auto"
    ) -> None:
        """Makes the part; the layer that owns it makes the parameters.

        Args:
            conv_size: taps of the short convolution, at least 1; 1 convolves nothing over time.
            allow_neg_eigval: write strength in (0, 2) instead of (0, 1) (arXiv 2411.12537).
            impl: implementation of `gated_delta_rule`.

        Raises:
            ValueError: `conv_size` is not an integer of at least 1.
        """
        super().__init__(conv_size, allow_neg_eigval, impl)

    def make(self, dims: LayerDims) -> None:
        """Makes the parameters."""
        super().make(dims)
        self.a_proj = nn.Linear(dims.hidden_size, dims.num_heads, bias=False)
        self.A_log, self.dt_bias = (nn.Parameter(x) for x in self.initial_decay(dims.num_heads))

    @staticmethod
    def initial_decay(heads: int) -> tuple[Tensor, Tensor]:
        """Initial `A_log` and `dt_bias`, `[heads]` each, as in Mamba-2.

        exp(A_log) is uniform in [1, 16), softplus(dt_bias) log-uniform in [0.001, 0.1].
        """
        rate = torch.empty(heads).uniform_(1, 16)
        step = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
        # the inverse of softplus, so that softplus(dt_bias) = step
        return rate.log(), step + (-torch.expm1(-step)).log()

    def decay(self, x: Tensor) -> Tensor:
        """Log decay `[B, T, H]`, below 0, float32 (float64 for float64 x)."""
        dtype = wide(x)
        return -self.A_log.to(dtype).exp() * F.softplus(
            self.a_proj(x).to(dtype) + self.dt_bias.to(dtype)
        )
