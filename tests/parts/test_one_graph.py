"""One graph serves all lengths: `torch.compile(dynamic=True, fullgraph=True)`, `torch.export`."""

from __future__ import annotations

import pytest
import torch
from parts_cases import close
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import hamblocks as hb
from hamblocks import selectors

pytestmark = pytest.mark.slow

SELECTORS = {
    "window": lambda: hb.Window(4),
    "first": lambda: hb.FirstTokens(3),
    "threshold": lambda: hb.Threshold(0.1),
    "per head": lambda: hb.HeadThresholds([0.1, 0.4]),
    "controlled": lambda: hb.Threshold(hb.TargetFraction(0.5)),
    "topk": lambda: hb.TopK(5),
    "delayed topk": lambda: hb.TopK(5, delay=4),
    "growth": lambda: hb.SublinearGrowth(0.5, 2.0, 256),
    "oldest leaves": lambda: hb.Budget(hb.Threshold(0.1), 6),
    "lowest leaves": lambda: hb.Budget(hb.Threshold(0.1), 6, leaves="lowest"),
    "cooldown": lambda: hb.Cooldown(hb.Threshold(0.1), 3),
    "prompt": lambda: hb.PromptFraction(0.3, 20),
    "mass": lambda: hb.ErrorMass(0.5, 8),
    "or": lambda: hb.TopK(5) | hb.Window(3),
    "and": lambda: hb.Cooldown(hb.TopK(5), 2) & hb.Window(9),
}
LAYERS = {
    "topk": lambda: {"selector": hb.TopK(3) | hb.Window(2)},
    "memory alone": lambda: {"attention": None},
    "attention alone": lambda: {"memory": None, "selector": hb.Window(3)},
    "queries": lambda: {
        "selector": hb.Window(4),
        "query_gate": hb.ThresholdQueries(hb.LearnedRouter(), 0.3, 2),
    },
}
LENGTHS = 16, 24, 40, 64, 100
MIXED = 24, 40, 64, 100
"""Lengths of layers: where Triton runs, up to 16 tokens go through a kernel of their own."""


def test_every_selector_is_compiled_here():
    made = {type(part) for make in SELECTORS.values() for part in make().modules()}
    shipped = {getattr(selectors, name) for name in selectors.__all__}
    bases = {selectors.Combined, selectors.Composable, selectors.Wrapper}
    assert {one for one in shipped if isinstance(one, type)} - bases <= made


def borders(tokens, packed):
    return torch.tensor([0, 5, 5, tokens - 3, tokens], dtype=torch.int32) if packed else None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_compiles_once(name, packed):
    torch.compiler.reset()
    selector, graphs = SELECTORS[name]().eval(), CompileCounter()
    compiled = torch.compile(selector, backend=graphs, dynamic=True, fullgraph=True)
    for tokens in LENGTHS:
        score = torch.randn(1 if packed else 2, tokens, 2).mul(4).round().div(4)  # with ties
        cu_seqlens = borders(tokens, packed)
        wanted = selector(score, cu_seqlens=cu_seqlens).evict_at
        assert torch.equal(compiled(score, cu_seqlens=cu_seqlens).evict_at, wanted)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("name", ["topk", "growth", "oldest leaves", "cooldown"])
def test_a_selector_with_a_ledger_compiles_once(name):
    torch.compiler.reset()
    selector, graphs = SELECTORS[name]().eval(), CompileCounter()
    compiled = torch.compile(selector, backend=graphs, dynamic=True, fullgraph=True)
    for tokens in LENGTHS:
        ledger = selector.start(2, 2)
        _, _, ledger = selector(
            torch.randn(2, 8, 2), ledger, position=torch.arange(8).int().expand(2, 8)
        )
        score = torch.randn(2, tokens, 2)
        position = torch.arange(8, 8 + tokens).int().expand(2, tokens)
        wanted = selector(score, ledger, position=position)
        got = compiled(score, ledger, position=position)
        assert torch.equal(got.evict_at, wanted.evict_at)
        assert torch.equal(got.lowered.evict_at, wanted.lowered.evict_at)
        assert torch.equal(got.ledger.position, wanted.ledger.position)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_without_gradients_compiles_once(name, packed):
    torch.compiler.reset()
    torch.manual_seed(0)
    graphs = CompileCounter()
    layer = hb.HAMLayer(8, 2, num_kv_heads=1, **LAYERS[name]()).eval()
    compiled = torch.compile(layer, backend=graphs, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for tokens in MIXED:
            x = torch.randn(1 if packed else 2, tokens, 8)
            cu_seqlens = borders(tokens, packed)
            wanted, got = (run(x, cu_seqlens=cu_seqlens) for run in (layer, compiled))
            close(got.y, wanted.y, 1e-5)
            if wanted.stats.evict_at is not None:
                assert torch.equal(got.stats.evict_at, wanted.stats.evict_at)
    assert graphs.frame_count == 1


def trains_in_one_graph(layer, backend, packed=False):
    """A training step gives the gradients of eager mode, for numbers of chunks from 1 to 4."""
    torch.compiler.reset()
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, backend=graphs, dynamic=True, fullgraph=True)
    made = []
    for tokens in (24, 64, 100, 200):  # a chunk has up to 64 tokens
        grads = []
        x, cu_seqlens = torch.randn(1 if packed else 2, tokens, 8), borders(tokens, packed)
        for run in (layer, compiled):
            layer.zero_grad()
            run(x, cu_seqlens=cu_seqlens).y.square().sum().backward()
            grads.append([weight.grad.clone() for weight in layer.parameters()])
        for got, wanted in zip(*grads, strict=True):
            close(got, wanted, 1e-4)
        made.append(graphs.frame_count)
    # "aot_eager" is called twice for one graph, after torch has made its floats constants
    assert made == made[:1] * 4


