"""Names of weights in torchtitan's checkpoints and in the safetensors of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from hamblocks.models import HAMForCausalLM
from hamblocks.parallelize import names_of_weights
from hamblocks.titan.model import HAMTitanModel

PREFIX = "ham."


class HAMStateDictAdapter(StateDictAdapter):
    """Turns the state of a `HAMTitanModel` into that of a `HAMForCausalLM`, and back.

    Weights have the same names and shapes in both, apart from the prefix `ham.`. A weight with
    several names, such as a head tied to the embedding, is saved under one of them, as
    `save_pretrained` does.
    """

    def __init__(self, model_config: HAMTitanModel.Config, hf_assets_path: str | None) -> None:
        """Makes the adapter.

        Args:
            model_config: what the model is made from.
            hf_assets_path: folder of an index of safetensors that a saved model is split by; None:
                it is saved in one file.
        """
        super().__init__(model_config, hf_assets_path)
        with torch.device("meta"):
            model = HAMForCausalLM(model_config.hf_config())
        unsaved = set(model._keys_to_ignore_on_save or ()) | model.all_tied_weights_keys.keys()
        self.source: dict[str, str] = {}
        for names in names_of_weights(model):
            saved = next(name for name in names if name not in unsaved)
            self.source |= {name: saved for name in names if name in unsaved}

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state of the `HAMForCausalLM`, as `save_pretrained` saves it."""
        named = {name.removeprefix(PREFIX): x for name, x in state_dict.items()}
        return {name: x for name, x in named.items() if name not in self.source}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state of the `HAMTitanModel`, repeated names included."""
        again = {name: hf_state_dict[saved] for name, saved in self.source.items()}
        return {f"{PREFIX}{name}": x for name, x in {**hf_state_dict, **again}.items()}
