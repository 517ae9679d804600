"""GPUs that estimates are made for: their limits, and the part of a limit that kernels reach.

No number of this file was measured here. Each stands beside the source that it was read from, or is
called an assumption. The first real run shows which of them are wrong: see `estimates/`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from measuring.floors import Ceilings

PRODUCT = 0.80
"""Part of the peak that a large bfloat16 product reaches: FlashAttention-3's paper
(arXiv:2407.08608) gives 80 to 90 % for good products on an H100. The lower end."""
COPY = 0.90
"""Part of the memory's bandwidth that a copy reaches. Assumption: public runs of STREAM on an H100
show 3.0 TB/s of 3.35."""
TRITON = 395 / 989.4
"""Part of the peak that a forward kernel in Triton reaches on tiles without a mask: figure 5 of
FlashAttention-3's paper, H100, head size 128, 16k tokens, not causal."""
TRITON_BACKWARD = TRITON * 322 / 370
"""The same of a backward kernel. Assumption: it is slower than the forward kernel by as much as
FlashAttention-2's is (figures 5 and 6 of the same paper, H100, head size 128, 16k tokens)."""
DENSE_FORWARD = {"flash": 335 / 989.4, "cudnn": 539 / 989.4, "flash-3": 616 / 989.4}
"""Part of the peak that causal attention over everything reaches in the forward pass, counted by
the pairs that see each other: figure 5 of the same paper, head size 128, 16k tokens, causal."""
DENSE_BACKWARD = {
    "flash": 322 / 989.4 * 335 / 370,
    "cudnn": 516 / 989.4 * 539 / 595,
    "flash-3": 561 / 989.4 * 616 / 648,
}
"""The same of the backward pass: figure 6, which is not causal. Assumption: a causal mask costs it
the part that it costs the forward pass."""
FLEX = 0.9
"""Speed of FlexAttention relative to `flash`: PyTorch's article on FlexAttention gives 90 % forward
and 85 % backward of FlashAttention-2, on an A100."""
MASKED_TILE = 2.2
"""Time of a tile that takes a mask, relative to one that takes none. Fitted to figure 5: Triton's
causal rates at 2k to 16k tokens against those without a mask, if all that a causal mask costs is
that its tiles on the diagonal take longer."""


class Chip(NamedTuple):
    """One GPU.

    Attributes:
        name: a word of what the driver calls it.
        compiled: how the table of compiled kernels calls its architecture.
        major: major compute capability.
        multiprocessors: how many there are.
        operations_per_second: peak of dense bfloat16 products on tensor cores.
        bytes_per_second: of its memory.
        l2_bytes_per_second: of reads that hit the L2 cache.
        access: seconds from a load to what depends on it.
        launch: seconds that a kernel in a stream takes beside its work, one behind another.
        node: the same of a kernel in a CUDA graph.
    """

    name: str
    compiled: str
    major: int
    multiprocessors: int
    operations_per_second: float
    bytes_per_second: float
    l2_bytes_per_second: float
    access: float
    launch: float
    node: float

    @property
    def ceilings(self) -> Ceilings:
        """The rates of a large product and of a copy, of which floors are made."""
        return Ceilings(PRODUCT * self.operations_per_second, COPY * self.bytes_per_second)


H100 = Chip(
    name="H100",
    compiled="sm_90",
    major=9,
    # NVIDIA H100 datasheet, SXM5: 132 multiprocessors, 989.4 TFLOP/s dense, 3.35 TB/s
    multiprocessors=132,
    operations_per_second=989.4e12,
    bytes_per_second=3.35e12,
    # assumption, of the order of what "NVIDIA's H100: Funny L2, and Tons of Bandwidth"
    # (chipsandcheese.com, 2023) shows for the PCIe version
    l2_bytes_per_second=5.5e12,
    # a load from memory takes 400 to 500 clocks of 1.755 GHz on an idle chip (arXiv:2402.13499).
    # Assumption: twice that, under load and with the arithmetic of addresses
    access=0.5e-6,
    # "Getting Started with CUDA Graphs" (NVIDIA, 2019): kernels of 2.9 us take 3.8 us each in a
    # stream and 3.4 us in a graph, on a V100
    launch=0.9e-6,
    node=0.5e-6,
)
# NVIDIA H200 datasheet, SXM: the chip of the H100 with 4.8 TB/s
H200 = H100._replace(name="H200", bytes_per_second=4.8e12)
CHIPS = (H100, H200)
"""Those whose kernels have public times of this kind; another GPU gets no estimate."""


OTHER_BOARDS = "PCIe", "NVL"
"""Names of boards with the same chips and other memory, clocks or multiprocessors."""


def chip_named(name: str) -> Chip | None:
    """The chip that a driver calls by this name; None if estimates know none."""
    words = name.split()
    if any(board in words for board in OTHER_BOARDS):
        return None
    return next((chip for chip in CHIPS if chip.name in words), None)


def chip_of(device: str) -> Chip | None:
    """The chip of a device, "cuda" or "cpu"; None if estimates know none."""
    return chip_named(torch.cuda.get_device_name()) if device == "cuda" else None