# selectors are traced above, all of them; these have most to do with the length
@pytest.mark.parametrize("name", ["delayed topk", "oldest leaves", "mass"])
def test_a_layer_in_training_compiles_once(name):
    torch.manual_seed(0)
    trains_in_one_graph(hb.HAMLayer(8, 2, selector=SELECTORS[name]()), "eager")


@pytest.mark.parametrize("packed", [False, True])
def test_its_gradient_is_one_graph_too(packed):
    torch.manual_seed(0)
    layer = hb.HAMLayer(8, 2, selector=hb.TopK(3) | hb.Window(2))
    trains_in_one_graph(layer, "aot_eager", packed)


class Decides(torch.nn.Module):
    def __init__(self, selector):
        super().__init__()
        self.selector = selector

    def forward(self, score):
        return self.selector(score).evict_at


class Mixes(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).y


def exported(module, x, strict, least=2):
    tokens = torch.export.Dim("T", min=least, max=4096)
    shapes = ({1: tokens},)
    return torch.export.export(module, (x,), dynamic_shapes=shapes, strict=strict).module()


# what strict export adds is what `torch.compile` traces above
@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in SELECTORS), ("topk", True), ("and", True)]
)
def test_a_selector_is_exported_for_all_lengths(name, strict):
    module = Decides(SELECTORS[name]().eval())
    program = exported(module, torch.randn(2, 24, 2), strict)
    for tokens in LENGTHS:
        score = torch.randn(2, tokens, 2)
        assert torch.equal(program(score), module(score))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_exported_for_all_lengths(name):
    torch.manual_seed(0)
    module = Mixes(hb.HAMLayer(16, 4, **LAYERS[name]()).eval())
    with torch.no_grad():
        program = exported(module, torch.randn(2, 32, 16), strict=False, least=17)
        for tokens in MIXED:
            x = torch.randn(2, tokens, 16)
            close(program(x), module(x), 1e-5)


def test_a_model_is_exported_with_a_mask_and_labels():
    pytest.importorskip("transformers")
    from hamblocks.models import HAMConfig, HAMForCausalLM

    class Served(torch.nn.Module):
        def __init__(self):
            super().__init__()
            sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}
            selector = hb.TopK(3) | hb.Window(2)
            config = HAMConfig(**sizes, num_attention_heads=4, selector=selector)
            self.model = HAMForCausalLM(config).eval()

        def forward(self, ids, mask, labels):
            given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            result = self.model(**given, use_cache=False)
            return result.loss, result.logits

    torch.manual_seed(0)
    served, ids = Served(), torch.randint(64, (2, 24))
    tokens = torch.export.Dim("T", min=17, max=512)
    program = torch.export.export(
        served,
        (ids, torch.ones_like(ids), ids.clone()),
        dynamic_shapes={name: {1: tokens} for name in ("ids", "mask", "labels")},
        strict=False,
    ).module()
    for length in (24, 30, 90):
        ids = torch.randint(64, (2, length))
        mask, labels = torch.ones_like(ids), ids.masked_fill(torch.rand(2, length) < 0.2, -100)
        for _ in range(2):  # without padding, and with padding on both sides
            wanted, got = (run(ids, mask, labels) for run in (served, program))
            for one, other in zip(got, wanted, strict=True):
                close(one, other, 1e-5)
            grads = [
                torch.autograd.grad(loss, owner.parameters(), allow_unused=True)
                for owner, (loss, _) in ((program, got), (served, wanted))
            ]
            for one, other in zip(*grads, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    close(one, other, 1e-5)
            mask[0, :4] = mask[1, -3:] = 0
