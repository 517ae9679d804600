"""The trainer: its losses and measures against loops, its curriculum, and what a branch copies."""

import math

import pytest
import torch
from torch.nn.functional import log_softmax

from hamblocks.experiments.arms import ARMS, arm_of
from hamblocks.experiments.growth import measure_growth, symbols
from hamblocks.experiments.models import LayerOptions, set_fraction
from hamblocks.experiments.tasks import IGNORED, Recall
from hamblocks.experiments.training import (
    Recipe,
    branch,
    loss_of,
    measure,
    train,
    train_with_curriculum,
)
from hamblocks.layer import HAMLayer

TASK = Recall(8, 48, questions=4, symbols=40, burst=2)
SIZES = LayerOptions(hidden_size=16, head_dim=8)


def model(arm, seed=0, steps=4):
    return arm_of(arm, TASK, SIZES, seed=seed, target=0.25, steps=steps)


def test_the_loss_is_that_of_a_loop():
    net = model("everything")
    batch = TASK.batch(3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss, right = loss_of(net, batch, 0.3)
        only_answers, _ = loss_of(net, batch, 0.0)
        logits = net(batch.tokens).logits
    log_p = log_softmax(logits.double(), -1)
    answers, text, hits = [], [], []
    for row in range(3):
        for t in range(batch.tokens.shape[1]):
            answer = int(batch.target[row, t])
            if answer != IGNORED:
                answers.append(-log_p[row, t, answer])
                hits.append(int(log_p[row, t].argmax()) == answer)
            elif t + 1 < batch.tokens.shape[1]:
                text.append(-log_p[row, t, batch.tokens[row, t + 1]])
    expected = torch.stack(answers).mean() + 0.3 * torch.stack(text).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert right == pytest.approx(sum(hits) / len(hits))
    assert float(only_answers) == pytest.approx(float(torch.stack(answers).mean()), rel=1e-5)


def test_the_learning_rate_rises_and_falls():
    rates = [Recipe(steps=100, warm_up=10, final=0.1).rate(step) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[9] == pytest.approx(1, abs=0.03)
    assert rates[100] == pytest.approx(0.1)
    assert Recipe(steps=100, final=1.0).rate(100) == 1


def test_steps_hold_about_as_many_tokens_at_every_size():
    recipe = Recipe(batch=2, tokens=200)
    for size in range(TASK.smallest, TASK.size + 1, 2):
        length = TASK.length(size)
        assert recipe.sequences(length) == max(2, round(200 / length))


def test_a_curriculum_moves_on_when_it_may_and_ends_at_the_full_size():
    easy = train_with_curriculum(
        model("everything"), TASK, Recipe(steps=60, tokens=48), 0, needed=0.0, growth=2.0
    )
    assert [size for _, size in easy.sizes] == [2, 4, 8]
    assert [step for step, _ in easy.sizes] == [0, 5, 10]
    assert easy.steps == 15
    never = train_with_curriculum(
        model("everything"), TASK, Recipe(steps=7, tokens=48), 0, needed=1.1
    )
    assert (never.steps, never.sizes) == (7, [(0, 2)])
    patient = train_with_curriculum(
        model("everything"), TASK, Recipe(steps=9, tokens=48), 0, needed=1.1, patience=3
    )
    assert [step for step, _ in patient.sizes] == [0, 3, 6, 9][: len(patient.sizes)]
    assert len(patient.sizes) >= 3


def test_the_same_seed_trains_the_same_model():
    losses = []
    for _ in range(2):
        net = model("surprise")
        train(net, TASK, Recipe(steps=3, tokens=96), 5)
        losses.append(measure(net, TASK, 9, sequences=4))
    assert losses[0] == losses[1]


def test_a_branch_has_the_weights_and_its_own_router():
    base = model("everything", seed=1)
    onto = model("router", seed=2)
    fresh = {name: p.clone() for name, p in onto.named_parameters()}
    branch(base, onto)
    copied = dict(base.named_parameters())
    own = [name for name, _ in onto.named_parameters() if name not in copied]
    assert own
    assert all(".gate." in name for name in own)
    for name, parameter in onto.named_parameters():
        assert torch.equal(parameter, copied.get(name, fresh[name]))
    with pytest.raises(ValueError, match=r"onto: .*mlp"):
        branch(onto, base)


def test_measure_counts_as_a_loop_does():
    net = model("surprise", steps=2)
    train(net, TASK, Recipe(steps=3, tokens=96), 5)
    found = measure(net, TASK, 3, sequences=5, at_once=2)
    generator = torch.Generator().manual_seed(3)
    right = total = 0
    loss = 0.0
    kept = {kind: [] for kind in (*range(4), "label", "all")}
    for count in (2, 2, 1):
        batch = TASK.batch(count, generator)
        with torch.no_grad():
            result = net(batch.tokens)
        (stats,) = result.stats
        log_p = log_softmax(result.logits, -1)
        for row in range(count):
            end = batch.tokens.shape[1]
            for t in range(end):
                stored = bool(stats.evict_at[row, t, 0] >= end)
                kept[int(batch.kind[row, t])].append(stored)
                kept["all"].append(stored)
                if batch.label[row, t]:
                    kept["label"].append(stored)
                answer = int(batch.target[row, t])
                if answer != IGNORED:
                    total += 1
                    right += int(log_p[row, t].argmax()) == answer
                    loss -= float(log_p[row, t, answer])
    shares = {kind: sum(stored) / len(stored) for kind, stored in kept.items()}
    assert found.accuracy == right / total
    assert found.loss == pytest.approx(loss / total, rel=1e-5)
    assert found.kept == pytest.approx([shares[kind] for kind in range(4)])
    assert found.kept_labelled == pytest.approx(shares["label"])
    assert found.keep_fraction == pytest.approx(shares["all"])


@pytest.mark.parametrize("arm", ARMS)
def test_what_an_arm_stores(arm):
    net = model(arm, steps=12)
    train(net, TASK, Recipe(steps=12, tokens=400), 5)
    if arm == "elastic":
        set_fraction(net, 0.25)
    found = measure(net, TASK, 3, sequences=16)
    expected = {"everything": 1.0, "memory": 0.0}.get(arm, 0.25)
    assert found.keep_fraction == pytest.approx(expected, abs=0.08 if 0 < expected < 1 else 0)
    (layer,) = (module for module in net.modules() if isinstance(module, HAMLayer))
    stats = net(TASK.batch(2, torch.Generator().manual_seed(1)).tokens).stats[0]
    assert stats.evict_at.shape[2] == 1, "one decision serves all heads"
    decay = -layer.memory.A_log.exp() * torch.nn.functional.softplus(layer.memory.dt_bias)
    assert float(decay.detach()) == pytest.approx(-SIZES.dt, rel=0.2)


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match="arm: expected one of everything"):
        model("all")
    with pytest.raises(ValueError, match="model: expected one with an ElasticFraction"):
        set_fraction(model("surprise"), 0.5)


def test_growth_counts_what_is_stored_of_both():
    net = model("elastic", steps=10)
    train(net, TASK, Recipe(steps=10, tokens=200), 5)
    set_fraction(net, 0.25)
    own, moved = measure_growth(net, TASK, 0.25, seed=4, length=160, count=3)
    assert moved.threshold == "a threshold that 25% of fresh symbols reach"
    fresh = symbols(3, 160, 40, 4)
    assert all(len(set(row[i : i + 40])) == 40 for row in fresh.tolist() for i in range(0, 160, 40))
    tau = net.blocks[0].layer.selector.controller.tau
    curves = []
    for tokens in (fresh, fresh[:, :32].repeat(1, 5)):
        kept = net(tokens).stats[0].score[..., 0] >= tau
        curves.append([int(kept[:, : t + 1].sum()) / 3 for t in range(160)])
    assert moved.tokens == list(range(8, 161, 8))
    assert moved.fresh == pytest.approx([curves[0][t - 1] for t in moved.tokens])
    assert moved.repeated == pytest.approx([curves[1][t - 1] for t in moved.tokens])
    late = [curve[-1] - curve[63] for curve in curves]
    assert moved.ratio == pytest.approx(late[0] / max(late[1], 1 / 3))
    assert own.fresh == sorted(own.fresh)
    assert math.isfinite(own.ratio)
