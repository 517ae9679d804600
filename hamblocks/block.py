"""A pre-norm residual block: a HAM layer, then an MLP."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks.heads import How, OnFirstRank, Split
from hamblocks.layer import HAMLayer
from hamblocks.norm import RMSNorm
from hamblocks.outputs import LayerOutput
from hamblocks.parallel.heads import HeadSplit
from hamblocks.parallel.shard import ContextShard
from hamblocks.state import HAMState


@final
class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`, the SwiGLU MLP (arXiv 2002.05202).

    `up_proj` holds the rows of gate, then those of up.
    """

    head_split: HeadSplit | None = None
    """Set where ranks share the inner layer (`hamblocks.parallel.heads`)."""

    def __init__(self, hidden_size: int, width: int, bias: bool = False) -> None:
        """Makes the MLP.

        Args:
            hidden_size: size of x and y.
            width: size of the inner layer.
            bias: whether the projections have biases.
        """
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, 2 * width, bias=bias)
        self.down_proj = nn.Linear(width, hidden_size, bias=bias)

    def split_heads(self, ranks: int) -> dict[str, How]:
        """See `hamblocks.heads.SplitsHeads`; here ranks share the channels of the inner layer."""
        width = self.down_proj.in_features
        halves = Split(0, [width, width])
        splits: dict[str, How] = {
            "up_proj.weight": halves,
            "down_proj.weight": Split(1, [width]),
        }
        if self.down_proj.bias is not None:
            splits |= {"up_proj.bias": halves, "down_proj.bias": OnFirstRank()}
        return splits

    def forward(self, x: Tensor) -> Tensor:
        """Maps x `[..., hidden]` to y of the same shape."""
        if self.head_split is not None:
            y: Tensor = self.head_split.call(self, self.head_split, self._mapped, x)
            return y
        return self._mapped(x)

    def _mapped(self, x: Tensor) -> Tensor:
        gate, up = self.up_proj(x).chunk(2, -1)
        y: Tensor = self.down_proj(F.silu(gate) * up)
        return y


@final
class HAMBlock(nn.Module):
    """`x = x + layer(norm(x))`, then `x = x + mlp(norm(x))`."""

    def __init__(
        self,
        layer: HAMLayer,
        *,
        intermediate_size: int | None = None,
        norm_eps: float = 1e-6,
        mlp_bias: bool = False,
        mlp: nn.Module | None = None,
    ) -> None:
        """Makes the block.

        Args:
            layer: the HAM layer; the block takes its hidden size.
            intermediate_size: inner width of the MLP; None: 8/3 of the hidden size, rounded down.
            norm_eps: epsilon of both norms.
            mlp_bias: whether the projections of the MLP have biases.
            mlp: a module to use instead of the MLP, from `[B, T, hidden]` to the same shape.
        """
        super().__init__()
        hidden = layer.dims.hidden_size
        self.layer = layer
        self.layer_norm, self.mlp_norm = (
            RMSNorm(hidden, eps=norm_eps),
            RMSNorm(hidden, eps=norm_eps),
        )
        width = intermediate_size or hidden * 8 // 3
        self.mlp = SwiGLU(hidden, width, mlp_bias) if mlp is None else mlp

    def forward(
        self,
        x: Tensor,
        *,
        state: HAMState | None = None,
        cu_seqlens: Tensor | None = None,
        given_score: Tensor | None = None,
        shard: ContextShard | None = None,
    ) -> LayerOutput:
        """Runs the block on x `[B, T, hidden]`; arguments and errors as in `HAMLayer.forward`."""
        given = {"cu_seqlens": cu_seqlens, "given_score": given_score, "shard": shard}
        mixed = self.layer(self.layer_norm(x), state=state, **given)
        x = x + mixed.y
        return LayerOutput(x + self.mlp(self.mlp_norm(x)), mixed.state, mixed.stats)
