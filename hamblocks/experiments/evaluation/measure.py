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

STEPS = 8
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
    losses, stored, began = [], [], time.perf_counter()
    tokens, last = documents.tokens, None
    for piece in tokens.split(PIECE, 1):
        called = subject(piece, cache)
        logits = called.logits.float()
        ahead = logits[:, :-1] if last is None else torch.cat([last, logits[:, :-1]], 1)
        wanted = piece[:, 1:] if last is None else piece
        losses.append(_losses(ahead, wanted))
        last = logits[:, -1:]
        # the mean over heads of a layer, so that layers count alike
        stored.append(torch.stack([_kept(one.evict_at) for one in called.stats]).mean(0))
    seconds = time.perf_counter() - began
    loss, counts = torch.cat(losses, 1), documents.counts.to(tokens.device)
    each = (loss * counts).sum(1) / counts.sum(1)
    answers = [
        answer for question in documents.questions for answer in _ask(subject, cache, question)
    ]
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


def _ask(subject: Subject, cache: StateCache, question: Question) -> list[Answer]:
    fork, wanted = cache.fork(), question.answers
    fork.batch_select_indices(question.rows)
    asked = torch.cat([question.tokens, wanted[:, :-1]], 1)
    logits = subject(asked, fork).logits[:, -wanted.shape[1] :].float()
    right = (logits.argmax(-1) == wanted).all(1).tolist()
    nll = _losses(logits, wanted).mean(1).tolist()
    return [
        Answer(question.kind, depth, found, loss)
        for depth, found, loss in zip(question.depths, right, nll, strict=True)
    ]


def _decoding(subject: Subject, cache: StateCache, tokens: Tensor) -> float:
    fork = cache.fork()
    subject(tokens[:, :1], fork)  # the first call after a fork copies shared pages
    began = time.perf_counter()
    for step in range(1, STEPS + 1):
        subject(tokens[:, step : step + 1], fork)
    return tokens.shape[0] * STEPS / (time.perf_counter() - began)
