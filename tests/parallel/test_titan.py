"""HAM models on torchtitan: jobs of four ranks train as one process does, and are saved for transformers."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.functional import cross_entropy

pytest.importorskip("torchtitan", reason="needs the extra titan", exc_type=ImportError)

import titan_on_cpu  # first: it chooses the device
import torchtitan.components.metrics as titan_metrics
from titan_on_cpu import NoMonitor
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.config import ConfigManager, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.trainer import Trainer

from hamblocks.models import HAMConfig, HAMForCausalLM
from hamblocks.models.policies import policy_of
from hamblocks.titan import (
    HAMCheckpointManager,
    HAMMetrics,
    HAMStateDictAdapter,
    HAMTitanModel,
    model_spec,
)
from hamblocks.titan.config_registry import ham_1b, ham_400m, ham_debugmodel
from hamblocks.titan.metrics import metrics_of
from hamblocks.titan.parallel import parallelize_ham
from hamblocks.titan.text_bytes import FileRows

ROWS, TOKENS = 4, 48
SMALL = {
    "vocab_size": 256,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "selector": {
        "type": "any_of",
        "of": [
            {"type": "threshold", "controller": {"type": "target_fraction", "fraction": 0.4}},
            {"type": "window", "width": 3},
        ],
    },
}
DEGREES = {
    "data": {"data_parallel_shard_degree": 4},
    "hybrid": {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2},
    "heads": {"data_parallel_shard_degree": 2, "tensor_parallel_degree": 2},
    "context": {"data_parallel_shard_degree": 2, "context_parallel_degree": 2},
}


def files(folder: Path) -> str:
    """Texts of different lengths, so that rows hold several documents and parts of one."""
    generator = torch.Generator().manual_seed(3)
    for number, length in enumerate([20, 131, 7, 64, 300]):
        text = bytes(torch.randint(97, 105, (length,), generator=generator).tolist())
        (folder / f"{number}.txt").write_bytes(text)
    return str(folder / "*.txt")


def job(folder: Path, degrees: dict[str, int], **options: Any) -> Any:
    config = ham_debugmodel()
    config.model_spec = model_spec("small", **SMALL)
    config.dump_folder = str(folder / "out")
    config.dataloader.dataset_path = str(folder / "*.txt")
    ranks = degrees.get("data_parallel_replicate_degree", 1) * degrees["data_parallel_shard_degree"]
    config.training.local_batch_size = 1 if "context_parallel_degree" in degrees else ROWS // ranks
    config.training.seq_len = TOKENS
    config.training.max_norm = 1e9
    config.training.mixed_precision_param = "float32"
    config.debug.seed, config.debug.enable_structured_logging = 7, False
    config.parallelism = ParallelismConfig(spmd_backend="partial_dtensor", **degrees)
    for name, value in options.items():
        setattr(config, name, value)
    return config


@contextlib.contextmanager
def trainer_of(config: Any) -> Any:
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    with mock.patch.object(titan_metrics, "build_device_memory_monitor", NoMonitor):
        trainer = config.build()
    try:
        yield trainer
    finally:
        trainer.close()
        gc.enable()  # torchtitan turns it off


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def whole_state(model: HAMTitanModel) -> dict[str, torch.Tensor]:
    return {name: full(x.detach()) for name, x in model.ham.state_dict().items()}


def trains(_: Any, folder: Path, kind: str, recompute: bool) -> None:
    config = job(
        folder, DEGREES[kind], activation_checkpoint=FullAC.Config() if recompute else None
    )
    with trainer_of(config) as trainer:
        [model] = trainer.model_parts
        torch.manual_seed(7)
        whole = HAMForCausalLM(HAMConfig(**SMALL))
        for name, x in whole_state(model).items():
            assert torch.equal(x, whole.state_dict()[name]), name
        rows = batches(config)
        iterator = trainer.batch_generator(trainer.dataloader)
        for step in (1, 2):
            whole.load_state_dict(whole_state(model))
            whole.zero_grad()
            tokens, positions, labels = next(rows)
            output = whole(tokens, position_ids=positions)
            losses = cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="sum")
            (losses / (labels >= 0).sum()).backward()
            trainer.step = step
            trainer.train_step(iterator)
            for (name, weight), other in zip(
                model.ham.named_parameters(), whole.parameters(), strict=True
            ):
                found = full(weight.grad)
                scale = other.grad.abs().max()
                torch.testing.assert_close(
                    found, other.grad, rtol=1e-3, atol=1e-4 * scale, msg=name
                )
            metrics = metrics_of(model)
            for layer, stats in enumerate(output.stats):
                kept = stats.keep_fraction().item()
                assert metrics[f"ham/kept/layer_{layer:02}"] == pytest.approx(kept, abs=1e-6)
                row = TOKENS * 2 * 2 * 4 * 4  # keys and values of two heads of 4 float32
                assert metrics[f"ham/cache_bytes/layer_{layer:02}"] == pytest.approx(kept * row)
                assert -1e9 < metrics[f"ham/tau/layer_{layer:02}"] < 1e9  # moved by the step
            assert kept == 1 if step == 1 else 0.2 < kept < 1


def batches(config: Any) -> Any:
    """The batches of all ranks in one, without torchtitan's loader."""
    degrees = config.parallelism
    ranks = degrees.data_parallel_replicate_degree * degrees.data_parallel_shard_degree
    sources = [
        iter(FileRows(config.dataloader.dataset_path, TOKENS, rank, ranks)) for rank in range(ranks)
    ]
    while True:
        rows = [next(source) for source in sources for _ in range(config.training.local_batch_size)]
        tokens, positions = (
            torch.stack([row[0][name] for row in rows]) for name in ("input", "positions")
        )
        yield tokens, positions, torch.stack([labels for _, labels in rows])


