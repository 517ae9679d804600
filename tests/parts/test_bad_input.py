"""A bad argument is a ValueError that begins with its name and says what was expected and what came."""

import math

import pytest
import torch
from parts_cases import Size, build, inputs, same, tensors

import hamblocks as hb

SIZE = Size(0, 2, 6, (4, 2))
WIDTH = 16


def refuse(name, call):
    with pytest.raises(ValueError, match=rf"(?s)^{name}\b.*: expected .*, got .*") as caught:
        call()
    assert len(str(caught.value)) < 400


def ham(**kwargs):
    return hb.HAMLayer(**{"hidden_size": 8, "num_heads": 2, "selector": hb.Window(2), **kwargs})


CONSTRUCTORS = {
    "heads do not divide": ("hidden_size", lambda: ham(hidden_size=9)),
    "key heads do not divide": (
        "num_kv_heads",
        lambda: ham(hidden_size=12, num_heads=3, num_kv_heads=2),
    ),
    "more key heads": ("num_kv_heads", lambda: ham(num_kv_heads=4)),
    "no heads": ("num_heads", lambda: ham(num_heads=0)),
    "heads as float": ("num_heads", lambda: ham(num_heads=2.0)),
    "hidden as bool": ("hidden_size", lambda: ham(hidden_size=True)),
    "negative head_dim": ("head_dim", lambda: ham(head_dim=-4)),
    "odd head_dim": ("head_dim", lambda: ham(head_dim=3)),
    "selector class": ("selector", lambda: ham(selector=hb.Window)),
    "memory class": ("memory", lambda: ham(memory=hb.GatedDeltaMemory)),
    "gate class": ("gate", lambda: ham(gate=hb.PredictionError)),
    "gate name": ("gate", lambda: ham(gate="cosine")),
    "attention class": ("attention", lambda: ham(attention=hb.SelectedAttention)),
    "combiner class": ("combiner", lambda: ham(combiner=hb.GatedSum)),
    "metric": ("metric", lambda: hb.PredictionError("cos")),
    "shared class": ("gate", lambda: hb.SharedGate(hb.LearnedRouter)),
    "router width": ("width", lambda: hb.LearnedRouter(0)),
    "router gradient": ("gradient", lambda: hb.LearnedRouter(gradient="both")),
    "entropy vocabulary": ("vocab_size", lambda: hb.PredictionEntropy(1)),
    "random per": ("per", lambda: hb.RandomGate(per="token")),
    "random heads": ("heads", lambda: hb.RandomGate(heads=2)),
    "sum of nothing": ("gates", lambda: hb.WeightedSum([], [])),
    "sum of one gate without a list": (
        "gates",
        lambda: hb.WeightedSum(hb.RandomGate(), [1.0]),
    ),
    "sum of a class": ("gates", lambda: hb.WeightedSum([hb.RandomGate], [1.0])),
    "sum with too few weights": (
        "weights",
        lambda: hb.WeightedSum([hb.RandomGate(), hb.PeriodicGate(2)], [1.0]),
    ),
    "sum with a weight that is no number": (
        "weights",
        lambda: hb.WeightedSum([hb.RandomGate()], [True]),
    ),
    "sum with an infinite weight": (
        "weights",
        lambda: hb.WeightedSum([hb.RandomGate()], [float("inf")]),
    ),
    "period": ("n", lambda: hb.PeriodicGate(0)),
    "offset between positions": ("offset", lambda: hb.PeriodicGate(3, offset=1.5)),
    "wavelengths of 0": ("rope_theta", lambda: hb.SelectedAttention(rope_theta=0)),
    "wavelengths as text": ("rope_theta", lambda: hb.SelectedAttention(rope_theta="10000")),
    "start of a convolution": ("conv_init", lambda: hb.SelectedAttention(conv_init="zero")),
    "conv": ("conv_size", lambda: hb.DeltaMemory(conv_size=0)),
    "threshold NaN": ("tau", lambda: hb.Threshold(math.nan)),
    "fixed NaN": ("tau", lambda: hb.FixedThreshold(math.nan)),
    "set NaN": ("tau", lambda: hb.TargetFraction(0.5).set_threshold(math.nan)),
    "set text": ("tau", lambda: hb.FixedThreshold(0.5).set_threshold("1")),
    "threshold class": ("controller", lambda: hb.Threshold(hb.TargetFraction)),
    "threshold text": ("controller", lambda: hb.Threshold("0.5")),
    "negative k": ("k", lambda: hb.TopK(-1)),
    "k as float": ("k", lambda: hb.TopK(2.0)),
    "negative delay": ("delay", lambda: hb.TopK(1, delay=-1)),
    "cooldown of nothing": ("n", lambda: hb.Cooldown(hb.Window(1), 0)),
    "cooldown of a class": ("inner", lambda: hb.Cooldown(hb.Window, 2)),
    "budget of a number": ("inner", lambda: hb.Budget(0.5, 2)),
    "negative budget": ("tokens", lambda: hb.Budget(hb.Window(1), -1)),
    "who leaves": ("leaves", lambda: hb.Budget(hb.Window(1), 1, leaves="newest")),
    "budget in bytes": ("nbytes", lambda: hb.Budget.of_bytes(hb.Window(1), 1.5, head_dim=4)),
    "bytes of no head": ("head_dim", lambda: hb.Budget.of_bytes(hb.Window(1), 9, head_dim=0)),
    "bytes of a named dtype": (
        "dtype",
        lambda: hb.Budget.of_bytes(hb.Window(1), 9, head_dim=4, dtype="float32"),
    ),
    "prompt above 1": ("fraction", lambda: hb.PromptFraction(1.5, 4)),
    "prompt NaN": ("fraction", lambda: hb.PromptFraction(math.nan, 4)),
    "prompt length": ("length", lambda: hb.PromptFraction(0.5, -4)),
    "exponent of 1": ("exponent", lambda: hb.SublinearGrowth(1.0)),
    "scale of 0": ("scale", lambda: hb.SublinearGrowth(0.5, 0)),
    "scale infinite": ("scale", lambda: hb.SublinearGrowth(0.5, math.inf)),
    "growth to 0": ("max_tokens", lambda: hb.SublinearGrowth(0.5, max_tokens=0)),
    "share": ("share", lambda: hb.ErrorMass(-0.1, 4)),
    "no capacity": ("capacity", lambda: hb.ErrorMass(0.5, 0)),
    "negative width": ("width", lambda: hb.Window(-1)),
    "negative n": ("n", lambda: hb.FirstTokens(-1)),
    "or a class": ("right", lambda: hb.Window(1) | hb.Window),
    "and a number": ("left", lambda: 0.5 & hb.Window(1)),
    "fraction": ("fraction", lambda: hb.TargetFraction(1.5)),
    "fraction NaN": ("fraction", lambda: hb.TargetFraction(math.nan)),
    "fraction set": ("fraction", lambda: hb.TargetFraction(0.5).set_fraction(-0.1)),
    "rate": ("rate", lambda: hb.TargetFraction(0.5, rate=-1)),
    "no layers": ("num_layers", lambda: hb.Decoder(5, 0, lambda i: ham())),
    "no words": ("vocab_size", lambda: hb.Decoder(0, 1, lambda i: ham())),
    "two widths": ("layer", lambda: hb.Decoder(5, 2, lambda i: ham(hidden_size=8 * i + 8))),
}


