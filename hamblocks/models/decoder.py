"""A small decoder-only language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, final

from torch import Tensor, nn

from hamblocks.block import HAMBlock
from hamblocks.layer import HAMLayer, HAMState, LayerStats
from hamblocks.protocols import check_count
from hamblocks_ops.arguments import check_integer, check_range, check_tensor, wrong


class DecoderOutput(NamedTuple):
    """Result of a decoder.

    Attributes:
        logits: `[B, T, vocab]`.
        state: one per layer, for the next call; None unless a state was given.
        stats: what each layer decided.
    """

    logits: Tensor
    state: list[HAMState] | None
    stats: list[LayerStats]


@final
class Decoder(nn.Module):
    """Embedding, blocks, norm, and a head tied to the embedding."""

    def __init__(self, vocab_size: int, num_layers: int, layer: Callable[[int], HAMLayer]) -> None:
        """Makes the model.

        Args:
            vocab_size: how many tokens there are.
            num_layers: how many blocks.
            layer: called with 0 ... num_layers - 1, returns a new layer each time.

        Raises:
            ValueError: a number is below 1, or the layers are not of one hidden size.
        """
        super().__init__()
        check_count("vocab_size", vocab_size, 1)
        check_count("num_layers", num_layers, 1)
        self.blocks = nn.ModuleList(HAMBlock(layer(index)) for index in range(num_layers))
        hidden = layer_width(self.blocks)
        self.embedding = nn.Embedding(vocab_size, hidden)
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.head = nn.Linear(hidden, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)

    def init_state(self, sequences: int) -> list[HAMState]:
        """The state before the first token."""
        return [block.layer.init_state(sequences) for block in self.blocks]  # type: ignore[union-attr, operator]

    def forward(
        self, tokens: Tensor, *, state: list[HAMState] | None = None, cu_seqlens: Tensor | None = None
    ) -> DecoderOutput:
        """Next-token logits.

        Args:
            tokens: int64 `[B, T]`; packed: `[1, sum(T)]`.
            state: from `init_state(N)` or the last call. None: whole sequences.
            cu_seqlens: int32 `[N+1]`, borders of packed sequences.

        Raises:
            ValueError: a bad argument; the message names it, what was expected and what came.
        """
        check_tensor("tokens", tokens, "[B, T]", [None, None])
        check_integer("tokens", tokens)
        check_range("tokens", tokens, 0, self.embedding.num_embeddings - 1)
        if state is not None and (not isinstance(state, list) or len(state) != len(self.blocks)):
            got = f"{len(state)}" if isinstance(state, list) else type(state).__name__
            raise wrong("state", f"a list of {len(self.blocks)} states, one per layer", got)
        x = self.embedding(tokens)
        states: list[HAMState] = []
        stats: list[LayerStats] = []
        for index, block in enumerate(self.blocks):
            result = block(x, state=None if state is None else state[index], cu_seqlens=cu_seqlens)
            x = result.y
            stats.append(result.stats)
            if result.state is not None:
                states.append(result.state)
        return DecoderOutput(self.head(self.norm(x)), states or None, stats)


def layer_width(blocks: nn.ModuleList) -> int:
    """Hidden size of the blocks, which all have the same.

    Raises:
        ValueError: there is no block, or two differ.
    """
    widths = sorted({block.layer.dims.hidden_size for block in blocks if isinstance(block, HAMBlock)})
    if len(widths) != 1:
        raise ValueError(f"layer: expected layers of one hidden size, got hidden sizes {widths}")
    return widths[0]
