"""The layer checks what parts return: errors name the part, what was expected and what came."""

import copy

import pytest
import torch
from torch import nn

import hamblocks as hb
from hamblocks.ops import NEVER


class Memory(nn.Module):
    """A delta-rule memory with a function applied to its result."""

    def __init__(self, change):
        super().__init__()
        self.inner, self.change = hb.DeltaMemory(), change

    def build(self, dims):
        self.inner.build(dims)

    def forward(self, *args, **call):
        return self.change(*self.inner(*args, **call))


class Attention(nn.Module):
    def __init__(
        self, read=lambda q, keys: keys.attend(q).out, prepare=lambda q, k, v: (q, k, v, None)
    ):
        super().__init__()
        self.read, self.change = read, prepare

    def prepare(self, q, k, v, *, position, state=None, cu_seqlens=None):
        return self.change(q, k, v)

    def forward(self, q, keys):
        return self.read(q, keys)


class Lowers:
    """A top-k with a function applied to what it lowers."""

    def __init__(self, change):
        self.inner, self.change = hb.TopK(3), change

    def start(self, batch_size, heads, device=None):
        return self.inner.start(batch_size, heads, device)

    def __call__(self, score, ledger=None, **where):
        result = self.inner(score, self.start(*score.shape[::2]), **where)
        return result._replace(lowered=self.change(*result.lowered))


def selected(evict_at):
    return lambda score, ledger=None, *, position=None, cu_seqlens=None: evict_at(score)