@pytest.mark.parametrize("what", CONSTRUCTORS)
def test_constructors(what):
    refuse(*CONSTRUCTORS[what])


X = inputs(SIZE)


def borders(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def packed(layer, *values, **kwargs):
    return layer(X.flatten(0, 1)[None], cu_seqlens=borders(*values, **kwargs))


def state_of(case="delta-relative-topk", size=SIZE):
    return build(case, size)(inputs(size), state=build(case, size).init_state(size.batch)).state


def continued(part, **changed):
    """A layer with this attention, from a state of one with a convolution, or what is left of it."""
    layer, x = ham(), torch.randn(2, 3, 8)
    state = layer.prefill(x).state._replace(**changed)
    return ham(attention=part)(x, state=state)


def spent(layer, state):
    layer(X, state=state.fork())
    fork = state.fork()
    layer(X, state=fork)
    return fork


def float_cache(layer, state):
    other = build("delta-relative-topk", SIZE, torch.float32)
    return state._replace(cache=other.prefill(X.float()).state.cache)


def stored_together():
    """A cache whose heads decide together."""
    k = torch.zeros(2, 1, 2, 4).double()
    until = borders([[1]], [[1]])
    extension = hb.KVCache(2).extend(k, k, position=borders([0], [0]), evict_at=until)
    return extension.commit(borders(1, 1))


def other_head_dim():
    layer = hb.HAMLayer(32, 4, num_kv_heads=2, selector=hb.Window(1)).double()
    return layer.prefill(torch.zeros(2, 3, 32).double()).state


def extend(state, **changed):
    new = {"k": torch.zeros(2, 1, 2, 4).double(), "v": torch.zeros(2, 1, 2, 4).double()}
    new |= {"position": borders([6], [6]), "evict_at": borders([[7, 7]], [[7, 7]]), **changed}
    return state.cache.extend(**new)


CALLS = {
    "x not a tensor": ("x", lambda layer, s: layer([1.0])),
    "x rank": ("x", lambda layer, s: layer(X[0])),
    "x width": ("x", lambda layer, s: layer(X[..., :8])),
    "x int": ("x", lambda layer, s: layer(X.long())),
    "x bool": ("x", lambda layer, s: layer(X > 0)),
    "x dtype": ("x", lambda layer, s: layer(X.float())),
    "x dtype beside a state": ("x", lambda layer, s: layer(X.bfloat16(), state=s)),
    "x device": ("x", lambda layer, s: layer(X.to("meta"))),
    "cu_seqlens list": ("cu_seqlens", lambda layer, s: layer(X[:1], cu_seqlens=[0, 6])),
    "cu_seqlens float": ("cu_seqlens", lambda layer, s: packed(layer, 0, 12, dtype=torch.float32)),
    "cu_seqlens start": ("cu_seqlens", lambda layer, s: packed(layer, 1, 12)),
    "cu_seqlens end": ("cu_seqlens", lambda layer, s: packed(layer, 0, 11)),
    "cu_seqlens order": ("cu_seqlens", lambda layer, s: packed(layer, 0, 7, 5, 12)),
    "cu_seqlens rank": ("cu_seqlens", lambda layer, s: packed(layer, [0, 12])),
    "cu_seqlens empty": ("cu_seqlens", lambda layer, s: packed(layer)),
    "cu_seqlens of a batch": (
        "cu_seqlens",
        lambda layer, s: layer(X, cu_seqlens=borders(0, 6, 12)),
    ),
    "state type": ("state", lambda layer, s: layer(X, state=tuple(s))),
    "state list": ("state", lambda layer, s: layer(X, state=[s])),
    "state batch": ("state", lambda layer, s: layer(X[:1], state=s)),
    "state batch packed": (
        "state",
        lambda layer, s: layer(X[:1], state=s, cu_seqlens=borders(0, 2, 4, 6)),
    ),
    "state head_dim": (
        "state",
        lambda layer, s: layer(X, state=other_head_dim()),
    ),
    "state key heads": (
        "state",
        lambda layer, s: layer(X, state=state_of(size=Size(0, 2, 6, (3, 3)))),
    ),
    "state query heads": (
        "state",
        lambda layer, s: layer(X, state=state_of(size=Size(0, 2, 6, (2, 2)))),
    ),
    "state of another memory": (
        "state",
        lambda layer, s: layer(X, state=s._replace(memory=s.memory.conv)),
    ),
    "state of another convolution": (
        "state",
        lambda layer, s: layer(X, state=state_of("shared-router-tree")),
    ),
    "state with biases": (
        "state",
        lambda layer, s: layer(X, state=s._replace(cache=state_of("router-and").cache)),
    ),
    "ledger of another k": (
        "ledger",
        lambda layer, s: layer(X, state=s._replace(ledger=hb.TopK(2).start(2, 2))),
    ),
    "ledger of another selector": (
        "ledger",
        lambda layer, s: layer(X, state=s._replace(ledger=hb.ErrorMass(0.5, 3).start(2, 2))),
    ),
    "no state of attention": (
        "state.attention",
        lambda layer, s: continued(hb.SelectedAttention(), attention=None),
    ),
    "no state of the memory": (
        "state.memory",
        lambda layer, s: layer(X, state=s._replace(memory=None)),
    ),
    "a state of attention where none belongs": (
        "state.attention",
        lambda layer, s: continued(hb.SelectedAttention(conv_size=1)),
    ),
    "no ledger": ("state", lambda layer, s: layer(X, state=s._replace(ledger=None))),
    "spent state": ("state", lambda layer, s: layer(X, state=spent(layer, s))),
    "state in another dtype": ("state", lambda layer, s: layer(X, state=float_cache(layer, s))),
    "state of one row per sequence": (
        "state",
        lambda layer, s: layer(X, state=s._replace(cache=stored_together())),
    ),
    "decode from nothing": ("state", lambda layer, s: layer.decode(X[:, 0], None)),
    "decode a piece": ("x", lambda layer, s: layer.decode(X, s)),
    "decode another batch": ("state", lambda layer, s: layer.decode(X[:1, 0], s)),
    "prefill without a batch": ("x", lambda layer, s: layer.prefill(X[0])),
    "reorder beyond": ("index", lambda layer, s: s.reorder(borders(0, 2))),
    "reorder before": ("index", lambda layer, s: s.reorder(borders(-1))),
    "reorder by float": ("index", lambda layer, s: s.reorder(torch.tensor([0.0]))),
    "reorder by a number": ("index", lambda layer, s: s.reorder(0)),
    "reset by index": ("sequences", lambda layer, s: layer.reset(s, borders(0, 1))),
    "reset another batch": ("sequences", lambda layer, s: layer.reset(s, torch.tensor([True]))),
    "reset by a list": ("sequences", lambda layer, s: layer.reset(s, [True, False])),
    "crop to no checkpoint": ("position", lambda layer, s: s.crop(3)),
    "crop another batch": ("position", lambda layer, s: s.checkpoint().crop(borders(3, 3, 3))),
    "crop to a word": ("position", lambda layer, s: s.checkpoint().crop("first")),
    "reserve less than nothing": ("steps", lambda layer, s: s.reserve(-1)),
    "saved by another memory": (
        "memory",
        lambda layer, s: layer.load_state(
            {**s.state_dict(), "memory": s.state_dict()["memory"][1:]}
        ),
    ),
    "not saved": ("saved", lambda layer, s: layer.load_state(s)),
    "saved with other sizes": (
        "state",
        lambda layer, s: layer.load_state(state_of(size=Size(0, 2, 6, (3, 3))).state_dict()),
    ),
    "appended before what was seen": (
        "position",
        lambda layer, s: extend(s, position=borders([6], [5])),
    ),
    "appended in another dtype": ("k", lambda layer, s: extend(s, k=torch.zeros(2, 1, 2, 4))),
    "appended other heads": ("k", lambda layer, s: extend(s, k=torch.zeros(2, 1, 3, 4))),
    "appended other values": ("v", lambda layer, s: extend(s, v=torch.zeros(2, 2, 2, 4).double())),
    "appended with a bias": (
        "logit_bias",
        lambda layer, s: extend(s, logit_bias=torch.zeros(2, 1, 2)),
    ),
    "appended float lifetimes": (
        "evict_at",
        lambda layer, s: extend(s, evict_at=torch.zeros(2, 1, 2)),
    ),
    "appended lifetimes of query heads": (
        "evict_at",
        lambda layer, s: extend(s, evict_at=borders([[7] * 4], [[7] * 4])),
    ),
    "appended positions of one": ("position", lambda layer, s: extend(s, position=borders([6]))),
    "pages without a token": ("page_size", lambda layer, s: layer.init_state(2, page_size=0)),
    "fewer pages than none": ("max_pages", lambda layer, s: layer.init_state(2, max_pages=-1)),
    "batch size": ("batch_size", lambda layer, s: layer.init_state(-1)),
    "batch size float": ("batch_size", lambda layer, s: layer.init_state(2.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", CALLS)
@torch.no_grad()
def test_calls(what):
    name, call = CALLS[what]
    layer, state = build("delta-relative-topk", SIZE), state_of()
    before = [tensor.clone() for tensor in tensors(state.state_dict())]
    refuse(name, lambda: call(layer, state))
    assert same(before, state.state_dict())
    assert layer(X, state=state).y.isfinite().all()


GATES = {
    "three heads": ("score", lambda score: hb.GateOutput(score[..., :1].expand(-1, -1, 3))),
    "no heads": ("score", lambda score: hb.GateOutput(score[..., 0])),
    "too few tokens": ("score", lambda score: hb.GateOutput(score[:, 1:])),
    "not a tensor": ("score", lambda score: hb.GateOutput(0.5)),
    "bias of query heads": ("logit_bias", lambda score: hb.GateOutput(score, score)),
    "bias without heads": ("logit_bias", lambda score: hb.GateOutput(score, score[..., 0])),
}


@pytest.mark.parametrize("what", GATES)
@pytest.mark.parametrize("streaming", [False, True])
@torch.no_grad()
def test_what_a_gate_returns(what, streaming):
    name, wrong = GATES[what]
    layer = hb.HAMLayer(
        WIDTH, 4, num_kv_heads=2, selector=hb.TopK(2), gate=lambda x, trace: wrong(trace.beta)
    ).double()
    refuse(name, lambda: layer(X, state=layer.init_state(2) if streaming else None))


def decoder():
    torch.manual_seed(0)
    return hb.Decoder(5, 2, lambda i: ham())


TOKENS = torch.tensor([[0, 1, 4]])
DECODER = {
    "float tokens": ("tokens", lambda model: model(TOKENS.float())),
    "one row": ("tokens", lambda model: model(TOKENS[0])),
    "beyond the vocabulary": ("tokens", lambda model: model(TOKENS + 1)),
    "negative token": ("tokens", lambda model: model(TOKENS - 1)),
    "one state for two layers": (
        "state",
        lambda model: model(TOKENS, state=model.init_state(1)[:1]),
    ),
    "state of one layer": ("state", lambda model: model(TOKENS, state=model.init_state(1)[0])),
    "state batch": ("state", lambda model: model(TOKENS, state=model.init_state(2))),
    "cu_seqlens": ("cu_seqlens", lambda model: model(TOKENS, cu_seqlens=borders(0, 2))),
}


@pytest.mark.parametrize("what", DECODER)
def test_decoder_calls(what):
    name, call = DECODER[what]
    model = decoder()
    refuse(name, lambda: call(model))
    assert model(TOKENS).logits.isfinite().all()
