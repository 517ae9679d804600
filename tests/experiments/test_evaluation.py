"""`hamblocks evaluate` on tiny random models: documents, policies, results that go on, reports."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from characters import CHARACTERS, character_tokenizer, tiny_llama
from rich.console import Console
from typer.testing import CliRunner

import hamblocks as hb
from hamblocks.cli import app
from hamblocks.experiments.evaluation import measure as measuring
from hamblocks.experiments.evaluation import study
from hamblocks.experiments.evaluation.documents import (
    KEY_VALUE,
    PASSKEY,
    documents_of,
    plain_text,
    sources_of,
)
from hamblocks.experiments.evaluation.measure import measure
from hamblocks.experiments.evaluation.policies import (
    DEFAULT,
    AtQuantile,
    PerHead,
    Plan,
    Policy,
    shared_out,
)
from hamblocks.experiments.evaluation.report import (
    TITLES,
    against_control,
    chart,
    markdown,
    table,
)
from hamblocks.experiments.evaluation.study import Results, run
from hamblocks.experiments.evaluation.subjects import set_parts, subject_of
from hamblocks.experiments.retrofit_text import Text, for_alignment, held_out
from hamblocks.models import HAMConfig, HAMForCausalLM
from hamblocks.ops import NEVER


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


def some(texts):
    """The first 2,000 characters of the first texts of both kinds: enough for tiny documents."""
    kinds = [[t for t in texts if t.name.startswith(kind)][:4] for kind in ("topics/", "lib/")]
    return [text._replace(text=text.text[:2000]) for kind in kinds for text in kind]


@pytest.fixture(autouse=True)
def _few_texts(monkeypatch):
    for name, texts in (("held_out", held_out), ("for_alignment", for_alignment)):
        monkeypatch.setattr(study, name, lambda texts=texts: some(texts()))


def converted():
    torch.manual_seed(0)
    config = HAMConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        layer_types=["linear_attention", "hybrid", "hybrid"],
        gate={"type": "learned_router"},
        selector={"type": "threshold", "controller": 0.0},
    )
    return HAMForCausalLM(config).eval()


SMALL = replace(
    DEFAULT, fractions=(0.25,), window=8, sinks=2, seeds=(0,), count=2, length=400, calibration=1
)


def named(*names, **changes):
    policies = tuple(policy for policy in DEFAULT.policies if policy.name in names)
    return replace(SMALL, policies=policies, **changes)


def quiet(*_):
    pass


def test_the_halves_share_no_text_and_are_both_of_topics_and_files():
    evaluated, aligned = ({text.name for text in half} for half in (held_out(), for_alignment()))
    assert not evaluated & aligned
    for half in (evaluated, aligned):
        for kind in ("topics/", "lib/"):
            assert sum(name.startswith(kind) for name in half) > 20


def test_documents_hold_their_lines_where_they_say(tokenizer):
    letters = "abcdefghij" * 300
    texts = [Text("topics/a", letters), Text("lib/b.py", letters.upper())]
    sources = sources_of(tokenizer, texts)
    sizes = {"count": 5, "length": 400, "lines": 2}
    made = documents_of(tokenizer, sources, seed=3, **sizes)
    assert made.tokens.shape == (5, 400)
    assert [question.kind for question in made.questions] == [PASSKEY, KEY_VALUE, KEY_VALUE]
    for question in made.questions:
        wanted = [0, 2, 4] if question.kind == PASSKEY else [1, 3]
        assert question.rows.tolist() == wanted
        for place, row in enumerate(question.rows.tolist()):
            text = tokenizer.decode(made.tokens[row])
            asked = tokenizer.decode(question.tokens[place]).rpartition("?")[2].strip()
            answer = tokenizer.decode(question.answers[place])
            # the line answers the question
            at = text.index(f"\n{asked}{answer}. Remember it.")
            assert question.depths[place] == at / 400 < 0.85
    # the loss counts letters, and none of the lines
    counted = made.tokens[:, 1:][made.counts]
    assert set(tokenizer.decode(counted)) <= set("abcdefghijABCDEFGHIJ")
    assert not made.counts[:, :200].any()
    again = documents_of(tokenizer, sources, seed=3, **sizes)
    assert torch.equal(again.tokens, made.tokens)
    assert not torch.equal(documents_of(tokenizer, sources, seed=4, **sizes).tokens, made.tokens)
    # text to calibrate on takes turns: thresholds are set on both kinds of text
    plain = plain_text(tokenizer, sources, seed=3, count=2, length=400)
    assert [set(tokenizer.decode(row)) <= set(letters) for row in plain] == [True, False]
    with pytest.raises(ValueError, match=r"^length: expected at least \d+ tokens, got"):
        documents_of(tokenizer, sources, seed=0, count=2, length=100)
    with pytest.raises(ValueError, match=r"^length: expected documents shorter than the text"):
        documents_of(tokenizer, sources, seed=0, count=2, length=4000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store": "all"}, "store: expected one of threshold, everything, window, got 'all'"),
        ({"decisions": "token"}, "decisions: expected layer or head"),
        ({"heads": "all"}, 'heads: expected "copying" or none'),
        ({"gate": None}, "gate: expected a gate, got None"),
        ({"store": "window"}, "gate: expected none, as nothing reads a score"),
        ({"share": 0.5}, 'share: expected heads = "copying" beside it'),
        ({"heads": "copying", "share": 2}, r"share: expected a number in \[0, 1\]"),
    ],
)
def test_a_policy_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=f"^policy 'a': {message}"):
        Policy(**{"name": "a", "gate": {"type": "key_norm"}, **changes})


def test_plans_are_read_from_files(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(DEFAULT.to_json()))
    assert Plan.load(path) == DEFAULT
    for text, message in (
        ("{", "policies: expected a JSON file"),
        ('{"policy": []}', "policies: expected an object with policies, fractions"),
        ('{"policies": 1}', "policies: expected a list of policies"),
        ('{"policies": [{"gate": 1}]}', "policies: expected objects with name, store"),
        ('{"policies": [{"name": "a", "gate": {"type": "norm"}}]}', "gate: expected one of"),
        ('{"policies": []}', "policies: expected one or more"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^{message}"):
            Plan.load(path)
    everything = Policy("all", store="everything")
    for changes in ({"fractions": (0,)}, {"seeds": (1, 1)}, {"length": 0}, {"window": -1}):
        with pytest.raises(ValueError, match=f"^{next(iter(changes))}: expected"):
            Plan((everything,), **changes)


def test_budgets_are_shared_out_between_heads():
    copying = torch.tensor([[0.1, 0.9], [0.3, 0.2], [0.8, 0.0]])
    apart = Policy("a", gate={"type": "key_norm"}, decisions="head")
    assert shared_out(apart, 0.3, lambda: copying, 3, 2) == [[0.3, 0.3]] * 3
    together = Policy("a", gate={"type": "key_norm"})
    assert shared_out(together, 0.3, lambda: copying, 3, 2) == [[0.3]] * 3
    heads = Policy("a", heads="copying")
    assert shared_out(heads, 0.34, lambda: copying, 3, 2) == [[0, 1], [0, 0], [1, 0]]
    both = Policy("a", heads="copying", share=0.5, gate={"type": "key_norm"})
    shares = torch.tensor(shared_out(both, 0.5, lambda: copying, 3, 2))
    assert shares[0, 1] == 1
    torch.testing.assert_close(shares.mean(), torch.tensor(0.5))
    assert shares.flatten().unique().numel() == 2


def test_thresholds_are_quantiles_of_the_first_call():
    score = torch.rand(2, 50, 3, generator=torch.Generator().manual_seed(0))
    selector = AtQuantile([0.2, 0.0, 1.0])
    stored = (selector(score).evict_at == NEVER).float().mean((0, 1))
    torch.testing.assert_close(stored, torch.tensor([0.2, 0.0, 1.0]))
    taus = selector.taus
    assert (selector(score + 1).evict_at == NEVER).float().mean((0, 1)).tolist() == [1, 0, 1]
    assert selector.taus == taus == selector.frozen().taus
    assert (AtQuantile([0.5])(score).evict_at == NEVER).float().mean((0, 1)).tolist() == [0.5] * 3


@pytest.mark.slow
def test_every_policy_is_measured_and_a_later_run_goes_on(tokenizer, tmp_path):
    model = tiny_llama()
    before = model.config._attn_implementation
    told = []
    results = run(model, tokenizer, SMALL, tmp_path, "tiny", lambda *one: told.append(one))
    assert model.config._attn_implementation == before
    assert len(told) == len(results.rows) == len(SMALL.policies)
    found = {row.policy: row.measured for row in results.rows}
    assert found["everything"].stored == 1
    assert found["window and sinks"].stored == pytest.approx(2 / 400)
    for name, measured in found.items():
        if name not in ("everything", "window and sinks"):
            # thresholds come from other text
            assert 0.12 < measured.stored < 0.4, name
        assert len(measured.answers) == 3
        assert found["window and sinks"].bytes_in_use <= measured.bytes_in_use
        assert measured.bytes_in_use <= found["everything"].bytes_in_use
        assert measured.bytes_in_use <= measured.bytes_allocated
    # the file holds all of it, and a run that was stopped goes on where it stood
    saved = json.loads((tmp_path / "evaluate.json").read_text())
    assert Results.of(saved).to_json() == saved
    del saved["rows"][3:5]
    (tmp_path / "evaluate.json").write_text(json.dumps(saved))
    again = []
    resumed = run(model, tokenizer, SMALL, tmp_path, "tiny", lambda *one: again.append(one))
    assert len(again) == 2
    for policy, measured in found.items():
        row = next(row.measured for row in resumed.rows if row.policy == policy)
        assert row.nll == pytest.approx(measured.nll, rel=1e-4)
    with pytest.raises(ValueError, match=r"^out: expected results of other \(model\), got"):
        run(model, tokenizer, SMALL, tmp_path, "other", quiet)
    with pytest.raises(ValueError, match=r"^out: expected results with window = 9, got"):
        run(model, tokenizer, replace(SMALL, window=9), tmp_path, "tiny", quiet)
    renamed = replace(SMALL, policies=(Policy("random", gate={"type": "key_norm"}),))
    with pytest.raises(ValueError, match=r"^policies: expected 'random' as in"):
        run(model, tokenizer, renamed, tmp_path, "tiny", quiet)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"^out: expected a folder without results, or with"):
        run(trained, tokenizer, SMALL, tmp_path, "tiny", quiet)
    # what is asked in addition stands beside what is there
    more = named("key norm", fractions=(0.5,))
    wider = run(model, tokenizer, more, tmp_path, "tiny", quiet)
    assert len(wider.rows) == len(results.rows) + 1
    assert wider.plan.fractions == (0.25, 0.5)


@pytest.mark.parametrize("piece", [64, 256])
@torch.no_grad()
def test_the_loss_and_the_answers_are_those_of_one_pass(tokenizer, monkeypatch, piece):
    """Whatever the pieces, the cache and the forks do; the loss counts from token 200 on."""
    monkeypatch.setattr(measuring, "PIECE", piece)
    model, plan = tiny_llama(), named("key norm")
    documents = documents_of(
        tokenizer, sources_of(tokenizer, some(held_out())), seed=0, count=2, length=400
    )
    gates = [hb.SharedGate(hb.KeyNorm()) for _ in range(2)]
    selectors = [hb.Threshold(-3.0) | hb.Window(8) for _ in range(2)]
    with subject_of(model, plan) as subject:
        set_parts(subject, gates, selectors)
        measured = measure(subject, documents)
        called = subject(documents.tokens)
        loss = torch.nn.functional.cross_entropy(
            called.logits[:, :-1].transpose(1, 2), documents.tokens[:, 1:], reduction="none"
        )
        assert measured.nll == pytest.approx(loss[documents.counts].mean().item(), rel=1e-4)
        stored = torch.stack([(s.evict_at == NEVER).float().mean() for s in called.stats]).mean()
        assert measured.stored == pytest.approx(stored.item(), abs=1e-3)
        answers = iter(measured.answers)
        for question in documents.questions:
            for row, asked, wanted in zip(*question[1:4], strict=True):
                whole = torch.cat([documents.tokens[row], asked, wanted[:-1]])[None]
                logits = subject(whole).logits[0, -len(wanted) :]
                answer = next(answers)
                assert answer.found == bool((logits.argmax(-1) == wanted).all())
                nll = torch.nn.functional.cross_entropy(logits, wanted).item()
                assert answer.nll == pytest.approx(nll, rel=1e-3)


def test_a_converted_model_is_measured_and_stays_as_it_was(tokenizer, tmp_path):
    model = converted()
    own = Policy("its own gate", gate={"type": "own"})
    plan = named("everything", "prediction error, l2", "written error", "copying heads")
    plan = replace(plan, policies=(*plan.policies, own))
    parts = [
        (block.block.layer.gate, block.block.layer.selector) for block in model.model.stack.blocks
    ]
    results = run(model, tokenizer, plan, tmp_path, "ham", quiet)
    assert len(results.rows) == 5
    assert parts == [
        (block.block.layer.gate, block.block.layer.selector) for block in model.model.stack.blocks
    ]
    with pytest.raises(ValueError, match=r"^policy 'its own gate': expected a converted model"):
        run(
            tiny_llama(),
            tokenizer,
            replace(plan, policies=(own,)),
            tmp_path / "plain",
            "tiny",
            quiet,
        )


def test_a_score_for_every_head():
    x = torch.zeros(1, 3, 4)
    trace = hb.MemoryTrace(torch.zeros(1, 3, 4, 2), x, None, None, None, torch.zeros(1, 3))
    given = torch.arange(12.0).view(1, 3, 4)
    score = PerHead(hb.GivenScore(), 2)(x, trace._replace(given=given)).score
    assert torch.equal(score, torch.stack([given[..., :2].mean(-1), given[..., 2:].mean(-1)], -1))
    score = PerHead(hb.GivenScore(), 2)(x, trace._replace(given=given[..., :1])).score
    assert torch.equal(score, given[..., :1].expand(-1, -1, 2))


@pytest.mark.slow
def test_the_command_writes_a_table_and_a_chart(tokenizer, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    plan = named("everything", "random", "key norm", seeds=(0, 1), length=300)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    out = tmp_path / "out"
    arguments = ["--policies", str(tmp_path / "plan.json"), "--out", str(out)]
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "model"), *arguments])
    assert result.exit_code == 0, result.output
    results = Results.of(json.loads((out / "evaluate.json").read_text()))
    assert len(results.rows) == 6
    lines = (out / "evaluate.md").read_text().splitlines()
    assert lines == markdown(results).splitlines()
    policies = ["everything", "random", "key norm"]
    # a caption, then two tables with the same rows
    for titles, rows in ((lines[2], lines[4:7]), (lines[8], lines[10:])):
        assert [line.split(" | ")[0] for line in rows] == [f"| {name}" for name in policies]
        assert {line.count(" | ") for line in (titles, *rows)} == {titles.count(" | ")}
    assert [title for title in TITLES if f" {title} |" not in lines[2] + lines[8]] == []
    assert (out / "evaluate.png").read_bytes()[:4] == b"\x89PNG"
    view = Console(width=250, record=True)
    view.print(table(results))
    assert "key norm" in view.export_text()
    chart(results, tmp_path / "again.png")
    # seed by seed against random: t of one degree of freedom
    difference = [
        results.find("key norm", 0.25, seed).measured.nll
        - results.find("random", 0.25, seed).measured.nll
        for seed in (0, 1)
    ]
    ahead = against_control(results, "key norm", 0.25)
    assert ahead.mean == pytest.approx(sum(difference) / 2)
    half = 12.706 * abs(difference[0] - difference[1]) / 2
    assert math.isclose(ahead.half, half, rel_tol=1e-3)
    assert against_control(results, "random", 0.25) is None
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--quick", *arguments])
    assert result.exit_code == 2
