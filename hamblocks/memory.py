"""Memories: recurrences over every token, which also return their error in predicting its value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks import blocked
from hamblocks.blocked.norm import Length, normalize
from hamblocks.convolution import ShortConvolution, check_options
from hamblocks.heads import Split, under
from hamblocks.own_weights import is_plain
from hamblocks.protocols import Built, LayerDims, MemoryTrace, check_count
from hamblocks.slices import Transition
from hamblocks_ops import decode, gated_delta_rule
from hamblocks_ops.arguments import wrong
from hamblocks_ops.precision import wide


class DeltaMemoryState(NamedTuple):
    """State of a delta-rule memory. A state of zeros equals the state before the first token.

    Attributes:
        conv: `[N, taps - 1, channels]`, dtype of q, k and v: the last inputs of the short
            convolution, oldest first. The channels are those of q, k and v side by side,
            (H + 2 Hkv) D where the memory shares the projections of attention.
        recurrent: `[N, heads, K, V]`, float32 (float64 for float64 models): the associative memory,
            keys by values. heads = H and K = V = D unless the memory has sizes of its own.
    """

    conv: Tensor
    recurrent: Tensor


class _DeltaRuleMemory(Built):
    """What both delta rules share: projections, convolution, unit keys, the recurrence.

    A subclass adds the decay.
    """

    state_type: ClassVar[type[DeltaMemoryState]] = DeltaMemoryState
    """Type of the state: a saved state comes back as a plain tuple and is rebuilt with it."""

    def __init__(
        self,
        conv_size: int | Sequence[int],
        conv_init: str,
        conv_activation: str | None,
        projections: str,
        num_heads: int | None,
        num_k_heads: int | None,
        head_dim: int | None,
        expand_v: float,
        allow_neg_eigval: bool,
        qk_l2norm_eps: float,
        impl: str,
    ) -> None:
        super().__init__()
        taps = list(conv_size) if isinstance(conv_size, Sequence) else [conv_size] * 3
        if len(taps) != 3:
            raise wrong("conv_size", "an integer, or three: for q, k and v", repr(conv_size))
        taps = [check_count("conv_size", number, 1) for number in taps]
        if projections not in ("shared", "own"):
            raise wrong("projections", '"shared" or "own"', repr(projections))
        if num_heads is not None:
            num_heads = check_count("num_heads", num_heads, 1)
        if num_k_heads is not None:
            num_k_heads = check_count("num_k_heads", num_k_heads, 1)
        if head_dim is not None:
            head_dim = check_count("head_dim", head_dim, 1)
        sizes = "num_heads, num_k_heads, head_dim, expand_v"
        if projections == "shared" and (num_heads or num_k_heads or head_dim or expand_v != 1):
            expected = f'"own" for a memory with sizes of its own ({sizes})'
            raise wrong("projections", expected, '"shared"')
        if not expand_v > 0:
            raise wrong("expand_v", "a number > 0", repr(expand_v))
        check_options(conv_init, conv_activation, "conv_")
        if not 0 <= qk_l2norm_eps < math.inf:
            raise wrong("qk_l2norm_eps", "a number >= 0", repr(qk_l2norm_eps))
        self.conv_size = taps if isinstance(conv_size, Sequence) else taps[0]
        self.taps, self.conv_init, self.conv_activation = taps, conv_init, conv_activation
        self.projections = projections
        self.num_heads, self.num_k_heads = num_heads, num_k_heads
        self.head_dim, self.expand_v = head_dim, expand_v
        self.allow_neg_eigval = allow_neg_eigval
        self.qk_l2norm_eps = qk_l2norm_eps
        self.impl = impl

    @property
    def own_projections(self) -> bool:
        """See `hamblocks.protocols.ProjectsItself`."""
        return self.projections == "own"

    def read_size(self, dims: LayerDims) -> tuple[int, int]:
        """Heads and value size (see `hamblocks.protocols.ProjectsItself`).

        Raises:
            ValueError: `expand_v` times the size of a key is not an integer, or `num_k_heads` does
                not divide the heads.
        """
        heads, key = self.num_heads or dims.num_heads, self.head_dim or dims.head_dim
        if heads % (self.num_k_heads or heads):
            raise wrong("num_k_heads", f"a divisor of the {heads} heads", f"{self.num_k_heads}")
        value = key * self.expand_v
        # a quotient of two integers may be off by a rounding
        if not math.isclose(value, round(value), rel_tol=1e-9):
            raise wrong("expand_v", f"a number that makes {key} * expand_v an integer", value)
        return heads, round(value)

    def make(self, dims: LayerDims) -> None:
        heads, value = self.size = self.read_size(dims)
        key = self.key_size = self.head_dim or dims.head_dim
        if self.own_projections:
            keys = (self.num_k_heads or heads) * key
            channels = [keys, keys, heads * value]
            self.q_proj, self.k_proj, self.v_proj = (
                nn.Linear(dims.hidden_size, width, bias=False) for width in channels
            )
        else:
            shared = dims.num_kv_heads * dims.head_dim
            channels = [dims.num_heads * dims.head_dim, shared, shared]
        self.channels = channels
        # one convolution for q, k and v side by side
        self.conv = ShortConvolution(
            sum(channels),
            max(self.taps),
            self.conv_activation,
            self.conv_init,
            taps=list(zip(channels, self.taps, strict=True)),
        )
        self.b_proj = nn.Linear(dims.hidden_size, heads, bias=False)

    def decay(self, x: Tensor) -> Tensor | None:
        """Log decay `[B, T, H]` for x `[B, T, hidden]`, or None for no decay."""
        raise NotImplementedError

    def strength(self, x: Tensor) -> Tensor:
        """Write strength beta `[B, T, H]` for x `[B, T, hidden]`."""
        beta: Tensor = self.b_proj(x).to(wide(x)).sigmoid()
        return 2 * beta if self.allow_neg_eigval else beta

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Write strength and log decay, by one kernel where it can run."""
        return self.strength(x), self.decay(x)

    def _inputs(
        self, x: Tensor, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v before the convolution."""
        if self.projections == "own":
            key = -1, self.key_size
            return (
                self.q_proj(x).unflatten(-1, key),
                self.k_proj(x).unflatten(-1, key),
                self.v_proj(x).unflatten(-1, self.size),
            )
        assert q is not None
        assert k is not None
        assert v is not None
        return q, k, v

    def forward(
        self,
        x: Tensor,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
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
        if q is None or k is None or v is None or self.projections == "own":
            q, k, v = self._inputs(x, q, k, v)
        heads, value = self.size
        if state is not None:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            self._check_state(state, x, (sequences, heads, q.shape[3], value))
        past = None if state is None else state.conv
        fuses = x.device.type in decode.DEVICES
        decoded = self._decoded(q, k, v, past) if fuses else None
        q, k, v, conv = decoded or self._convolved(q, k, v, past, cu_seqlens)
        beta, g = self._gates(x) if fuses else (self.strength(x), self.decay(x))
        result = gated_delta_rule(
            q,
            k,
            v,
            beta=beta,
            g=g,
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
            q=q,
            g=g,
        )
        return result.out, trace, DeltaMemoryState(conv, result.final_state)

    def split_heads(self, ranks: int) -> dict[str, Split]:
        """See `hamblocks.heads.SplitsHeads`."""
        heads, value = self.size
        self.size = heads // ranks, value
        names = ["b_proj.weight"]
        if isinstance(self, GatedDeltaMemory):
            names += ["a_proj.weight", "A_log", "dt_bias"]
        splits = {name: Split(0, [heads]) for name in names}
        if self.own_projections:
            for name, size in zip("qkv", self.channels, strict=True):
                splits[f"{name}_proj.weight"] = Split(0, [size])
        return splits | under("conv", self.conv.split_blocks(self.channels, ranks))

    # slices of a sequence on several ranks (see `hamblocks.slices.HasTransition`)

    @property
    def border_size(self) -> int:
        """Number of tokens before a slice that the convolution reads."""
        return self.conv.kernel_size - 1

    @property
    def recurrent_size(self) -> tuple[int, int, int]:
        """Heads, size of a key and size of a value of the recurrent state."""
        heads, value = self.size
        return heads, self.key_size, value

    def border_inputs(
        self, x: Tensor, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> Tensor:
        """Inputs of the convolution, `[B, T, channels]`."""
        return torch.cat([one.flatten(2) for one in self._inputs(x, q, k, v)], -1)

    def transition(
        self,
        x: Tensor,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        *,
        border: Tensor,
    ) -> Transition:
        """The linear map that tokens apply to the recurrent state.

        `carry` is the final state that the op returns for an identity state and values of 0,
        `write` the one for a state of 0.
        """
        q, k, v, _ = self._convolved(*self._inputs(x, q, k, v), border, None)
        unit = torch.eye(k.shape[3], dtype=wide(x), device=x.device)
        unit = unit.expand(x.shape[0], k.shape[2], *unit.shape)

        def state_after(v: Tensor, state: Tensor | None) -> Tensor:
            return gated_delta_rule(
                q,
                k,
                v,
                beta=beta,
                g=g,
                initial_state=state,
                output_residual=False,
                impl=self.impl,
            ).final_state

        beta, g = self.strength(x), self.decay(x)
        return Transition(state_after(torch.zeros_like(k), unit), state_after(v, None))

    def state_of(self, border: Tensor, recurrent: Tensor) -> DeltaMemoryState:
        """The state that a call continues from."""
        return DeltaMemoryState(border, recurrent)

    def _convolved(
        self, q: Tensor, k: Tensor, v: Tensor, past: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v as the recurrence takes them, all `[B, T, H, D]`, and the convolution's state.

        Queries and keys get unit length. Where q, k or v has fewer heads than the state, its heads
        are repeated.
        """
        parts = q, k, v
        counts = [q.shape[2], k.shape[2], v.shape[2]]
        if q.shape[3] == v.shape[3]:  # fewer operations per token
            mixed, conv = self.conv(torch.cat(parts, 2).flatten(2), past, cu_seqlens)
            q, k, v = mixed.unflatten(-1, (sum(counts), -1)).split(counts, 2)
        else:
            mixed, conv = self.conv(torch.cat([x.flatten(2) for x in parts], -1), past, cu_seqlens)
            widths = [x.shape[2] * x.shape[3] for x in parts]
            q, k, v = (
                y.unflatten(-1, x.shape[2:])
                for x, y in zip(parts, mixed.split(widths, -1), strict=True)
            )
        q, k = self._unit(q), self._unit(k)
        heads = self.size[0]
        if counts != [heads] * 3:
            q, k, v = (
                x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)
                for x in (q, k, v)
            )
        return q, k, v, conv

    def _decoded(
        self, q: Tensor, k: Tensor, v: Tensor, past: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """What `_convolved` gives for one token, by one kernel; None where it cannot run."""
        conv = self.conv
        if q.shape[1] != 1 or past is None or conv.used is not None or not is_plain(conv):
            return None
        if not decode.runs(q, k, v, conv.weight, past):
            return None
        heads, channel, parts = self.size[0], 0, []
        for x in (q, k, v):
            parts.append(
                decode.Heads(
                    x,
                    repeat=heads // x.shape[2],
                    channel=channel,
                    silu=conv.activation == "silu",
                    unit=x is not v,
                    unit_eps=self.qk_l2norm_eps,
                )
            )
            channel += x.shape[2] * x.shape[3]
        (q, k, v), after = decode.heads(parts, decode.Convolution(conv.weight, past))
        assert after is not None
        return q, k, v, after

    def _unit(self, x: Tensor) -> Tensor:
        """x, of unit length; a little shorter with `qk_l2norm_eps`."""
        if x.shape[1] > 1 and blocked.runs(x):
            length = Length(1, self.qk_l2norm_eps, 0 if self.qk_l2norm_eps else 1e-12)
            return normalize(x, None, length)
        if not self.qk_l2norm_eps:
            # `F.normalize` without the op that expands the norm
            unit: Tensor = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12)
            return unit
        squared = x.to(wide(x)).square().sum(-1, keepdim=True)
        return (x * (squared + self.qk_l2norm_eps).rsqrt()).to(x.dtype)

    def _check_state(
        self, state: DeltaMemoryState, x: Tensor, recurrent: tuple[int, int, int, int]
    ) -> None:
        """Checks type, shapes and device; the dtype of a state may differ from that of x."""
        if not isinstance(state, DeltaMemoryState):
            raise wrong("state", "a DeltaMemoryState", type(state).__name__)
        wanted = (
            ("conv", (recurrent[0], self.conv.kernel_size - 1, self.conv.hidden_size)),
            ("recurrent", recurrent),
        )
        for (name, sizes), tensor in zip(wanted, state, strict=True):
            fits = isinstance(tensor, Tensor) and tuple(tensor.shape) == sizes
            if not fits or tensor.device != x.device:
                raise wrong(f"state.{name}", f"a tensor {list(sizes)} on {x.device}", tensor)