@pytest.mark.parametrize(
    ("kind", "recompute"),
    [("data", True), ("hybrid", False), ("heads", False), ("context", True)],
)
def test_a_job_has_the_gradients_of_one_process(workers, tmp_path, kind, recompute):
    files(tmp_path)
    workers.run(trains, 4, tmp_path, kind, recompute)


def a_step(trainer: Trainer) -> None:
    iterator = trainer.batch_generator(trainer.dataloader)
    trainer.step = 1
    trainer.train_step(iterator)


def optimizer_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = trainer.optimizers.state_dict()
    return {name: full(x) for name, x in state.items() if isinstance(x, torch.Tensor)}


def saves(_: Any, folder: Path, kind: str, mode: str) -> dict[str, torch.Tensor]:
    """Saves a job after one step, and goes on from it in a job of another seed."""
    config = HAMCheckpointManager.Config(
        enable=True, interval=1, last_save_model_only=False, async_mode=mode
    )
    first = job(folder, DEGREES[kind], checkpoint=config)
    with trainer_of(first) as trainer:
        a_step(trainer)
        trainer.checkpointer.save(1)
        trainer.checkpointer.maybe_wait_for_saving()
        before = whole_state(trainer.model_parts[0])
        moments = optimizer_state(trainer)
    again = copy.deepcopy(first)
    again.debug.seed = 8
    with trainer_of(again) as trainer:
        trainer.checkpointer.load()
        assert trainer.step == 1
        for name, x in whole_state(trainer.model_parts[0]).items():
            assert torch.equal(x, before[name]), name
        loaded = optimizer_state(trainer)
        assert loaded.keys() == moments.keys()
        for name, x in loaded.items():
            assert torch.equal(x, moments[name]), name
    return before


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize(("kind", "mode"), [("data", "disabled"), ("heads", "async")])
def test_a_checkpoint_becomes_a_model_of_transformers(workers, tmp_path, kind, mode):
    files(tmp_path)
    saved = workers.run(saves, 4, tmp_path, kind, mode)[0]
    model = HAMForCausalLM(HAMConfig(**SMALL))
    state = {f"ham.{name}": x for name, x in model.state_dict().items()}
    dcp.load(state, checkpoint_id=str(tmp_path / "out/checkpoint/step-1"), no_dist=True)
    for name, x in model.state_dict().items():
        assert torch.equal(x, saved[name]), name


