"""What is measured of a model under one policy at one fraction."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hamblocks.experiments.evaluation.documents import Documents, Question
from hamblocks.experiments.evaluation.subjects import Subject
from hamblocks.models.cache import StateCache
from hamblocks_ops import NEVER

PIECE = 256
"""Tokens of a document that are read in one call: their logits fit into memory."""

STEPS = 4
"""Tokens that are decoded one by one to measure the speed."""


@dataclass
class Answer:
    """Whether a line was recalled: the greedy answer is right in every token.

    Attributes:
        kind: of the line.
        depth: where it stands.
        found: whether all tokens are right.
        nll: mean over the tokens of the answer, nats.
    """

    kind: str
    depth: float
    found: bool
    nll: float


@dataclass
class Measured:
    """Results on one batch of documents.

    Attributes:
        nll: nats per token of text.
        nll_by_document: the same for every document.
        answers: to every question about every document.
        stored: fraction of the tokens that are stored for good, mean over layers and heads; sinks
            count, the window does not.
        bytes_in_use: pages, tables, memories and ledgers after all documents were read.
        bytes_allocated: the same with the free pages of the pools.
        prefill_tokens_per_second: read in pieces.
        decode_tokens_per_second: one token of every document at a time.
    """

    nll: float
    nll_by_document: list[float]
    answers: list[Answer]
    stored: float
    bytes_in_use: int
    bytes_allocated: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float

    def recall(self, kind: str) -> float:
        """Fraction of the lines of one kind that are recalled."""
        found = [answer.found for answer in self.answers if answer.kind == kind]
        return sum(found) / len(found) if found else 0.0

    def to_json(self) -> dict[str, Any]:
        """Lists, dicts and numbers."""
        return asdict(self)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Measured:
        """From what `to_json` gave."""
        return cls(**{**saved, "answers": [Answer(**answer) for answer in saved["answers"]]})


@torch.no_grad()
def measure(subject: Subject, documents: Documents) -> Measured:
    """Reads the documents into a cache, and asks the questions from copies of it."""
    cache = subject.cache()
    tokens, counts = documents.tokens, documents.counts
    loss = torch.zeros(counts.shape, device=tokens.device)
    first = int(counts.any(0).int().argmax())  # no document counts a prediction before this one
    stored, end, began = [], 0, time.perf_counter()
    for piece in tokens.split(PIECE, 1):
        end += piece.shape[1]
        keep = max(1, min(piece.shape[1], end - first))
        called = subject(piece, cache, keep)
        wanted = tokens[:, end - keep + 1 : end + 1]  # nothing follows the last token
        predicted = _losses(called.logits[:, : wanted.shape[1]].float(), wanted)
        loss[:, end - keep : end - keep + wanted.shape[1]] = predicted
        # the mean over heads of a layer, so that layers count alike
        stored.append(torch.stack([_kept(one.evict_at) for one in called.stats]).mean(0))
    seconds = time.perf_counter() - began
    each = (loss * counts).sum(1) / counts.sum(1)
    answers = _ask(subject, cache, documents.questions)
    in_use, allocated = bytes_of(cache)
    return Measured(
        nll=float((loss * counts).sum() / counts.sum()),
        nll_by_document=each.tolist(),
        answers=answers,
        stored=float(torch.cat(stored).mean()),
        bytes_in_use=in_use,
        bytes_allocated=allocated,
        prefill_tokens_per_second=tokens.numel() / seconds,
        decode_tokens_per_second=_decoding(subject, cache, tokens),
    )


def bytes_of(cache: StateCache) -> tuple[int, int]:
    """Bytes in use, and bytes allocated."""
    states = cache.states or []
    free = sum(
        state.cache.capacity_nbytes - state.cache.nbytes
        for state in states
        if state.cache is not None
    )
    return cache.nbytes, cache.nbytes + free


def _kept(evict_at: Tensor | None) -> Tensor:
    """The fraction of heads that store a token for good, `[T]`, mean over sequences."""
    assert evict_at is not None
    return (evict_at == NEVER).float().mean((0, 2))


def _losses(logits: Tensor, tokens: Tensor) -> Tensor:
    loss = cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    return loss.view(tokens.shape)


def _ask(subject: Subject, cache: StateCache, questions: list[Question]) -> list[Answer]:
    """The answers to all questions, one after the other; those of one length are asked together."""
    of_length: dict[tuple[int, int], list[int]] = {}
    for place, question in enumerate(questions):
        length = question.tokens.shape[1], question.answers.shape[1]
        of_length.setdefault(length, []).append(place)
    found: dict[int, list[Answer]] = {}
    for places in of_length.values():
        alike = [questions[place] for place in places]
        wanted = torch.cat([question.answers for question in alike])
        asked = torch.cat([torch.cat([one.tokens, one.answers[:, :-1]], 1) for one in alike])
        fork = cache.fork()
        fork.batch_select_indices(torch.cat([question.rows for question in alike]))
        logits = subject(asked, fork, wanted.shape[1]).logits.float()
        right = iter((logits.argmax(-1) == wanted).all(1).tolist())
        nll = iter(_losses(logits, wanted).mean(1).tolist())
        for place, question in zip(places, alike, strict=True):
            kind, depths = question.kind, question.depths
            found[place] = [Answer(kind, depth, next(right), next(nll)) for depth in depths]
    return [answer for place in range(len(questions)) for answer in found[place]]


def _decoding(subject: Subject, cache: StateCache, tokens: Tensor) -> float:
    fork = cache.fork()
    subject(tokens[:, :1], fork)  # the first call after a fork copies shared pages
    began = time.perf_counter()
    for step in range(1, STEPS + 1):
        subject(tokens[:, step : step + 1], fork)
    return tokens.shape[0] * STEPS / (time.perf_counter() - began)
