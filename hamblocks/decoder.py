"""A small decoder-only language model, without transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, final

from torch import Tensor, nn

from hamblocks.block import HAMBlock
from hamblocks.graphed import GraphedDecode
from hamblocks.layer import HAMLayer
from hamblocks.outputs import LayerStats
from hamblocks.parallel.shard import ContextShard
from hamblocks.protocols import check_count
from hamblocks.stack import Stack, entropy_gates
from hamblocks.state import HAMState
from hamblocks_ops.arguments import check_integer, check_range, check_tensor


class DecoderOutput(NamedTuple):
    """Result of a decoder.

    Attributes:
        logits: `[B, T, vocab]`.
        state: one state per layer, for the next call; None unless a state was given.
        stats: what each layer decided.
    """

    logits: Tensor
    state: list[HAMState] | None
    stats: list[LayerStats]


@final
class Decoder(nn.Module):
    """Embedding, blocks, norm, and a head tied to the embedding.

    The heads of `PredictionEntropy` gates are tied to it too.
    """

    def __init__(self, vocab_size: int, num_layers: int, layer: Callable[[int], HAMLayer]) -> None:
        """Makes the model.

        Args:
            vocab_size: size of the vocabulary.
            num_layers: number of blocks.
            layer: makes the layers. It is called with 0 to num_layers - 1 and returns a new layer
                each time.

        Raises:
            ValueError: `vocab_size` or `num_layers` is below 1, the layers have different hidden
                sizes, or a `PredictionEntropy` has another vocabulary.
        """
        super().__init__()
        vocab_size = check_count("vocab_size", vocab_size, 1)
        num_layers = check_count("num_layers", num_layers, 1)
        self.stack = Stack(HAMBlock(layer(index)) for index in range(num_layers))
        self.embedding = nn.Embedding(vocab_size, self.stack.hidden_size)
        self.head = nn.Linear(self.stack.hidden_size, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)
        for gate in entropy_gates(self).values():
            gate.tie(self.embedding.weight)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        return self.stack.blocks

    def init_state(self, batch_size: int) -> list[HAMState]:
        """Returns the states of `batch_size` sequences before the first token, one per layer."""
        return self.stack.init_state(batch_size)

    def forward(
        self,
        tokens: Tensor,
        *,
        state: list[HAMState] | None = None,
        cu_seqlens: Tensor | None = None,
        given_score: Tensor | None = None,
        shard: ContextShard | None = None,
    ) -> DecoderOutput:
        """Returns next-token logits.

        Args:
            tokens: int64 `[B, T]`; packed: `[1, sum(T)]`.
            state: from `init_state(N)` or the last call. None: the batch holds whole sequences.
            cu_seqlens: int32 `[N+1]`, borders of packed sequences.
            given_score: floating `[B, T, 1]`, a score from outside for gates that read one.
            shard: which tokens `tokens` holds where several ranks share each sequence.

        Raises:
            ValueError: an argument is wrong. The message names it, what was expected and what came.
        """
        check_tensor("tokens", tokens, "[B, T]", [None, None])
        check_integer("tokens", tokens)
        check_range("tokens", tokens, 0, self.embedding.num_embeddings - 1)
        x = self.embedding(tokens)
        given = {"cu_seqlens": cu_seqlens, "given_score": given_score, "shard": shard}
        result = self.stack(x, state=state, **given)
        return DecoderOutput(self.head(result.y), result.state, result.stats)

    def graphed_decode(self, state: list[HAMState], steps: int) -> GraphedDecode[list[HAMState]]:
        """Reserves the pages of `steps` tokens per sequence, and decodes them by a CUDA graph.

        Args:
            state: from `init_state(N)` or the last call; it is spent.
            steps: most tokens per sequence, at least 1.

        Returns:
            A callable that maps the last token of every sequence, int64 `[N]`, to the logits of the
            next one, `[N, vocab_size]`. Its attribute `state` has the states after these tokens.

        Raises:
            ValueError: a bad argument, or one of `HAMState.reserve`.
        """

        def step(tokens: Tensor, state: list[HAMState]) -> tuple[Tensor, list[HAMState]]:
            check_tensor("tokens", tokens, "[N]", [len(state[0].position)])
            result = self(tokens[:, None], state=state)
            return result.logits[:, 0], result.state

        self.stack.check_states(state)
        return GraphedDecode(step, state, steps)
