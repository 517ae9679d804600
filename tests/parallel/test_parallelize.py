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


def decays(_: Any, tensor: str | None) -> None:
    """Compares the log decay of every layer under mixed precision with that of float32 weights."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    whole = decoder().float()
    names = [name for name in whole.state_dict() if name.endswith(("A_log", "dt_bias"))]
    model: Any = parallelize(
        decoder().float(), mesh, tensor=tensor, param_dtype=torch.bfloat16, recompute=True
    )
    assert model.state_dict().keys() == whole.state_dict().keys()
    seen: list[Any] = []
    for block in model.blocks:
        block.layer.memory.register_forward_hook(lambda _, given, made: seen.append((given, made)))
    rows = torch.randint(VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    model(rows).logits.float().square().sum().backward()
    assert len(seen) == 4  # twice: blocks are recomputed
    heads = (
        slice(None)
        if tensor is None
        else slice(*[mesh.get_local_rank("tensor") + i for i in (0, 1)])
    )
    for block, ((x, *_), (_, trace, _)) in zip(whole.blocks, seen, strict=False):
        memory = block.layer.memory
        assert x.dtype == torch.bfloat16
        rows_of_a = memory.a_proj.weight.to(x.dtype)
        a = torch.nn.functional.linear(x, rows_of_a).float()

        def decay(dtype: torch.dtype, memory: Any = memory, a: Any = a) -> torch.Tensor:
            rate, bias = (w.detach().to(dtype).float() for w in (memory.A_log, memory.dt_bias))
            return -rate.exp() * torch.nn.functional.softplus(a + bias)

        torch.testing.assert_close(trace.g, decay(torch.float32)[..., heads], rtol=1e-6, atol=0)
        rounded = decay(torch.bfloat16)[..., heads]
        assert ((rounded - trace.g) / trace.g).abs().max() > 1e-4
    for name in names:  # that gradients are right is tested in float64, in `test_modes`
        weight = model.get_parameter(name)
        assert weight.dtype == weight.grad.dtype == torch.float32, name


@pytest.mark.parametrize("tensor", [None, "tensor"])
def test_mixed_precision_leaves_the_decay_in_float32(workers, tensor):
    workers.run(decays, 4, tensor)


def test_replicas_need_one_dimension_to_shard_over():
    mesh = SimpleNamespace(mesh_dim_names=("copies", "data", "context"))
    with pytest.raises(ValueError, match="replicate: expected beside it one dimension"):
        parallelize(decoder(), mesh, replicate="copies")
    with pytest.raises(ValueError, match="replicate: expected a dimension of the mesh"):
        parallelize(decoder(), mesh, replicate="other")


def test_a_model_without_a_ham_layer_is_named():
    with pytest.raises(ValueError, match="model: expected blocks that hold a HAMLayer"):
        parallelize(torch.nn.Linear(2, 2), None)
