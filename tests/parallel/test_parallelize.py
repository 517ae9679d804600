"""`parallelize`: sharded parameters over data and context at once give the gradients of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy

import hamblocks as hb
from hamblocks.parallel import ContextShard
from hamblocks.parallelize import parallelize

VOCAB, ROWS, TOKENS = 17, 4, 19


def decoder() -> hb.Decoder:
    torch.manual_seed(0)
    return hb.Decoder(VOCAB, 2, lambda _: hb.HAMLayer(16, 2, selector=hb.TopK(5))).double()


def trains(_: Any, context: int, recompute: bool) -> None:
    rows = torch.randint(VOCAB, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    whole = decoder()
    logits = whole(rows[:, :-1]).logits
    cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()

    mesh = init_device_mesh("cpu", (4 // context, context), mesh_dim_names=("data", "context"))
    model: Any = parallelize(decoder(), mesh, recompute=recompute)
    own = rows.chunk(mesh.size(0))[mesh.get_local_rank("data")]
    shard = ContextShard(TOKENS, group=mesh.get_group("context"))
    logits = model(shard.take(own[:, :-1]), shard=shard).logits
    target = shard.take(own[:, 1:]).flatten()
    loss = cross_entropy(logits.flatten(0, 1), target, reduction="sum") / (ROWS * TOKENS)
    (loss * 4).backward()  # FSDP averages over ranks
    for (name, weight), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        found = weight.grad.full_tensor()
        torch.testing.assert_close(found, other.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(("context", "recompute"), [(1, True), (2, False), (4, True)])
def test_gradients_are_those_of_one_process(workers, context, recompute):
    workers.run(trains, 4, context, recompute)


def test_a_model_without_a_ham_layer_is_named():
    with pytest.raises(ValueError, match="model: expected blocks that hold a HAMLayer"):
        parallelize(torch.nn.Linear(2, 2), None)
