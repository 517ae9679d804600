"""Task generators against naive scans: every answer stands in the text, where the task says."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hamblocks.experiments.corpus import Corpus
from hamblocks.experiments.tasks import (
    FILLER,
    IGNORED,
    KEY,
    QUESTION,
    VALUE,
    ByteText,
    InContextCopying,
    Recall,
    SelectiveCopying,
    Task,
    UnsurprisingNeedles,
)


def drawn(task, seed, count=3, size=None):
    batch = task.batch(count, torch.Generator().manual_seed(seed), size=size)
    length = task.length(task.size if size is None else size)
    for name, tensor in batch._asdict().items():
        assert tensor.shape == (count, length), name
        assert tensor.dtype == (torch.bool if name == "label" else torch.int64), name
    assert 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < task.vocab_size
    again = task.batch(count, torch.Generator().manual_seed(seed), size=size)
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    rows = zip(*(tensor.tolist() for tensor in batch), strict=True)
    return list(rows)


def of_kind(row, kind):
    return [t for t, k in enumerate(row[2]) if k == kind]


def asked(row):
    return [t for t, answer in enumerate(row[1]) if answer != IGNORED]


def check_filler_repeats(row, phrase):
    """What is neither key nor value nor question is one phrase, over and over."""
    filler = [row[0][t] for t in of_kind(row, FILLER)]
    assert filler == (filler[:phrase] * len(filler))[: len(filler)]
    assert len(set(filler[:phrase])) == min(phrase, len(filler))


seeds = st.integers(0, 2**31 - 1)


@given(seeds, st.booleans(), st.integers(1, 4), st.integers(1, 5), st.data())
@settings(deadline=None, max_examples=60)
def test_recall(seed, shared, burst, bursts, data):
    pairs = burst * bursts
    phrase = data.draw(st.integers(1, 6))
    questions = data.draw(st.integers(1, pairs))
    task = Recall(
        pairs,
        2 * pairs + phrase + data.draw(st.integers(0, 40)),
        questions=questions,
        symbols=80,
        phrase=phrase,
        burst=burst,
        shared_symbols=shared,
    )
    size = data.draw(st.integers(1, bursts)) * burst
    for row in drawn(task, seed, size=size):
        tokens, target, _, label = row
        keys, values = of_kind(row, KEY), of_kind(row, VALUE)
        assert [t + 1 for t in keys] == values
        assert len(keys) == size
        named = [tokens[t] for t in keys]
        assert len(set(named)) == size
        counts = Counter(tokens[: tokens.index(task.vocab_size - 1)])
        assert all(counts[symbol] == 1 for symbol in named)
        assert min(keys) >= phrase
        check_filler_repeats(row, phrase)
        known = {tokens[t]: tokens[t + 1] for t in keys}
        questions_at = asked(row)
        assert len(questions_at) == min(size, questions)
        assert len({tokens[t] for t in questions_at}) == len(questions_at)
        assert all(row[2][t] == QUESTION for t in questions_at)
        assert all(target[t] == known[tokens[t]] for t in questions_at)
        needed = {keys[named.index(tokens[t])] + 1 for t in questions_at}
        assert needed == {t for t, is_label in enumerate(label) if is_label}


def test_symbols_tell_the_kind_only_if_they_are_not_shared():
    def kinds(shared):
        task = Recall(16, 128, symbols=64, phrase=8, burst=4, shared_symbols=shared)
        of = {}
        for row in drawn(task, 0, count=200):
            for token, kind in zip(row[0], row[2], strict=True):
                if kind != QUESTION:
                    of.setdefault(token, set()).add(kind)
        return list(of.values())

    assert all(len(found) == 1 for found in kinds(False))
    assert all(found == {FILLER, KEY, VALUE} for found in kinds(True))


@given(seeds, st.integers(1, 12), st.integers(2, 8), st.integers(0, 40))
@settings(deadline=None, max_examples=40)
def test_unsurprising_needles(seed, marks, phrase, more):
    task = UnsurprisingNeedles(marks, 2 * marks + phrase + more, symbols=24, phrase=phrase)
    for row in drawn(task, seed):
        tokens, target, _, label = row
        keys = of_kind(row, KEY)
        assert len({tokens[t] for t in keys}) == len(keys) == marks
        # without the marks the text is one phrase, over and over: the values continue it
        text = [tokens[t] for t in range(tokens.index(task.vocab_size - 1)) if t not in keys]
        assert text == (text[:phrase] * len(text))[: len(text)]
        known = {tokens[t]: tokens[t + 1] for t in keys}
        assert {tokens[t]: target[t] for t in asked(row)} == known
        assert [t for t, is_label in enumerate(label) if is_label] == [t + 1 for t in keys]


@given(seeds, st.integers(1, 20), st.integers(1, 8), st.integers(0, 40), st.data())
@settings(deadline=None, max_examples=40)
def test_in_context_copying(seed, string, phrase, more, data):
    task = InContextCopying(string, string + 1 + phrase + more, symbols=32, phrase=phrase)
    size = data.draw(st.integers(1, string))
    for row in drawn(task, seed, size=size):
        tokens, target, _, label = row
        (start,) = of_kind(row, KEY)
        copied = tokens[start + 1 : start + 1 + size]
        assert tokens[start] == task.vocab_size - 1
        assert len(set(copied)) == size
        assert [target[t] for t in asked(row)] == copied
        assert asked(row) == list(range(len(tokens) - size, len(tokens)))
        # the copy is given as input, one token late
        assert tokens[-size:] == [tokens[start], *copied[:-1]]
        assert [t for t, is_label in enumerate(label) if is_label] == list(
            range(start + 1, start + 1 + size)
        )
        check_filler_repeats(row, phrase)


@given(seeds, st.integers(1, 10), st.integers(0, 10), st.integers(1, 8), st.integers(0, 40))
@settings(deadline=None, max_examples=40)
def test_selective_copying(seed, items, distractors, phrase, more):
    length = 2 * (items + distractors) + phrase + more
    task = SelectiveCopying(items, length, distractors=distractors, symbols=24, phrase=phrase)
    for row in drawn(task, seed):
        tokens, target, _, label = row
        keys = of_kind(row, KEY)
        marks = [tokens[t] for t in keys]
        assert marks == list(range(task.symbols, task.symbols + items))
        assert [target[t] for t in asked(row)] == [tokens[t + 1] for t in keys]
        assert [tokens[t] for t in asked(row)] == marks
        assert [t for t, is_label in enumerate(label) if is_label] == [t + 1 for t in keys]
        # without the items, what is not the phrase are the distractors, two symbols each
        rest = [tokens[t] for t in of_kind(row, FILLER)]
        in_phrase = set(rest[:phrase])
        assert sum(token not in in_phrase for token in rest) == 2 * distractors


@given(seeds, st.integers(1, 4), st.integers(2, 6))
@settings(deadline=None, max_examples=30)
def test_byte_text(seed, order, alphabet):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(alphabet, (400,), generator=generator).to(torch.uint8)
    task = ByteText(Corpus(text, text[:1], "random"), 40, order=order)
    whole = text.tolist()
    for tokens, target, kind, label in drawn(task, seed):
        assert target[:-1] == tokens[1:]
        known, needed = set(), set()
        # the last byte to be predicted is not among the tokens
        follow = [*tokens, target[-1]]
        assert any(whole[i : i + 41] == follow for i in range(360))
        for t in range(40):
            for s in range(t, order - 1, -1):
                begin = t + 1 - order
                if begin >= 0 and follow[s - order : s + 1] == follow[begin : t + 2]:
                    known.add(t)
                    needed.add(s)
                    break
        assert {t for t in range(40) if kind[t] == QUESTION} == known
        assert {t for t in range(40) if label[t]} == needed
        assert {t for t in range(40) if kind[t] == VALUE} == needed - known


TASKS = [
    Recall(8, 64, symbols=40),
    UnsurprisingNeedles(8, 64, symbols=40),
    InContextCopying(8, 64, symbols=40),
    SelectiveCopying(8, 64, distractors=8, symbols=40),
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_a_task_says_what_sizes_it_has(task):
    assert isinstance(task, Task)
    generator = torch.Generator()
    for size in (task.smallest - 1, task.size + 1):
        with pytest.raises(ValueError, match="size: expected an integer in"):
            task.batch(1, generator, size=size)
    small, full = task.length(task.smallest), task.length(task.size)
    assert small < full


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"pairs": 6, "burst": 4}, "pairs"),
        ({"pairs": 8, "length": 10}, "length"),
        ({"pairs": 8, "questions": 9}, "questions"),
        ({"pairs": 64, "symbols": 64}, "symbols"),
        ({"pairs": 0}, "pairs"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        Recall(**arguments)