def saves_for_transformers(_: Any, folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Saves a job at its last step, and begins another with other ranks from what it saved."""
    config = HAMCheckpointManager.Config(enable=True, last_save_in_hf=True)
    first = job(folder, DEGREES[kind], checkpoint=config)
    with trainer_of(first) as trainer:
        a_step(trainer)
        trainer.checkpointer.save(1, last_step=True)
        saved = whole_state(trainer.model_parts[0])
    config = HAMCheckpointManager.Config(
        enable=True,
        folder="other",
        initial_load_in_hf=True,
        initial_load_path=str(folder / "out/checkpoint/step-1"),
    )
    others = {"data": "heads", "heads": "data"}
    second = job(folder, DEGREES[others[kind]], checkpoint=config)
    second.debug.seed = 8
    with trainer_of(second) as trainer:
        trainer.checkpointer.load()
        for name, x in whole_state(trainer.model_parts[0]).items():
            assert torch.equal(x, saved[name]), name
    return saved


@pytest.mark.parametrize("kind", ["data", "heads"])
def test_the_last_step_is_saved_for_transformers(workers, tmp_path, kind):
    files(tmp_path)
    saved = workers.run(saves_for_transformers, 4, tmp_path, kind)[0]
    model = HAMForCausalLM.from_pretrained(tmp_path / "out/checkpoint/step-1")
    assert model.state_dict().keys() == saved.keys()
    for name, x in model.state_dict().items():
        assert torch.equal(x, saved[name]), name
        assert "tau" not in name or x != 0  # a step has moved it


@pytest.mark.parametrize("changed", [{}, {"tie_word_embeddings": False}, {"gate": "entropy"}])
def test_names_of_weights_are_those_of_save_pretrained(tmp_path, changed):
    if "gate" in changed:
        from hamblocks import PredictionEntropy

        changed = {"gate": policy_of("gate", PredictionEntropy(256)), "tie_word_embeddings": False}
    spec = model_spec("small", **SMALL, **changed)
    model = spec.model.build()
    adapter = HAMStateDictAdapter(spec.model, None)
    state = model.state_dict()
    named = adapter.to_hf(dict(state))
    model.ham.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    assert named.keys() == saved.keys()
    for name, x in saved.items():
        assert torch.equal(x, named[name]), name
    again = adapter.from_hf(named)
    assert again.keys() == state.keys()
    for name, x in state.items():
        assert torch.equal(x, again[name]), name


@pytest.mark.parametrize("name", ["ham_debugmodel", "ham_400m", "ham_1b"])
def test_jobs_are_found_by_name(name):
    args = ["--module", "hamblocks.titan", "--config", name, "--training.steps", "3"]
    config = ConfigManager().parse_args([*args, "--parallelism.tensor-parallel-degree", "2"])
    assert isinstance(config, Trainer.Config)
    assert isinstance(config.metrics, HAMMetrics.Config)
    assert config.training.steps == 3
    assert config.parallelism.tensor_parallel_degree == 2
    assert config.to_dict()["model_spec"]["model"]["ham"]["hidden_size"] >= 64


def test_the_command_trains(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", titan_on_cpu.__file__, "--module", "hamblocks.titan"]
    command += ["--config", "ham_debugmodel", "--training.steps", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    losses = {
        int(step): float(loss)
        for step, loss in re.findall(
            r"step: +(\d+)\W.*?loss: +([0-9.]+)", done.stderr + done.stdout
        )
    }
    assert losses.keys() == {1, 2, 3}
    assert losses[3] < losses[1]


@pytest.mark.parametrize(
    ("config", "low", "high"), [(ham_400m, 380e6, 420e6), (ham_1b, 1.0e9, 1.2e9)]
)
def test_sizes_are_what_they_are_called(config, low, high):
    spec = config().model_spec
    with torch.device("meta"):
        model = spec.model.build()
    count, flops = spec.model.get_nparams_and_flops(model, 4096)
    assert low < count < high
    assert flops == 6 * count  # tied


def dims(**degrees: int) -> Any:
    names = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")
    given = {name: degrees.get(name, 1) for name in names}
    size = given["dp_replicate"] * given["dp_shard"] * given["cp"] * given["tp"] * given["pp"]
    return ParallelDims(**given, world_size=size, spmd_backend="partial_dtensor")


@pytest.mark.parametrize(
    ("option", "given", "parallelism", "ac", "training"),
    [
        ("parallelism.spmd_backend", {}, {"spmd_backend": "spmd_types"}, None, {}),
        ("parallelism.pipeline_parallel_degree", {"pp": 2}, {}, None, {}),
        ("parallelism.expert_parallel_degree", {"dp_shard": 2, "ep": 2}, {}, None, {}),
        (
            "parallelism.context_parallel_load_balancer",
            {"cp": 2},
            {"context_parallel_load_balancer": "ptrr"},
            None,
            {},
        ),
        ("training.enable_cpu_offload", {}, {}, None, {"enable_cpu_offload": True}),
        ("activation_checkpoint", {}, {}, SelectiveAC.Config(), {}),
    ],
)
def test_what_cannot_be_done_is_named(option, given, parallelism, ac, training):
    parallelism = {"spmd_backend": "partial_dtensor", **parallelism}
    with pytest.raises(ValueError, match=f"{option}: expected"):
        parallelize_ham(
            None,
            parallel_dims=dims(**given),
            training=TrainingConfig(**training),
            parallelism=ParallelismConfig(**parallelism),
            compile_config=None,
            ac_config=ac,
            dump_folder="",
        )


def test_a_whole_job_is_checked():
    config = ham_debugmodel()
    config.training.disable_cuda_graphs = False
    with pytest.raises(ValueError, match=r"training.disable_cuda_graphs: expected True"):
        config.model_spec.model.update_from_config(config=config)
    config = ham_debugmodel()
    config.checkpoint.enable, config.parallelism.tensor_parallel_degree = True, 2
    config.model_spec.model.update_from_config(config=config)
    config.checkpoint.async_mode = "async_with_pinned_mem"
    with pytest.raises(ValueError, match=r"checkpoint.async_mode: expected 'disabled'"):
        config.model_spec.model.update_from_config(config=config)
    config.checkpoint = CheckpointManager.Config(enable=True)
    with pytest.raises(ValueError, match=r"checkpoint: expected HAMCheckpointManager"):
        config.model_spec.model.update_from_config(config=config)
    config.parallelism.tensor_parallel_degree = 1
    config.model_spec.model.update_from_config(config=config)
    config.checkpoint.last_save_in_hf = True
    with pytest.raises(ValueError, match=r"checkpoint: expected HAMCheckpointManager"):
        config.model_spec.model.update_from_config(config=config)
    with pytest.raises(ValueError, match="hidden_size"):
        model_spec("bad", **{**SMALL, "hidden_size": 15})


def test_rows_are_the_bytes_of_files(tmp_path):
    pattern = files(tmp_path)
    texts = [path.read_bytes() for path in sorted(tmp_path.glob("*.txt"))]
    rows = FileRows(pattern, TOKENS, 0, 1)
    known = [  # of every byte: itself, its place in its file, and the byte that follows
        (byte, place, text[place + 1] if place + 1 < len(text) else -100)
        for text in texts
        for place, byte in enumerate(text)
    ]
    assert rows.rows == (len(known) - 1) // TOKENS > 5
    for number in range(2 * rows.rows):
        given, labels = rows.row(number)
        begin = number % rows.rows * TOKENS
        for column in range(TOKENS):
            byte, place, label = known[begin + column]
            assert given["input"][column] == byte
            assert given["positions"][column] == min(place, column)
            assert labels[column] == label
    other = FileRows(pattern, TOKENS, 1, 2)
    first = next(iter(other))
    assert torch.equal(first[0]["input"], rows.row(1)[0]["input"])
    resumed = FileRows(pattern, TOKENS, 1, 2)
    resumed.load_state_dict(other.state_dict())
    assert torch.equal(next(iter(resumed))[1], rows.row(3)[1])
    with pytest.raises(ValueError, match=r"dataloader.dataset_path: expected files"):
        FileRows(str(tmp_path / "none*"), TOKENS, 0, 1)
