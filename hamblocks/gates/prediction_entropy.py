"""The score of AMOR: the entropy of the model's own prediction."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from hamblocks.heads import NotTrained, ScoreHeads
from hamblocks.protocols import Built, GateOutput, LayerDims, MemoryTrace, check_count
from hamblocks_ops.arguments import check_tensor, wrong
from hamblocks_ops.precision import wide


class UntrainedHead(nn.Module):
    """A linear map of the hidden state to logits, whose weight is not trained through it.

    It is no `nn.Linear`: tools that adapt, merge or quantise every `nn.Linear` of a model would
    change the model's own head through the weight that both share.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        weight = torch.empty(vocab_size, hidden_size)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as an nn.Linear
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x `[..., hidden_size]` to logits `[..., vocab_size]`."""
        return functional.linear(x, self.weight)


@final
class PredictionEntropy(Built):
    r"""Scores a token by how uncertain the model is of the next one.

    With \(p_t = \operatorname{softmax}(W x_t)\) over V tokens of the vocabulary, the score is the
    normalised entropy \(-\sum_i p_{t,i} \log p_{t,i} / \log V\), between 0 (certain) and 1
    (uniform). This is the score of AMOR (arXiv 2602.13215). It reads the input of the layer, and
    needs no memory.

    `head` computes \(W x_t\). The gate does not train it: the score has no gradient, and the
    weight of an untied head has `requires_grad=False`. Tie the head to the output head of the
    model, which the language-model loss trains. `Decoder` and `HAMForCausalLM` do so; in any other
    model call `gate.tie(model.head.weight)`. A `HAMModel` has no output head; it ties the gate's
    head to its embedding if the configuration ties word embeddings. An untied head keeps its
    initial or loaded weights, and the entropy of a random head says nothing of the model's
    prediction.

    The last norm of the model is not applied: x is the input of the layer, which a `HAMBlock` has
    normalised.

    The logits `[B, T, V]` are computed for every token, so the cost is that of the model's head.
    """

    score_heads: ScoreHeads = "one"
    """See `hamblocks.heads.HasScoreHeads`."""

    def __init__(self, vocab_size: int) -> None:
        """Stores the argument; the head is made when a layer takes the gate.

        Args:
            vocab_size: number of tokens V of the vocabulary, at least 2.

        Raises:
            ValueError: `vocab_size` is not an integer of at least 2.
        """
        super().__init__()
        vocab_size = check_count("vocab_size", vocab_size, 2)
        self.vocab_size = vocab_size

    def make(self, dims: LayerDims) -> None:
        """Makes the head, which is not trained until it is tied."""
        self.head = UntrainedHead(dims.hidden_size, self.vocab_size)

    def tie(self, weight: Tensor) -> None:
        """Makes a parameter the weight of the head, as `gate.head.weight = weight` does.

        Args:
            weight: a parameter `[vocab_size, hidden_size]`, the weight of the model's output head.

        Raises:
            ValueError: the gate belongs to no layer yet, or it is not such a parameter.
        """
        if self.dims is None:
            raise wrong("gate", "one that a layer owns, which has a head to tie", f"{self!r}")
        check_tensor("weight", weight, "[V, hidden_size]", [self.vocab_size, self.dims.hidden_size])
        if not isinstance(weight, nn.Parameter):
            raise wrong("weight", "a Parameter, which the model trains", weight)
        self.head.weight = weight

    def split_heads(self, ranks: int) -> dict[str, NotTrained]:
        """See `hamblocks.heads.SplitsHeads`."""
        return {"head.weight": NotTrained()}

    def forward(self, x: Tensor, trace: MemoryTrace) -> GateOutput:
        """Returns the score `[B, T, 1]`, float32 (or float64), the same for all heads."""
        with torch.no_grad():
            logits = self.head(x)
            p = logits.to(wide(logits)).softmax(-1)
            # a model whose vocabulary was resized ties a head of another size
            entropy = torch.special.entr(p).sum(-1, keepdim=True) / math.log(p.shape[-1])
            return GateOutput(entropy.clamp(0, 1))
