"""torchtitan's checkpoints of HAM models, also with tensor parallel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torchtitan.components.checkpoint import MODEL, AsyncMode, CheckpointManager
from torchtitan.tools.utils import GarbageCollection

from hamblocks.models import HAMForCausalLM
from hamblocks.parallel.planners import SplitLoadPlanner, SplitSavePlanner
from hamblocks.titan.model import HAMTitanModel


class HAMCheckpointManager(CheckpointManager):
    """torchtitan's checkpoint manager, with two differences.

    - It saves and loads weights of which a rank holds several blocks
      (`hamblocks.parallel.planners`). The checkpoint is the same with and without tensor parallel.
    - `last_save_in_hf` writes what `HAMForCausalLM.save_pretrained` writes, configuration included.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        """As torchtitan's.

        Attributes:
            saves_blocks: told to `HAMTitanModel.Config`, which must not import this file.
        """

        saves_blocks: ClassVar[bool] = True

    @torch.no_grad()
    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """Saves a state dict. Every rank calls this.

        Args:
            state_dict: what to save; with `to_hf`, the model is saved as it is.
            checkpoint_id: folder of the checkpoint.
            async_mode: whether to wait until it is written.
            enable_garbage_collection: whether to collect garbage after that.
            to_hf: saves the model for transformers.

        Returns:
            What torchtitan's own manager returns.
        """
        if async_mode is AsyncMode.ASYNC_WITH_PINNED_MEM:
            # `HAMTitanModel.Config` refuses this with tensor parallel
            return super().dcp_save(state_dict, checkpoint_id, async_mode)
        saved = None
        if to_hf:
            self._save_pretrained(checkpoint_id)
        elif async_mode is AsyncMode.ASYNC:
            saved = async_save(
                state_dict,
                checkpoint_id=checkpoint_id,
                planner=SplitSavePlanner(),
                process_group=self.pg,
            )
        else:
            save(state_dict, checkpoint_id=checkpoint_id, planner=SplitSavePlanner())
        if enable_garbage_collection:
            GarbageCollection.collect("GC collection invoked by checkpointer.")
        return saved

    def dcp_load(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        from_hf: bool,
        from_quantized: bool,
    ) -> None:
        """Loads a checkpoint into a state dict, and into the model. Every rank calls this.

        Args:
            state_dict: what to load, in place.
            checkpoint_id: folder of the checkpoint.
            from_hf: whether it is one of transformers (safetensors).
            from_quantized: must be False.
        """
        planner = SplitLoadPlanner()
        if from_hf:
            adapter: Any = self.sd_adapter
            named = adapter.to_hf(state_dict)
            reader = adapter.get_hf_storage_reader(checkpoint_id, from_quantized)
            load(named, storage_reader=reader, planner=planner)
            state_dict = adapter.from_hf(named)
        else:
            load(state_dict, checkpoint_id=checkpoint_id, planner=planner)
        if MODEL in self.states:
            self.states[MODEL].load_state_dict(state_dict)

    def _save_pretrained(self, folder: str) -> None:
        """Gathers the model on the first rank, which saves it for transformers."""
        [part] = self.states[MODEL].model
        whole = gathered(part)
        if whole is not None:
            whole.to(self.export_dtype).save_pretrained(folder)
        dist.barrier()


def gathered(model: HAMTitanModel) -> HAMForCausalLM | None:
    """The whole model on the CPU of the first rank, None on the others. Every rank calls this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model.ham, options=options)
    if dist.get_rank():
        return None
    with torch.device("meta"):
        made = HAMForCausalLM(model.ham.config)
    made.load_state_dict(state, assign=True)
    made.tie_weights()
    return made
