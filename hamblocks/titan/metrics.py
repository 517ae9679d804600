"""torchtitan's metrics, with the fraction of tokens and the bytes that every layer stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torchtitan.components.metrics import MetricsProcessor

from hamblocks.reachable import find_controllers
from hamblocks.titan.model import HAMTitanModel


class HAMMetrics(MetricsProcessor):
    """torchtitan's metrics, and three of every layer.

    - `ham/kept/layer_N`: the fraction of tokens that the layer stored, over all ranks, in the last
      forward pass.
    - `ham/cache_bytes/layer_N`: bytes of the keys and values of these tokens, per row of the batch.
    - `ham/tau/layer_N`: the threshold after the step; with a number for the controller where a
      layer has several.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        """As torchtitan's."""

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Logs the metrics of a step. torchtitan calls this on every rank."""
        metrics = dict(extra_metrics or {})
        for part in self.model_parts or ():
            if isinstance(part, HAMTitanModel):
                metrics |= metrics_of(part)
        super().log(step, global_avg_loss, global_max_loss, grad_norm, metrics)


def metrics_of(model: HAMTitanModel) -> dict[str, float]:
    """What every layer of a model stores, by the names of `HAMMetrics`. Waits for the device.

    Ranks with heads, slices or rows of their own hold equal shares, so the mean over ranks is that
    of the batch. Every rank calls this.
    """
    found: dict[str, float] = {}
    if model.kept is not None:
        kept = model.kept.clone()
        dist.all_reduce(kept)
        for index, fraction in enumerate((kept / dist.get_world_size()).tolist()):
            found[f"ham/kept/layer_{index:02}"] = fraction
            found[f"ham/cache_bytes/layer_{index:02}"] = fraction * model.row_nbytes
    for index, layer in enumerate(model.ham.model.stack.layers):
        taus = [one.tau for one in find_controllers(layer.selector) if hasattr(one, "tau")]
        for number, tau in enumerate(taus):
            suffix = f"/{number}" if len(taus) > 1 else ""
            found[f"ham/tau/layer_{index:02}{suffix}"] = float(tau)
    return found
