"""How torchtitan's options shard a HAM model, and its hook after the optimizer is made."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division

from hamblocks.controllers import hook_controllers
from hamblocks.parallelize import parallelize
from hamblocks.titan.model import HAMTitanModel
from hamblocks_ops.arguments import wrong

ORDERS = {"headtail": "head-tail", None: "contiguous"}
"""Orders of `ContextShard`, by the names of torchtitan's load balancers."""

RESHARDS = {"always": True, "never": False}
"""Whether FSDP2 drops gathered weights after a forward pass, by torchtitan's names."""


def parallelize_ham(
    model: HAMTitanModel,
    *,
    parallel_dims: Any,
    training: Any,
    parallelism: Any,
    compile_config: Any,
    ac_config: Any,
    dump_folder: str,
) -> HAMTitanModel:
    """Prepares a model for training, in place: `parallelize_fn` of a `ModelSpec`.

    Heads are shared over torchtitan's dimension `tp`, sequences over `cp`, parameters over `fsdp`,
    which includes `cp`; the ranks of `dp_replicate` hold the same shards. Gradients are summed over
    ranks, because torchtitan divides the loss by the number of tokens on all of them. Every block
    is compiled for itself.

    Args:
        model: the model, on any device.
        parallel_dims: torchtitan's meshes.
        training: torchtitan's `TrainingConfig`.
        parallelism: torchtitan's `ParallelismConfig`.
        compile_config: torchtitan's `CompileConfig`.
        ac_config: configuration of `FullAC`, or None.
        dump_folder: not used.

    Returns:
        The model.

    Raises:
        ValueError: an option asks for what a HAM model cannot do. The message names it.
    """
    _check(parallel_dims, training, parallelism, ac_config)
    names = ["fsdp"]
    if parallel_dims.dp_replicate_enabled:
        names.insert(0, "dp_replicate")
    if parallel_dims.tp_enabled:
        names.append("tp")
    shard = partial(
        parallelize,
        mesh=parallel_dims.get_mesh(names),
        tensor="tp" if parallel_dims.tp_enabled else None,
        replicate="dp_replicate" if parallel_dims.dp_replicate_enabled else None,
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
    )
    shard(model.ham, recompute=ac_config is not None)
    model.shard_like = shard
    disable_fsdp_gradient_division(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # a plain sum: with a factor of 1 FSDP2 takes an operation that gloo does not have
            module.set_force_sum_reduction_for_comms(True)
    if parallelism.fsdp_reshard_after_forward in RESHARDS:
        root: Any = model.ham  # FSDP2 has given it methods
        root.set_reshard_after_forward(RESHARDS[parallelism.fsdp_reshard_after_forward])
    if compile_config.enable and "model" in compile_config.components:
        for block in model.ham.model.stack.blocks:
            block.compile(backend=compile_config.backend)
    if parallel_dims.cp_enabled:
        group = parallel_dims.get_mesh("cp").get_group()
        model.context = group, ORDERS[parallelism.context_parallel_load_balancer]
    return model


def hook_after_optimizer(optimizers: Any, model_parts: list[nn.Module], parallel_dims: Any) -> None:
    """Moves thresholds after every optimizer step: `post_optimizer_build_fn` of a `ModelSpec`."""
    for part in model_parts:
        hook_controllers(optimizers, part)


def _check(parallel_dims: Any, training: Any, parallelism: Any, ac_config: Any) -> None:
    """Refuses options that would otherwise be ignored.

    Raises:
        ValueError: one is set.
    """
    if parallelism.spmd_backend != "partial_dtensor":
        expected = "'partial_dtensor' (the layers exchange what they need by themselves)"
        raise wrong("parallelism.spmd_backend", expected, repr(parallelism.spmd_backend))
    if parallel_dims.pp_enabled:
        expected = "1 (a HAM model has no pipeline)"
        raise wrong("parallelism.pipeline_parallel_degree", expected, parallel_dims.pp)
    if parallel_dims.ep_enabled:
        expected = "1 (the experts of a HAM model are not shared out)"
        raise wrong("parallelism.expert_parallel_degree", expected, parallel_dims.ep)
    balancer = parallelism.context_parallel_load_balancer
    if parallel_dims.cp_enabled and balancer not in ORDERS:
        expected = "'headtail' or None"
        raise wrong("parallelism.context_parallel_load_balancer", expected, repr(balancer))
    if parallelism.enable_fsdp_symm_mem:
        raise wrong("parallelism.enable_fsdp_symm_mem", "False", "True")
    if training.enable_cpu_offload:
        raise wrong("training.enable_cpu_offload", "False", "True")
    if ac_config is not None and not isinstance(ac_config, FullAC.Config):
        expected = "FullAC (every block is computed again), or None"
        raise wrong("activation_checkpoint", expected, type(ac_config).__qualname__)
