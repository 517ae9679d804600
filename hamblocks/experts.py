"""A mixture of experts in place of a block's MLP."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks.block import SwiGLU
from hamblocks.protocols import check_count
from hamblocks_ops.arguments import wrong
from hamblocks_ops.precision import wide


class Experts(nn.Module):
    """SwiGLU MLPs of one size, with stacked weights.

    Attributes:
        up_proj: `[experts, 2 * width, hidden]`, gate and up of every expert.
        down_proj: `[experts, hidden, width]`.
    """

    def __init__(self, hidden_size: int, width: int, number: int) -> None:
        """Makes `number` MLPs of inner width `width`."""
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(number, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(number, hidden_size, width))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draws the weights as `nn.Linear` does: uniform in +-(input size) ** -0.5."""
        for weight in (self.up_proj, self.down_proj):
            bound = weight.shape[2] ** -0.5
            weight.uniform_(-bound, bound)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """The weighted sum of the experts.

        An expert runs only over the tokens routed to it, so the host waits for the routing.
        Compiled code and calls on the meta device run every expert over all tokens.

        Args:
            x: `[N, hidden]`.
            weight: `[N, experts]`, 0 for an expert that is not chosen.

        Returns:
            `[N, hidden]`.
        """
        if torch.compiler.is_compiling() or x.is_meta:
            gate, up = torch.einsum("nh,ewh->new", x, self.up_proj).chunk(2, -1)
            inner = F.silu(gate) * up * weight[..., None]
            return torch.einsum("new,ehw->nh", inner, self.down_proj)
        chosen = weight.detach() != 0
        y = torch.zeros_like(x)
        for expert in chosen.any(0).nonzero().flatten().tolist():
            tokens = chosen[:, expert].nonzero().flatten()
            gate, up = F.linear(x[tokens], self.up_proj[expert]).chunk(2, -1)
            own = F.linear(F.silu(gate) * up, self.down_proj[expert])
            y.index_add_(0, tokens, (own * weight[tokens, expert, None]).to(y.dtype))
        return y


@final
class SparseMLP(nn.Module):
    """A mixture of experts: every token runs through `num_experts_per_tok` of `num_experts` MLPs.

    `y = sum_i w_i expert_i(x) + sigmoid(shared_gate(x)) * shared_expert(x)`, where w are the
    largest entries of `softmax(router(x))`, by default divided by their sum. It is the MLP of
    Qwen3-Next, and without a shared expert that of Qwen3-MoE. It has no load-balancing loss.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int,
        num_experts_per_tok: int,
        moe_intermediate_size: int,
        shared_expert_intermediate_size: int | None = None,
        norm_topk_prob: bool = True,
    ) -> None:
        """Makes the MLP.

        Args:
            hidden_size: size of x and y.
            num_experts: number of experts.
            num_experts_per_tok: how many of them a token runs through.
            moe_intermediate_size: inner width of an expert.
            shared_expert_intermediate_size: inner width of the shared expert, which every token
                runs through; None: there is none.
            norm_topk_prob: divide the weights of the chosen experts by their sum.

        Raises:
            ValueError: a size is not an integer of at least 1, or a token has more experts than
                there are.
        """
        super().__init__()
        self.num_experts = check_count("num_experts", num_experts, 1)
        self.num_experts_per_tok = check_count("num_experts_per_tok", num_experts_per_tok, 1)
        width = check_count("moe_intermediate_size", moe_intermediate_size, 1)
        if self.num_experts_per_tok > self.num_experts:
            expected = f"at most num_experts = {self.num_experts}"
            raise wrong("num_experts_per_tok", expected, f"{self.num_experts_per_tok}")
        self.norm_topk_prob = norm_topk_prob
        self.router = nn.Linear(hidden_size, self.num_experts, bias=False)
        self.experts = Experts(hidden_size, width, self.num_experts)
        self.has_shared_expert = shared_expert_intermediate_size is not None
        if shared_expert_intermediate_size is not None:
            name = "shared_expert_intermediate_size"
            shared = check_count(name, shared_expert_intermediate_size, 1)
            self.shared_expert = SwiGLU(hidden_size, shared)
            self.shared_gate = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x `[..., hidden]` to y of the same shape."""
        flat = x.flatten(0, -2)
        y: Tensor = self.experts(flat, self.routed(flat))
        if self.has_shared_expert:
            y = y + self.shared_gate(flat).sigmoid() * self.shared_expert(flat)
        return y.view(x.shape)

    def routed(self, x: Tensor) -> Tensor:
        """The weight of every expert, `[N, experts]` for x `[N, hidden]`; 0 for those not chosen.

        The softmax is computed in float32, or float64 for float64 x. `torch.topk` decides between
        experts of equal weight.
        """
        share: Tensor = self.router(x).to(wide(x)).softmax(-1)
        best, index = share.topk(self.num_experts_per_tok, -1)
        if self.norm_topk_prob:
            best = best / best.sum(-1, keepdim=True)
        return torch.zeros_like(share).scatter(-1, index, best).to(x.dtype)
