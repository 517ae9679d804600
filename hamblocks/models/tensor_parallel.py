"""Tensor parallel in transformers: the plan of `from_pretrained(..., distributed_config=...)`.

transformers applies its plan while the model is on the meta device, and then reads from the file
what each rank holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, nn

from hamblocks.parallel.heads import split_module

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

STYLE, GATHERED = "ham_heads", "ham_gathered_columns"
"""The names of our styles in plans."""

LAYERS: Final = {"stack.blocks.*.block.layer": STYLE, "stack.blocks.*.block.mlp": STYLE}
"""The plan of a `HAMModel`. transformers adds the embedding to it."""

HEAD: Final = {"lm_head": GATHERED}
"""The plan of a head: over the vocabulary, and logits are gathered."""


def _register_styles() -> bool:
    """Registers our styles with transformers, if its plans can name the styles of others.

    Returns:
        Whether they can: older releases, and a torch without `torch.distributed`, cannot.
    """
    try:
        from torch.distributed.tensor import Replicate
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
    columns: Any = styles.ColwiseParallel

    class GatheredColumns(columns):
        """As "colwise_gather_output", which cannot reshape what it computes of no token."""

        def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> Any:
            """Gives the style's forward x `[B T, hidden]`, whatever its shape was."""
            module = super().install_forward(module, mesh)
            forward = module.forward

            def forward_rows(x: Tensor) -> Tensor:
                y: Tensor = forward(x.reshape(-1, x.shape[-1]))
                return y.reshape(*x.shape[:-1], y.shape[-1])

            module.forward = forward_rows
            return module

    gathered = GatheredColumns(input_layouts=Replicate(), output_layouts=Replicate())
    styles.ALL_PARALLEL_STYLES.register(STYLE, HeadParallel())
    styles.ALL_PARALLEL_STYLES.register(GATHERED, gathered)
    return True


HAS_PLANS: Final = _register_styles()
"""Whether this transformers can use the plan of a HAM model."""