@final
class DeltaMemory(_DeltaRuleMemory):
    r"""The delta rule without decay (Yang et al., arXiv 2406.06484).

    \[ S_t = S_{t-1} + \beta_t k_t r_t^\top, \quad r_t = v_t - S_{t-1}^\top k_t, \quad
    o_t = K^{-1/2} S_t^\top q_t \]

    per head, with keys and queries of unit length and \(\beta_t = \sigma(\text{b\_proj}(x_t))\).
    """

    def __init__(
        self,
        conv_size: int | Sequence[int] = 4,
        *,
        conv_init: str = "uniform",
        conv_activation: str | None = "silu",
        projections: str = "shared",
        num_heads: int | None = None,
        num_k_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 1,
        allow_neg_eigval: bool = False,
        qk_l2norm_eps: float = 0,
        impl: str = "auto",
    ) -> None:
        """Stores the arguments; parameters are made when a layer takes the part.

        Args:
            conv_size: taps of the short convolution, at least 1; 1 convolves nothing over time.
                Three numbers: the taps for q, for k and for v.
            conv_init: "uniform" or "identity" (see `ShortConvolution`).
            conv_activation: "silu" or None, after the convolution. With None and
                `conv_init="identity"` the convolution initially leaves q, k and v unchanged.
            projections: "shared": q, k and v are those of attention. "own": the memory projects x
                itself, and may have sizes of its own.
            num_heads: heads of the memory, each with a state; None: those of the layer.
            num_k_heads: heads of queries and keys, a divisor of `num_heads`; each is repeated
                `num_heads // num_k_heads` times. None: `num_heads`.
            head_dim: size of a key; None: that of the layer.
            expand_v: size of a value divided by the size of a key; the size of a value must be an
                integer.
            allow_neg_eigval: write strength beta in (0, 2) instead of (0, 1) (arXiv 2411.12537).
            qk_l2norm_eps: added to the squared length by which queries and keys are normalised, as
                in fla and transformers (1e-6 there). 0: queries and keys have exactly unit length.
            impl: implementation of `gated_delta_rule`.

        Raises:
            ValueError: an argument is out of range, or sizes are given with
                `projections="shared"`.
        """
        super().__init__(
            conv_size,
            conv_init,
            conv_activation,
            projections,
            num_heads,
            num_k_heads,
            head_dim,
            expand_v,
            allow_neg_eigval,
            qk_l2norm_eps,
            impl,
        )

    def decay(self, x: Tensor) -> None:
        """Returns None: nothing decays."""
        return


