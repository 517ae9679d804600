"""The command line: `hamblocks demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Building blocks for Hybrid Associative Memory.")


@app.callback()
def main() -> None:
    """Building blocks for Hybrid Associative Memory."""


@app.command()
def demo(
    text: Annotated[
        Path | None,
        typer.Option(help="Train on this file, not on the standard library.", exists=True, dir_okay=False),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Training steps of each model. By default those of about four minutes.", min=1),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and random routing.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for results.json, table.md and chart.png.", file_okay=False)] = Path(
        "out"
    ),
) -> None:
    """Trains four byte-level language models that differ in one part, and measures what each stores and predicts."""
    from hamblocks.demo import Corpus, Settings, chart, run, table
    from hamblocks.demo.report import markdown

    console = Console()
    try:
        corpus = Corpus.standard_library() if text is None else Corpus.from_file(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(
        f"{corpus.source}: {len(corpus.train):,} bytes to train on, {len(corpus.held_out):,} held out (other files)"
        if text is None
        else f"{corpus.source}: {len(corpus.train):,} bytes to train on, the last {len(corpus.held_out):,} held out"
    )
    columns = (
        TextColumn("{task.description:26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[remark]}"),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(name: str, done: int, total: int, remark: str) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total, remark="")
            bars.update(tasks[name], completed=done, remark=remark)

        results = run(Settings(seed=seed) if steps is None else Settings(steps=steps, seed=seed), corpus, progress)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results.to_json(), indent=1) + "\n")
    (out / "table.md").write_text(markdown(results))
    chart(results, out / "chart.png")
    console.print(table(results))
    for growth in results.growth:
        console.print(
            f"{growth.name}: {growth.stored[-1]:,.0f} of {growth.tokens[-1]:,} tokens stored per head "
            f"({growth.stored[-1] / growth.tokens[-1]:.1%})"
        )
    written = ", ".join(str(out / name) for name in ("results.json", "table.md", "chart.png"))
    console.print(f"{results.seconds:.0f} s in all on {results.device}. Written: {written}")
