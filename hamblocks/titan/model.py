"""A `HAMForCausalLM` as a model of torchtitan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.protocols.model import BaseModel

from hamblocks.models import HAMConfig, HAMForCausalLM
from hamblocks.parallel import ContextShard
from hamblocks.parallelize import names_of_weights, tie_again
from hamblocks_ops.arguments import wrong


class HAMTitanModel(BaseModel):
    """A `HAMForCausalLM` that torchtitan makes, shards and trains.

    Attributes:
        ham: the model. Its weights have the prefix `ham.` in torchtitan's checkpoints.
        shard_like: shards another `HAMForCausalLM` as `ham` is; None: `ham` is whole.
        context: the process group whose ranks hold slices of each sequence, and the order of the
            slices (see `ContextShard`); None: every rank holds whole sequences.
        kept: the fraction of tokens that each layer stored in the last forward pass, as far as this
            rank decides, float32 `[layers]`; None before the first one.
        row_nbytes: bytes of the keys and values of a whole batch row, in one layer, in the last
            forward pass.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        """What torchtitan makes the model from.

        Attributes:
            ham: arguments of `HAMConfig`, as JSON.
        """

        ham: dict[str, Any]

        def hf_config(self) -> HAMConfig:
            """The configuration of the `HAMForCausalLM`.

            Raises:
                ValueError: an argument in `ham` is wrong.
            """
            return HAMConfig(**self.ham)

        def update_from_config(self, *, config: Any, **_: Any) -> None:
            """Checks the parts of a job that only its whole configuration tells.

            Raises:
                ValueError: the job needs what a HAM model cannot do. The message names the option.
            """
            if not config.training.disable_cuda_graphs:
                expected = "True (how much is stored differs from step to step)"
                raise wrong("training.disable_cuda_graphs", expected, "False")
            checkpoint = config.checkpoint
            split = config.parallelism.tensor_parallel_degree > 1
            if not checkpoint.enable:
                return
            ours = getattr(checkpoint, "saves_blocks", False)
            if (split or checkpoint.last_save_in_hf) and not ours:
                expected = "HAMCheckpointManager.Config with tensor parallel or last_save_in_hf"
                raise wrong("checkpoint", expected, type(checkpoint).__qualname__)
            if split and checkpoint.async_mode == "async_with_pinned_mem":
                expected = "'disabled' or 'async' with tensor parallel"
                raise wrong("checkpoint.async_mode", expected, repr(checkpoint.async_mode))

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Number of parameters, and floating point operations per token of a training step.

            Only products with weights are counted, six operations per weight. The state of the
            memory and attention over stored tokens are left out, because their cost follows from
            what is stored. So torchtitan's MFU is a lower bound.
            """
            config = self.hf_config()
            count = sum(weight.numel() for weight in model.parameters())
            tied = config.tie_word_embeddings
            looked_up = 0 if tied else config.vocab_size * config.hidden_size
            return count, 6 * (count - looked_up)

    def __init__(self, config: Config) -> None:
        """Makes the model on the default device, of the default dtype."""
        super().__init__()
        self.ham = HAMForCausalLM(config.hf_config())
        self.dtype = torch.get_default_dtype()
        self.shard_like: Callable[[nn.Module], nn.Module] | None = None
        self.context: tuple[dist.ProcessGroup, str] | None = None
        self.kept: Tensor | None = None
        self.row_nbytes = 0

    def verify_module_protocol(self) -> None:
        """Does nothing: the modules of a HAM model initialise and shard themselves."""

    @torch.no_grad()
    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Gives the model new weights and thresholds, as the constructor of `HAMForCausalLM` does.

        Every rank makes the whole model for a moment, from the same random numbers, and keeps its
        shards. So the weights depend on the seed, and not on the number of ranks.
        """
        device = next(self.ham.parameters()).device
        names = names_of_weights(self._fresh(torch.device("meta")))
        tie_again(self.ham, names)
        fresh = self._fresh(device)
        if self.shard_like is not None:
            self.shard_like(fresh)
        held = chain(self.ham.named_parameters(), self.ham.named_buffers())
        given = dict(chain(fresh.named_parameters(), fresh.named_buffers()))
        for name, weight in held:
            _local(weight).copy_(_local(given[name]))

    def _fresh(self, device: torch.device) -> HAMForCausalLM:
        """A new model that is not sharded."""
        with device, _default_dtype(self.dtype):
            return HAMForCausalLM(self.ham.config)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, **_: Any) -> Tensor:
        """Logits `[B, T, vocab]` of tokens `[B, T]`.

        Args:
            tokens: int64 `[B, T]`; with context parallel, the columns of this rank.
            positions: int64 `[B, T]`, position of each token within its document. No state, no
                window and no stored token goes from one document to the next. None: every row is
                one document.

        Raises:
            ValueError: with context parallel, several rows that hold several documents.
        """
        if self.context is None:
            columns = tokens.shape[1]
            output = self.ham(tokens, position_ids=positions, use_cache=False)
        else:
            shard = self._shard(tokens, positions)
            columns = shard.tokens
            output = self.ham(tokens, shard=shard)
        self._note(output, columns)
        logits: Tensor = output.logits
        return logits

    def _shard(self, tokens: Tensor, positions: Tensor | None) -> ContextShard:
        """Which tokens of whole rows this rank holds, and where documents begin."""
        assert self.context is not None
        group, order = self.context
        count = tokens.shape[1] * dist.get_world_size(group)
        shard = ContextShard(count, group=group, order=order)
        if positions is None:
            return shard
        whole = shard.gather(positions)
        if bool((whole == torch.arange(count, device=whole.device)).all()):
            return shard
        if whole.shape[0] > 1:
            expected = "1 with context parallel of rows that hold several documents"
            raise wrong("training.local_batch_size", expected, whole.shape[0])
        begins = (whole[0] == 0).nonzero()[:, 0].tolist()
        return ContextShard(count, cu_seqlens=[*begins, count], group=group, order=order)

    @torch.no_grad()
    def _note(self, output: Any, columns: int) -> None:
        """Remembers what was stored, for the metrics. Does not wait for the device."""
        self.kept = torch.stack([stats.keep_fraction() for stats in output.stats])
        config: Any = self.ham.config
        numbers = 2 * config.num_key_value_heads * config.head_dim
        self.row_nbytes = columns * numbers * output.logits.element_size()


def _local(tensor: Tensor) -> Tensor:
    """What a rank holds of a parameter or buffer."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
