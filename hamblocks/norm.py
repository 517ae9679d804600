"""RMSNorm of reads, queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks import blocked
from hamblocks.blocked.norm import Length, normalize


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`, computed in the wider of the dtypes of x and of its own weight.

    Under autocast x is narrower than the weight; with a bfloat16 weight x may be wider. The weight
    is read inside `forward` only, so that hooks may gather, load or cast it for the call.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension of x.

        Args:
            x: `[..., D]`, floating.

        Returns:
            The shape of x, in the wider of both dtypes.
        """
        weight: Tensor = self.weight
        if x.dtype != weight.dtype:
            wider = torch.promote_types(x.dtype, weight.dtype)
            x, weight = x.to(wider), weight.to(wider)
        if x.dim() > 2 and x.shape[1] > 1 and blocked.runs(x, weight):
            eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
            return normalize(x, weight, Length(1 / x.shape[-1], eps, 0))
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)
