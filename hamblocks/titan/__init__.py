"""HAM models on torchtitan, PyTorch's platform for training. Needs the extra `titan`.

    torchrun --nproc-per-node 8 -m torchtitan.train --module hamblocks.titan --config ham_400m

torchtitan imports the functions of `hamblocks.titan.config_registry` by name.
"""

from hamblocks.extras import require

require("titan", "hamblocks.titan", "torchtitan")

from hamblocks.titan.checkpoints import (  # noqa: E402 - the error above comes first
    HAMCheckpointManager,
)
from hamblocks.titan.metrics import HAMMetrics  # noqa: E402
from hamblocks.titan.model import HAMTitanModel  # noqa: E402
from hamblocks.titan.parallel import parallelize_ham  # noqa: E402
from hamblocks.titan.spec import model_spec  # noqa: E402
from hamblocks.titan.state_dict import HAMStateDictAdapter  # noqa: E402

__all__ = [
    "HAMCheckpointManager",
    "HAMMetrics",
    "HAMStateDictAdapter",
    "HAMTitanModel",
    "model_spec",
    "parallelize_ham",
]
