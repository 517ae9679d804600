"""`parallelize` of models of transformers, and what it refuses; pairs of ways are in `test_modes`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import hamblocks as hb
from hamblocks.models import HAMConfig, HAMForCausalLM
from hamblocks.parallelize import parallelize

VOCAB, ROWS, TOKENS = 17, 4, 19


def decoder() -> hb.Decoder:
    torch.manual_seed(0)
    return hb.Decoder(VOCAB, 2, lambda _: hb.HAMLayer(16, 2, selector=hb.TopK(5))).double()


def trains_transformers(_: Any, tensor: str | None) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2}
    config = HAMConfig(**sizes, num_attention_heads=2, selector=hb.TopK(5))
    torch.manual_seed(0)
    whole = HAMForCausalLM(config).double()
    rows = torch.randint(VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    whole(rows, labels=rows).loss.backward()

    torch.manual_seed(0)
    names = ("copies", "shards") if tensor is None else ("copies", "tensor")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    replicate = "copies" if tensor is None else None
    given = {"tensor": tensor, "replicate": replicate, "recompute": tensor is None}
    model: Any = parallelize(HAMForCausalLM(config).double(), mesh, **given)
    ranks, number = (4, dist.get_rank()) if tensor is None else (2, mesh.get_local_rank("copies"))
    own = rows.chunk(ranks)[number]
    model(own, labels=own).loss.backward()
    for (name, weight), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert weight.device_mesh.mesh_dim_names == names, name
        found = weight.grad.full_tensor()
        torch.testing.assert_close(found, other.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("tensor", [None, "tensor"])
def test_a_model_of_transformers_with_replicas_or_heads(workers, tensor):
    workers.run(trains_transformers, 4, tensor)


def test_replicas_need_one_dimension_to_shard_over():
    mesh = SimpleNamespace(mesh_dim_names=("copies", "data", "context"))
    with pytest.raises(ValueError, match="replicate: expected beside it one dimension"):
        parallelize(decoder(), mesh, replicate="copies")
    with pytest.raises(ValueError, match="replicate: expected a dimension of the mesh"):
        parallelize(decoder(), mesh, replicate="other")


def test_a_model_without_a_ham_layer_is_named():
    with pytest.raises(ValueError, match="model: expected blocks that hold a HAMLayer"):
        parallelize(torch.nn.Linear(2, 2), None)