WRONG = {
    "memory without a trace": ("memory", {"memory": Memory(lambda read, trace, state: read)}),
    "memory without a state": (
        "memory",
        {"memory": Memory(lambda read, trace, state: (read, trace))},
    ),
    "memory that ignores the metric": (
        "memory",
        {"memory": Memory(lambda read, trace, state: (read, trace._replace(score=None), state))},
    ),
    "memory that flattens its read": (
        "memory",
        {"memory": Memory(lambda read, trace, state: (read.flatten(2), trace, state))},
    ),
    "memory that scores once per token": (
        "memory",
        {
            "memory": Memory(
                lambda read, trace, state: (
                    read,
                    trace._replace(score=trace.score[..., 0]),
                    state,
                )
            )
        },
    ),
    "gate that returns a tensor": ("gate", {"gate": lambda x, trace: x[..., :1]}),
    "gate that returns a tuple": ("gate", {"gate": lambda x, trace: (x[..., :1], None)}),
    "gate of a mask": ("score", {"gate": lambda x, trace: hb.GateOutput(x[..., :1] > 0)}),
    "gate with a bias of a mask": (
        "logit_bias",
        {"gate": lambda x, trace: hb.GateOutput(x[..., :1], x[..., :1] > 0)},
    ),
    "gate of too few tokens": ("score", {"gate": lambda x, trace: hb.GateOutput(x[:, 1:, :1])}),
    "selector that returns a mask": ("selector", {"selector": selected(lambda s: s > 0)}),
    "selector of a mask": ("selector", {"selector": selected(lambda s: hb.Selection(s > 0))}),
    "selector of floats": ("selector", {"selector": selected(lambda s: hb.Selection(s))}),
    "selector of too few heads": (
        "selector",
        {"selector": selected(lambda s: hb.Selection(torch.full_like(s[..., :1], NEVER).int()))},
    ),
    "selector that lowers by a tensor": (
        "selector",
        {"selector": selected(lambda s: hb.Selection(s.int(), lowered=s.int()))},
    ),
    "selector that lowers int64": (
        "selector",
        {"selector": Lowers(lambda where, until: hb.Lifetimes(where, until.long()))},
    ),
    "selector that lowers by a mask": (
        "selector",
        {"selector": Lowers(lambda where, until: hb.Lifetimes(where, until > where))},
    ),
    "selector that lowers fewer": (
        "selector",
        {"selector": Lowers(lambda where, until: hb.Lifetimes(where, until[:, 1:]))},
    ),
    "selector with a ledger of its own kind": (
        "selector",
        {"selector": selected(lambda s: hb.Selection(s.int(), ledger=(s,)))},
    ),
    "attention that returns its log-sum-exp too": (
        "attention",
        {"attention": Attention(lambda q, keys: keys.attend(q))},
    ),
    "attention that flattens": (
        "attention",
        {"attention": Attention(lambda q, keys: keys.attend(q).out.flatten(2))},
    ),
    "attention that prepares queries alone": (
        "attention",
        {"attention": Attention(prepare=lambda q, k, v: (q, k))},
    ),
    "attention that prepares another dtype": (
        "attention",
        {"attention": Attention(prepare=lambda q, k, v: (q.double(), k, v, None))},
    ),
    "combiner that forgets to project": ("combiner", {"combiner": lambda x, m, a: m + a}),
    "combiner that returns both": ("combiner", {"combiner": lambda x, m, a: (m, a)}),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_part_that_returns_something_else_is_named(what, streaming):
    name, parts = WRONG[what]
    torch.manual_seed(0)
    layer = hb.HAMLayer(32, 4, **({"selector": hb.Window(8)} | copy.deepcopy(parts)))
    x = torch.randn(2, 9, 32)
    state = layer.init_state(2) if streaming else None
    with pytest.raises(ValueError, match=rf"(?s)^{name}\b.*: expected .*, got ") as caught:
        layer(x, state=state)
    assert len(str(caught.value)) < 250


def test_the_message_shows_what_came():
    layer = hb.HAMLayer(32, 4, selector=hb.Window(8), combiner=lambda x, m, a: m + a)
    with pytest.raises(ValueError, match="combiner") as caught:
        layer(torch.randn(1, 9, 32))
    assert str(caught.value) == (
        "combiner: expected y [B, T, hidden_size] = [1, 9, 32] from its call (does it project the "
        "reads?), got float32 [1, 9, 4, 8]"
    )


@torch.no_grad()
def test_no_part_is_called_without_a_token():
    called = []

    def spied(name, part):
        def call(*args, **kwargs):
            called.append((name, args[0].shape[:2].numel()))
            return part(*args, **kwargs)

        return call

    class Selector:
        def __init__(self):
            self.inner = hb.TopK(2)

        def start(self, batch_size, heads, device=None):
            return self.inner.start(batch_size, heads, device)

        def __call__(self, score, *args, **call):
            called.append(("selector", score.shape[:2].numel()))
            return self.inner(score, *args, **call)

    memory = hb.GatedDeltaMemory()
    memory.build(hb.LayerDims(8, 2, 2, 4))
    combiner = hb.GatedSum()
    combiner.build(hb.LayerDims(8, 2, 2, 4))
    layer = hb.HAMLayer(
        8,
        2,
        memory=spied("memory", memory),
        gate=spied("gate", lambda x, trace: hb.GateOutput(trace.residual.norm(dim=-1))),
        selector=Selector(),
        attention=spied("attention", lambda q, keys: keys.attend(q).out),
        combiner=spied("combiner", combiner),
    )
    state = layer.init_state(2)
    assert not called
    for tokens in (0, 3, 0, 1):
        y, state, stats = layer(torch.randn(2, tokens, 8), state=state)
        assert y.shape == (2, tokens, 8)
        assert stats.evict_at.shape[:2] == (2, tokens)
    layer(torch.zeros(0, 4, 8))
    packed = torch.tensor([0, 0, 0], dtype=torch.int32)
    layer.prefill(torch.zeros(1, 0, 8), cu_seqlens=packed)
    layer.reset(state, torch.tensor([True, False]))
    assert len(called) == 10
    assert all(count > 0 for _, count in called)


class Plain:
    """A selector of a plain class that holds a controller under a name of its own."""

    def __init__(self):
        self.tau_source = hb.TargetFraction(0.25)

    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        tau = self.tau_source(score)
        return hb.Selection(
            hb.ops.select_threshold(score, tau, position=position, cu_seqlens=cu_seqlens)
        )


def test_modules_in_plain_parts_belong_to_the_layer():
    """They are trained, moved, saved, put in eval mode and stepped like those of modules."""
    torch.manual_seed(0)
    layer, x = hb.HAMLayer(32, 4, selector=Plain()), torch.randn(2, 64, 32)
    source = layer.selector.tau_source
    assert source in set(layer.modules())
    assert "part_modules.selector_tau_source.tau_sum" in layer.state_dict()
    layer.eval()
    assert not source.training
    layer.train()
    layer(x)
    hb.step_controllers(layer)
    other = hb.HAMLayer(32, 4, selector=Plain())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.selector.tau_source.tau, source.tau)
    twin = copy.deepcopy(layer)
    assert twin.selector.tau_source in set(twin.modules())
    assert twin.selector.tau_source is not source
    for _ in range(5):
        layer(x)
        hb.step_controllers(layer)
    assert abs(float(layer.eval()(x).stats.keep_fraction()) - 0.25) < 0.05


def test_weights_of_a_plain_gate_are_trained():
    class Gate:
        def __init__(self):
            self.score = nn.Linear(32, 1)

        def __call__(self, x, trace):
            score = self.score(x)
            return hb.GateOutput(score, score)

    layer = hb.HAMLayer(32, 4, gate=Gate(), selector=hb.TopK(4))
    assert layer.gate.score.weight in set(layer.parameters())


def test_a_controller_whose_threshold_is_not_saved_warns():
    class Mine:
        tau = torch.tensor(0.5)

        def __call__(self, score):
            return self.tau

        def step(self):
            self.tau = self.tau + 0.01

    with pytest.warns(UserWarning, match=r"^selector: expected controllers .* got Mine: .*saves"):
        layer = hb.HAMLayer(32, 4, selector=hb.Threshold(Mine()))
    layer(torch.randn(1, 4, 32))
    hb.step_controllers(layer)
    assert float(layer.selector.controller.tau) == pytest.approx(0.51)
