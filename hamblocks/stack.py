"""A sequence of blocks and a final norm, which all models share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple, final

from torch import Tensor, nn

from hamblocks.cache import cache_transaction
from hamblocks.gates import PredictionEntropy
from hamblocks.layer import HAMLayer
from hamblocks.norm import RMSNorm
from hamblocks.outputs import LayerStats
from hamblocks.parallel.shard import ContextShard
from hamblocks.state import HAMState
from hamblocks_ops.arguments import wrong


class StackOutput(NamedTuple):
    """Result of a stack.

    Attributes:
        y: `[B, T, hidden]`, the output of the norm.
        state: one state per layer, for the next call; None unless a state was given.
        stats: what each layer decided.
        inputs: `[B, T, hidden]` per block, its input; empty unless `keep_inputs` is set.
    """

    y: Tensor
    state: list[HAMState] | None
    stats: list[LayerStats]
    inputs: list[Tensor]


@final
class Stack(nn.Module):
    """Blocks, one after the other, then RMSNorm."""

    def __init__(self, blocks: Iterable[nn.Module], *, norm_eps: float = 1e-6) -> None:
        """Makes the stack.

        Args:
            blocks: modules that are called as a `HAMBlock` is, each with its HAMLayer as attribute
                `layer`.
            norm_eps: epsilon of the norm.

        Raises:
            ValueError: there is no block, or the layers have different hidden sizes.
        """
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        widths = sorted({layer.dims.hidden_size for layer in self.layers})
        if len(widths) != 1:
            raise ValueError(
                f"layer: expected layers of one hidden size, got hidden sizes {widths}"
            )
        self.hidden_size = widths[0]
        self.norm = RMSNorm(self.hidden_size, eps=norm_eps)

    @property
    def layers(self) -> list[HAMLayer]:
        """The sequence mixers, in order."""
        layers: list[Any] = [block.layer for block in self.blocks]
        return layers

    def init_state(
        self,
        batch_size: int,
        *,
        page_size: int = 32,
        max_pages: int | None = None,
        rollback: int = 0,
    ) -> list[HAMState]:
        """Returns the states before the first token, one per layer.

        Args:
            batch_size: number of sequences N.
            page_size: tokens in a page of a layer's cache.
            max_pages: limit to the pages of a layer's cache; None: no limit.
            rollback: how many of the last tokens can be taken back (see `HAMLayer.init_state`).
        """
        return [
            layer.init_state(
                batch_size, page_size=page_size, max_pages=max_pages, rollback=rollback
            )
            for layer in self.layers
        ]

    def forward(
        self,
        x: Tensor,
        *,
        state: list[HAMState] | None = None,
        cu_seqlens: Tensor | None = None,
        given_score: Tensor | None = None,
        shard: ContextShard | None = None,
        keep_inputs: bool = False,
    ) -> StackOutput:
        """Runs x through all blocks; an error leaves every layer's cache unchanged.

        Args:
            x: `[B, T, hidden]`; packed: `[1, sum(T), hidden]`.
            state: one state per layer, from `init_state(N)` or the last call. None: the batch holds
                whole sequences.
            cu_seqlens: int32 `[N+1]`, borders of packed sequences.
            given_score: `[B, T, 1]`, for the gates of all layers that read one.
            shard: which tokens x holds where several ranks share each sequence (see `HAMLayer`).
            keep_inputs: return the input of each block.

        Raises:
            ValueError: an argument is wrong. The message names it, what was expected and what came.
        """
        if state is not None:
            self.check_states(state)
        inputs: list[Tensor] = []
        states: list[HAMState] = []
        stats: list[LayerStats] = []
        given: dict[str, Any] = {"cu_seqlens": cu_seqlens}
        # arguments that are None are left out: blocks of users need not accept them
        more = {"given_score": given_score, "shard": shard}
        given |= {name: value for name, value in more.items() if value is not None}
        # Caches of all layers change together or not at all. Without a state there is no cache, and
        # torch.compile cannot trace a transaction.
        with contextlib.nullcontext() if state is None else cache_transaction():
            for index, block in enumerate(self.blocks):
                if keep_inputs:
                    inputs.append(x)
                # reentrant activation checkpointing turns the LayerOutput into a plain tuple
                own = None if state is None else state[index]
                x, after, decided = block(x, state=own, **given)
                stats.append(decided)
                if after is not None:
                    states.append(after)
        return StackOutput(self.norm(x), None if state is None else states, stats, inputs)

    def check_states(self, state: object) -> None:
        """Checks that there is one state per layer.

        Raises:
            ValueError: it is not a list of as many states.
        """
        if not isinstance(state, list) or len(state) != len(self.blocks):
            got = f"{len(state)}" if isinstance(state, list) else type(state).__name__
            raise wrong("state", f"a list of {len(self.blocks)} states, one per layer", got)


def entropy_gates(model: nn.Module) -> dict[str, PredictionEntropy]:
    """The `PredictionEntropy` gates of a model, by name; the model ties their heads to its own."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, PredictionEntropy)}
