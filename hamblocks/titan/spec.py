"""What torchtitan needs of a HAM model, in one object."""

from __future__ import annotations

from typing import Any

from torchtitan.protocols.model_spec import ModelSpec

from hamblocks.titan.model import HAMTitanModel
from hamblocks.titan.parallel import hook_after_optimizer, parallelize_ham
from hamblocks.titan.state_dict import HAMStateDictAdapter


def model_spec(flavor: str, **ham: Any) -> ModelSpec:
    """The `ModelSpec` of a HAM model.

    Args:
        flavor: name of the size, for logs.
        ham: arguments of `HAMConfig`; policies as JSON.

    Raises:
        ValueError: an argument is wrong.
    """
    config = HAMTitanModel.Config(ham=ham)
    config.hf_config()  # a bad argument is an error here, and not after the ranks have met
    return ModelSpec(
        name="ham",
        flavor=flavor,
        model=config,
        parallelize_fn=parallelize_ham,
        pipelining_fn=None,
        post_optimizer_build_fn=hook_after_optimizer,
        state_dict_adapter=HAMStateDictAdapter,
    )
