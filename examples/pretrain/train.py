"""Trains a HAM decoder on the bytes of text files, on any number of ranks.

torchrun --nproc-per-node 2 examples/pretrain/train.py --config examples/pretrain/tiny.toml

It goes on from the last checkpoint in its folder. SIGTERM ends it after a step, with a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import signal
import sysconfig
from glob import glob
from pathlib import Path
from typing import Any

import tomllib
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import SummaryWriter

import hamblocks as hb
from hamblocks.parallel import ContextShard
from hamblocks.parallelize import parallelize

VOCAB = 256


class Text:
    """Sequences from files, in an order that a step's number tells: nothing of it is saved."""

    def __init__(self, patterns: list[str], tokens: int, seed: int) -> None:
        names = [name.format(stdlib=sysconfig.get_path("stdlib")) for name in patterns]
        paths = sorted(path for name in names for path in glob(name, recursive=True))
        # mapped, not read: a file may be larger than memory
        files = [
            torch.from_file(path, size=Path(path).stat().st_size, dtype=torch.uint8)
            for path in paths
        ]
        self.tokens, self.seed = tokens, seed
        self.places = [
            (file, begin) for file in files for begin in range(0, len(file) - tokens, tokens)
        ]
        if not self.places:
            raise SystemExit(f"data.files: expected files of more than {tokens} bytes, got {paths}")

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Sequences `first` to `first + count` of an endless order, int64 `[count, tokens + 1]`."""
        rows = []
        for number in range(first, first + count):
            epoch, index = divmod(number, len(self.places))
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.places), generator=generator)
            file, begin = self.places[order[index]]
            rows.append(file[begin : begin + self.tokens + 1])
        return torch.stack(rows).long()


def decoder(sizes: dict[str, Any]) -> hb.Decoder:
    """The model: what docs/routing.md recommends."""

    def layer(_: int) -> hb.HAMLayer:
        kept = hb.Threshold(hb.TargetFraction(sizes["fraction"])) | hb.Window(sizes["window"])
        attention = hb.SelectedAttention(conv_size=2)
        gate = hb.SharedGate(hb.PredictionError())
        parts = {"selector": kept, "gate": gate, "attention": attention}
        return hb.HAMLayer(sizes["hidden_size"], sizes["heads"], **parts)

    return hb.Decoder(VOCAB, sizes["layers"], layer)


def main(config: dict[str, Any]) -> None:
    """Trains, from the last checkpoint on."""
    data, train, out = config["data"], config["train"], Path(config["out"]["folder"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks, context = dist.get_rank(), dist.get_world_size(), config["ranks"]["context"]
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh = init_device_mesh(device, (ranks // context, context), mesh_dim_names=("data", "context"))
    mine, share = mesh.get_local_rank("data"), data["batch"] // (ranks // context)
    if share * (ranks // context) != data["batch"]:
        raise SystemExit(
            f"data.batch: expected a multiple of {ranks // context} ranks, got {data['batch']}"
        )
    torch.manual_seed(train["seed"])
    model: Any = decoder(config["model"]).to(device)
    dtype = torch.bfloat16 if device == "cuda" else None
    parallelize(model, mesh, recompute=train["recompute"], param_dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), train["learning_rate"])
    hb.hook_controllers(optimizer, model)
    text = Text(data["files"], data["tokens"], train["seed"])
    shard = ContextShard(data["tokens"], group=mesh.get_group("context"))
    total = data["batch"] * data["tokens"]

    step, last = 0, sorted(out.glob("step-*/.metadata"))
    if last:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments, "step": torch.tensor(0)}
        dcp.load(state, checkpoint_id=str(last[-1].parent))
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        step = int(state["step"])
    stop = torch.zeros(1, device=device)
    signal.signal(signal.SIGTERM, lambda *_: stop.fill_(1))
    board = SummaryWriter(str(out / "board"), purge_step=step) if rank == 0 else None
    while step < train["steps"]:
        rows = text.rows(step * data["batch"] + mine * share, share).to(device)
        tokens, target = shard.take(rows[:, :-1]), shard.take(rows[:, 1:])
        for group in optimizer.param_groups:
            group["lr"] = train["learning_rate"] * min(1, (step + 1) / train["warmup"])
        result = model(tokens, shard=shard)
        logits = result.logits.flatten(0, 1).float()
        loss = cross_entropy(logits, target.flatten(), reduction="sum") / total
        (loss * ranks).backward()  # FSDP averages gradients over ranks
        optimizer.step()
        optimizer.zero_grad()
        kept = torch.stack([stats.keep_fraction() for stats in result.stats]) / ranks
        seen = torch.cat([loss.detach()[None], kept.to(loss.dtype), stop])
        dist.all_reduce(seen)
        step += 1
        if board is not None:
            board.add_scalar("loss", seen[0], step)
            for layer, fraction in enumerate(seen[1:-1].tolist()):
                board.add_scalar(f"kept/layer_{layer}", fraction, step)
            with (out / "losses.jsonl").open("a") as lines:
                lines.write(json.dumps({"step": step, "loss": seen[0].item()}) + "\n")
        is_last = step == train["steps"] or bool(seen[-1])
        if is_last or step % config["out"]["checkpoint_every"] == 0:
            weights, moments = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": moments, "step": torch.tensor(step)}
            dcp.save(state, checkpoint_id=str(out / f"step-{step:08d}"))
        if seen[-1]:
            break
    if board is not None:
        board.close()
    dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    main(tomllib.loads(parser.parse_args().config.read_text()))
