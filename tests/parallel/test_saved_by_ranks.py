"""Checkpoints of torch.distributed: saved on four ranks, loaded on any number, thresholds included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import hamblocks as hb
from hamblocks.models import HAMConfig, HAMForCausalLM
from hamblocks.parallel.planners import SplitLoadPlanner, SplitSavePlanner
from hamblocks.parallelize import parallelize, split_heads

VOCAB = 17
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def decoder(seed: int) -> hb.Decoder:
    torch.manual_seed(seed)
    return hb.Decoder(
        VOCAB, 2, lambda _: hb.HAMLayer(16, 2, selector=hb.Threshold(hb.TargetFraction(0.4)))
    )


def tokens(seed: int, rows: int) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, 24), generator=torch.Generator().manual_seed(seed))


def sharded(model: Any, group: Any) -> Any:
    mesh = DeviceMesh.from_group(dist.group.WORLD if group is None else group, "cpu")
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    hb.hook_controllers(optimizer, model)
    for step in range(steps):
        own = tokens(step, 8).chunk(dist.get_world_size())[dist.get_rank()]
        logits = model(own[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), own[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def full(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: x.full_tensor() if hasattr(x, "full_tensor") else x.clone()
        for name, x in model.state_dict().items()
    }


def save(group: Any, folder: Path) -> dict[str, torch.Tensor]:
    model = sharded(decoder(0), group)
    train(model, 3)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=str(folder))
    return full(model)


def load(group: Any, folder: Path) -> dict[str, torch.Tensor]:
    model = sharded(decoder(1), group)
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=str(folder), process_group=group)
    set_model_state_dict(model, state["model"])
    return full(model)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_four_ranks_save_and_others_load(workers, tmp_path, ranks):
    saved = workers.run(save, 4, tmp_path / "dcp")
    for other in saved[1:]:
        for name, x in saved[0].items():
            assert torch.equal(x, other[name]), name
    for loaded in workers.run(load, ranks, tmp_path / "dcp"):
        assert loaded.keys() == saved[0].keys()
        for name, x in saved[0].items():
            assert torch.equal(x, loaded[name]), name


def test_one_file_of_it_is_a_plain_model(workers, tmp_path):
    saved = workers.run(save, 4, tmp_path / "dcp")[0]
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "model.pt")
    model = decoder(1)
    model.load_state_dict(torch.load(tmp_path / "model.pt")["model"])
    for name, x in model.state_dict().items():
        assert torch.equal(x, saved[name]), name
    taus = [layer.selector.controller.tau for layer in model.stack.layers]
    assert all(tau.isfinite() for tau in taus)
    assert len(set(taus)) == 2


# heads are split


def split(group: Any, seed: int, data: int) -> tuple[Any, torch.optim.Optimizer]:
    """A decoder whose heads the ranks of a group share, on `data` copies of shards, and an optimizer."""
    torch.manual_seed(seed)
    model: Any = hb.Decoder(VOCAB, 2, lambda _: hb.HAMLayer(16, 4, selector=hb.TopK(4)))
    if data > 1:
        mesh = init_device_mesh("cpu", (data, 4 // data), mesh_dim_names=("data", "tensor"))
        parallelize(model, mesh, tensor="tensor")
    elif dist.get_world_size(group) > 1:
        group = dist.group.WORLD if group is None else group
        split_heads(model, DeviceMesh.from_group(group, "cpu"), src_data_rank=None)
    return model, torch.optim.AdamW(model.parameters(), 1e-2)


def state_of(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    states = get_state_dict(model, optimizer, options=options)
    return dict(zip(("model", "optimizer"), states, strict=True))


def whole_of(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.full_tensor() if hasattr(x, "full_tensor") else x
        for part in state.values()
        for name, x in part.items()
    }


def save_split(group: Any, folder: Path, data: int) -> dict[str, Any]:
    model, optimizer = split(group, 0, data)
    for _ in range(2):
        model(tokens(0, 2)).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = state_of(model, optimizer)
    if dist.get_rank() < dist.get_world_size(group):  # the other groups have trained the same
        given = {"checkpoint_id": str(folder), "process_group": group}
        with pytest.raises(CheckpointException, match="Failed to validate global plan"):
            dcp.save(state, **given)
        dcp.save(state, planner=SplitSavePlanner(), **given)
    dist.barrier()
    return whole_of(state)


def load_split(group: Any, folder: Path, planner: Any) -> dict[str, Any]:
    model, optimizer = split(group, 1, 1)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=str(folder), process_group=group, planner=planner())
    both = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    set_state_dict(model, optimizer, options=options, **both)
    return whole_of(state_of(model, optimizer))


@pytest.mark.parametrize(("ranks", "data"), [(2, 1), (4, 2)])
def test_ranks_that_share_heads_save_and_others_load(workers, tmp_path, ranks, data):
    saved = workers.run(save_split, ranks, tmp_path / "dcp", data)[0]
    assert any(name.endswith("mlp.up_proj.weight.exp_avg") for name in saved)
    for number, planner in ((1, dcp.DefaultLoadPlanner), (4, SplitLoadPlanner)):
        for loaded in workers.run(load_split, number, tmp_path / "dcp", planner):
            assert loaded.keys() == saved.keys()
            for name, x in saved.items():
                same = torch.equal(x, loaded[name]) if torch.is_tensor(x) else x == loaded[name]
                assert same, name


def save_causal_lm(_: Any, folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = HAMForCausalLM(HAMConfig(**SIZES))
    parallelize(model, init_device_mesh("cpu", (4,), mesh_dim_names=("data",)))
    train(model, 2)
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(folder))
    return full(model)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_one_safetensors_file_for_transformers(workers, tmp_path):
    saved = workers.run(save_causal_lm, 4, tmp_path / "dcp")[0]
    model = HAMForCausalLM(HAMConfig(**SIZES))
    dcp.load({"model": model.state_dict()}, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    model.save_pretrained(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").glob("*.safetensors")] == [
        "model.safetensors"
    ]
    again = HAMForCausalLM.from_pretrained(tmp_path / "model")
    for name, x in again.state_dict().items():
        assert torch.equal(x, saved[name]), name
    taus = [layer.selector.left.controller.tau for layer in again.model.stack.layers]
    assert all(tau.isfinite() for tau in taus)
