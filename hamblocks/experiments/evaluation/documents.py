"""Documents: held-out text with a passkey and lines of keys and values in it, and questions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hamblocks.experiments.retrofit_text import Text
from hamblocks_ops.arguments import wrong

PASSKEY = "passkey"
KEY_VALUE = "key and value"
LEAST = 256
"""The loss counts tokens from here on: before, a window sees most of the text."""

NAMES = tuple(
    "Lisbon Oslo Cairo Lima Hanoi Delhi Rome Paris Berlin Madrid Dublin Vienna Prague Warsaw "  # noqa: SIM905
    "Athens London Moscow Tokyo Havana Boston Denver Dallas Austin Seattle".split()
)
"""Keys of lines; those that the tokenizer gives the most frequent length are used."""


class Question(NamedTuple):
    """One question about some documents of a batch.

    Attributes:
        kind: `PASSKEY` or `KEY_VALUE`.
        rows: int64 `[n]`, the documents.
        tokens: int64 `[n, Q]`, the question, up to the answer.
        answers: int64 `[n, A]`.
        depths: for each document, where the line stands: tokens before it over all tokens.
    """

    kind: str
    rows: Tensor
    tokens: Tensor
    answers: Tensor
    depths: list[float]


class Documents(NamedTuple):
    """A batch of documents.

    Attributes:
        tokens: int64 `[N, T]`.
        counts: bool `[N, T - 1]`, whether the loss counts the prediction of token t + 1: text, and
            not a line that was put into it.
        questions: each about the documents that hold such a line.
    """

    tokens: Tensor
    counts: Tensor
    questions: list[Question]


class _Line(NamedTuple):
    kind: str
    text: str
    question: str
    answer: str


def sources_of(tokenizer: Any, texts: Sequence[Text]) -> list[list[int]]:
    """The tokens of all topics, and those of all source files: what documents are drawn from.

    It takes longer than drawing them: call it once for all seeds.
    """
    return [
        _ids(tokenizer, "\n\n".join(t.text for t in texts if t.name.startswith(start)))
        for start in ("topics/", "lib/")
    ]


def documents_of(
    tokenizer: Any,
    sources: Sequence[list[int]],
    *,
    seed: int,
    count: int,
    length: int,
    lines: int = 2,
) -> Documents:
    """Draws documents from topics and from source files.

    The first and every second one after it hold a passkey, the others lines with a key and a value.
    The lines stand at depths that are spread over the document.

    Args:
        tokenizer: of transformers.
        sources: where to draw from, see `sources_of`.
        seed: of the places, names and numbers.
        count: documents, N.
        length: tokens of a document, T.
        lines: lines with a key and a value in a document; 0: no passkey either.

    Raises:
        ValueError: `length` leaves no room for text, or the texts are shorter than a document.
    """
    draw = random.Random(seed)
    sources = [source for source in sources if len(source) > length]
    if not sources:
        raise wrong("length", "documents shorter than the text they are drawn from", length)
    names = _of_one_length(tokenizer, NAMES)
    rows, masks = [], []
    asked: dict[str, list[list[tuple[int, _Line, float]]]] = {PASSKEY: [], KEY_VALUE: []}
    for n in range(count):
        if not lines:
            inserted = []
        elif n % 2 == 0:
            inserted = [_passkey(tokenizer, draw)]
        else:
            inserted = [_key_value(tokenizer, name, draw) for name in draw.sample(names, lines)]
        # both kinds of line stand in all sources; without lines the sources take turns
        source = sources[(n // 2 if lines else n) % len(sources)]
        row, mask, depths = _with_lines(tokenizer, source, inserted, length, draw)
        rows.append(row)
        masks.append(mask)
        if inserted:
            placed = [(n, line, depth) for line, depth in zip(inserted, depths, strict=True)]
            asked[inserted[0].kind].append(placed)
    counts = torch.tensor(masks)[:, 1:].clone()
    counts[:, : min(LEAST, length // 2)] = False
    questions = [
        _question(tokenizer, kind, column)
        for kind, of_documents in asked.items()
        for column in zip(*of_documents, strict=True)
    ]
    return Documents(torch.tensor(rows), counts, questions)


def plain_text(
    tokenizer: Any, sources: Sequence[list[int]], *, seed: int, count: int, length: int
) -> Tensor:
    """Pieces of text without lines, int64 `[N, T]`, to calibrate thresholds on."""
    return documents_of(tokenizer, sources, seed=seed, count=count, length=length, lines=0).tokens


def _passkey(tokenizer: Any, draw: random.Random) -> _Line:
    key = _number(tokenizer, draw, 10_000, 99_999)
    line = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
    return _Line(PASSKEY, line, "\nWhat is the pass key? The pass key is", f" {key}")


def _key_value(tokenizer: Any, name: str, draw: random.Random) -> _Line:
    value = _number(tokenizer, draw, 1000, 9999)
    line = f"\nThe code of {name} is {value}. Remember it. {value} is the code of {name}.\n"
    question = f"\nWhat is the code of {name}? The code of {name} is"
    return _Line(KEY_VALUE, line, question, f" {value}")


def _number(tokenizer: Any, draw: random.Random, low: int, high: int) -> int:
    """A number whose tokens are as many as those of most numbers of this range."""
    some = random.Random(0)
    lengths = [len(_ids(tokenizer, f" {some.randint(low, high)}")) for _ in range(32)]
    usual = max(set(lengths), key=lengths.count)
    while True:
        number = draw.randint(low, high)
        if len(_ids(tokenizer, f" {number}")) == usual:
            return number


def _of_one_length(tokenizer: Any, names: Sequence[str]) -> list[str]:
    lengths = [len(_ids(tokenizer, f" {name}")) for name in names]
    usual = max(set(lengths), key=lengths.count)
    return [name for name, length in zip(names, lengths, strict=True) if length == usual]


def _with_lines(
    tokenizer: Any, source: list[int], lines: list[_Line], length: int, draw: random.Random
) -> tuple[list[int], list[bool], list[float]]:
    """A piece of text with lines at spread depths, which tokens are text, and the depths."""
    pieces = [_ids(tokenizer, line.text) for line in lines]
    row = _start(tokenizer)
    room = length - len(row) - sum(map(len, pieces))
    if room < length // 2:
        raise wrong("length", f"at least {2 * sum(map(len, pieces))} tokens", length)
    begin = draw.randrange(len(source) - room)
    text = source[begin : begin + room]
    # the last fifth stays free: a window would see a line there
    borders = [int(room * 0.8 * (i + draw.random()) / len(lines)) for i in range(len(lines))]
    mask = [False] * len(row)
    depths = []
    for i, piece in enumerate(pieces):
        before = text[borders[i - 1] if i else 0 : borders[i]]
        row += before
        mask += [True] * len(before)
        depths.append(len(row) / length)
        row += piece
        mask += [False] * len(piece)
    row += text[borders[-1] if borders else 0 :]
    return row, mask + [True] * (length - len(mask)), depths


def _question(tokenizer: Any, kind: str, column: Sequence[tuple[int, _Line, float]]) -> Question:
    rows = torch.tensor([n for n, _, _ in column])
    tokens = torch.tensor([_ids(tokenizer, line.question) for _, line, _ in column])
    answers = torch.tensor([_ids(tokenizer, line.answer) for _, line, _ in column])
    return Question(kind, rows, tokens, answers, [depth for _, _, depth in column])


def _start(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before a text, or none."""
    first = tokenizer("a").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens without those that a tokenizer puts around a text."""
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found