@final
class GatedDeltaMemory(_DeltaRuleMemory):
    """The gated delta rule (Gated DeltaNet, arXiv 2412.06464).

    As `DeltaMemory`, but the state is multiplied by exp(g) before each token, with the log decay
    per head g = -exp(A_log) softplus(a_proj(x) + dt_bias).
    """

    float32_weights = "A_log", "dt_bias"
    """Weights that `parallelize` leaves in float32 under mixed precision: rounded to bfloat16, they
    would change how fast a head forgets, in the same direction for every token."""

    def __init__(
        self,
        conv_size: int | Sequence[int] = 4,
        *,
        conv_init: str = "uniform",
        conv_activation: str | None = "silu",
        projections: str = "shared",
        num_heads: int | None = None,
        num_k_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 1,
        allow_neg_eigval: bool = False,
        qk_l2norm_eps: float = 0,
        A_init_range: Sequence[float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        impl: str = "auto",
    ) -> None:
        """Stores the arguments; parameters are made when a layer takes the part.

        The initial decay is g = -a dt for x = 0, with a and dt drawn per head: a head with a small
        a dt forgets slowly. Half of its state is left after log(2) / (a dt) tokens.

        Args:
            conv_size: taps of the short convolution, at least 1; 1 convolves nothing over time.
                Three numbers: the taps for q, for k and for v.
            conv_init: "uniform" or "identity" (see `ShortConvolution`).
            conv_activation: "silu" or None, after the convolution. With None and
                `conv_init="identity"` the convolution initially leaves q, k and v unchanged.
            projections: "shared": q, k and v are those of attention. "own": the memory projects x
                itself, and may have sizes of its own.
            num_heads: heads of the memory, each with a state; None: those of the layer.
            num_k_heads: heads of queries and keys, a divisor of `num_heads`; each is repeated
                `num_heads // num_k_heads` times. None: `num_heads`.
            head_dim: size of a key; None: that of the layer.
            expand_v: size of a value divided by the size of a key; the size of a value must be an
                integer.
            allow_neg_eigval: write strength beta in (0, 2) instead of (0, 1) (arXiv 2411.12537).
            qk_l2norm_eps: added to the squared length by which queries and keys are normalised, as
                in fla and transformers (1e-6 there). 0: queries and keys have exactly unit length.
            A_init_range: two numbers > 0; exp(A_log) starts uniformly distributed between them.
            dt_min: softplus(dt_bias) starts log-uniformly distributed in [dt_min, dt_max].
            dt_max: see `dt_min`; not below it.
            impl: implementation of `gated_delta_rule`.

        Raises:
            ValueError: an argument is out of range, or sizes are given with
                `projections="shared"`.
        """
        super().__init__(
            conv_size,
            conv_init,
            conv_activation,
            projections,
            num_heads,
            num_k_heads,
            head_dim,
            expand_v,
            allow_neg_eigval,
            qk_l2norm_eps,
            impl,
        )
        self.A_init_range = list(A_init_range)
        self.dt_min, self.dt_max = dt_min, dt_max
        if len(self.A_init_range) != 2 or not 0 < self.A_init_range[0] <= self.A_init_range[1]:
            raise wrong("A_init_range", "two numbers, 0 < low <= high", repr(A_init_range))
        if not 0 < dt_min <= dt_max:
            raise wrong("dt_min", f"a number in (0, dt_max = {dt_max}]", repr(dt_min))

    def make(self, dims: LayerDims) -> None:
        """Makes the parameters."""
        super().make(dims)
        heads, _ = self.size
        self.a_proj = nn.Linear(dims.hidden_size, heads, bias=False)
        self.A_log, self.dt_bias = (nn.Parameter(x) for x in self.initial_decay(heads))

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        parameters = self.A_log, self.dt_bias
        if decode.runs(x) and decode.runs(*parameters):
            a, b = self.a_proj(x), self.b_proj(x)
            if decode.runs(a, b):
                most = 2.0 if self.allow_neg_eigval else 1.0
                g, beta = decode.decay_and_strength(a, *parameters, b, most)
                return beta, g
        return super()._gates(x)

    def initial_decay(self, heads: int) -> tuple[Tensor, Tensor]:
        """Initial `A_log` and `dt_bias`, `[heads]` each, drawn as in Mamba-2."""
        rate = torch.empty(heads).uniform_(*self.A_init_range)
        step = torch.empty(heads).uniform_(math.log(self.dt_min), math.log(self.dt_max)).exp()
        # the inverse of softplus, so that softplus(dt_bias) = step
        return rate.log(), step + (-torch.expm1(-step)).log()

    def decay(self, x: Tensor) -> Tensor:
        """Log decay `[B, T, H]`, below 0, float32 (float64 for float64 x)."""
        dtype = wide(x)
        return -self.A_log.to(dtype).exp() * F.softplus(
            self.a_proj(x).to(dtype) + self.dt_bias.to(dtype)
        )
