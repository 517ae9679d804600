"""Tensor parallel in transformers: the plan of `from_pretrained(..., distributed_config=...)`.

transformers applies its plan while the model is on the meta device, and then reads from the file
what each rank holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from torch import nn

from hamblocks.parallel.heads import split_module

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

STYLE = "ham_heads"
"""The name of our style in plans."""

LAYERS: Final = {"stack.blocks.*.block.layer": STYLE, "stack.blocks.*.block.mlp": STYLE}
"""The plan of a `HAMModel`. transformers adds the embedding to it."""

HEAD: Final = {"lm_head": "colwise_gather_output"}
"""The plan of a head: over the vocabulary, and logits are gathered."""


def _register_style() -> bool:
    """Registers our style with transformers, if its plans can name the styles of others.

    Returns:
        Whether they can: older releases, and a torch without `torch.distributed`, cannot.
    """
    try:
        from transformers.distributed import tensor_parallel
    except ImportError:
        return False
    style: Any = getattr(tensor_parallel, "TensorParallelLayer", None)
    if not hasattr(style, "install_forward"):
        return False

    class HeadParallel(style):
        """Each rank holds some heads of a layer, or some channels of an MLP."""

        def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> Any:
            """Splits the module. Its forward splits heads by itself."""
            split_module(module, mesh, None)
            return module

    styles: Any = tensor_parallel
    styles.ALL_PARALLEL_STYLES.register(STYLE, HeadParallel())
    return True


HAS_PLANS: Final = _register_style()
"""Whether this transformers can use the plan of a HAM model."""
