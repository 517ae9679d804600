"""What other tools do to a layer, its thresholds and its states between two calls."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
from parts_cases import close
from torch.utils.checkpoint import checkpoint

import hamblocks as hb

CASES = {
    "threshold": lambda: {"selector": hb.Threshold(0.4) | hb.Window(2)},
    "ledger and convolution": lambda: {
        "selector": hb.TopK(3) | hb.Window(2),
        "attention": hb.SelectedAttention(conv_size=3),
        "gate": hb.LearnedRouter(),
    },
}


def layer_of(name="threshold"):
    torch.manual_seed(0)
    return hb.HAMLayer(16, 4, num_kv_heads=2, **CASES[name]()).eval()


def counting(fraction=0.3):
    torch.manual_seed(0)
    return hb.HAMLayer(16, 4, selector=hb.Threshold(hb.TargetFraction(fraction))).train()


def x_of(*shape, seed=1):
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(seed))


COPIES = {
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "deepcopy": copy.deepcopy,
    "torch.save": lambda state: saved_and_loaded(state),
}


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", CASES)
def test_a_copied_state_goes_on_by_itself(name, copied):
    layer, x = layer_of(name), x_of(2, 12)
    with torch.no_grad():
        state = COPIES[copied](layer.init_state(2, rollback=2))  # empty
        _, state, _ = layer.prefill(x[:, :9], state)
        state = state.checkpoint(7)
        other = COPIES[copied](state)
        want, state, _ = layer.decode(x[:, 9], state)
        got, other, _ = layer.decode(x[:, 9], other)
        close(got, want, 1e-6)  # a copy has no holes in its pages, so sums have another order
        other = other.crop(key=7)
        close(layer.decode(x[:, 9], other).y, want, 1e-6)
        with pytest.raises(ValueError, match="state: expected the newest"):
            layer.decode(x[:, 9], other)


def test_a_state_goes_to_another_process_and_to_its_fork():
    layer, x = layer_of(), x_of(1, 9)
    with torch.no_grad():
        _, state, _ = layer.prefill(x)
        want = layer.decode(x[:, 0], state.fork()).y
        program = (
            "import os, pickle, sys, threading, torch\n"
            "torch.set_num_threads(1)\n"  # OpenMP's threads do not outlive a fork: torch would wait
            "layer, state, x = pickle.load(sys.stdin.buffer)\n"
            "with torch.no_grad(): y = layer.decode(x, state.fork()).y\n"
            "if hasattr(os, 'fork') and (child := os.fork()): os._exit(os.waitpid(child, 0)[1])\n"
            # a fork while another thread is inside a call
            "held, ended = threading.Event(), threading.Event()\n"
            "def hold():\n"
            "    with state.cache._own.lock: held.set(), ended.wait()\n"
            "thread = threading.Thread(target=hold)\n"
            "thread.start(), held.wait()\n"
            "if hasattr(os, 'fork'):\n"
            "    child = os.fork()\n"
            "    if not child:\n"
            "        try: layer.decode(x, state.fork())\n"
            "        except RuntimeError as error: os._exit(17 if 'was forked' in str(error) else 1)\n"
            "        os._exit(2)\n"
            "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17\n"
            "ended.set(), thread.join()\n"
            "with torch.no_grad(): again = layer.decode(x, state).y\n"
            "pickle.dump((y, again), sys.stdout.buffer)\n"
            # without torch's own way out, which may wait for threads that a fork does not have
            "sys.stdout.flush(), os._exit(0)"
        )
        ended = subprocess.run(
            [sys.executable, "-c", program],
            input=pickle.dumps((layer, state, x[:, 0])),
            capture_output=True,
            check=True,
            timeout=120,
        )
    assert all(torch.equal(y, want) for y in pickle.loads(ended.stdout))


def test_pages_are_freed_without_the_garbage_collector():
    layer, x = layer_of(), x_of(2, 9)
    with torch.no_grad():
        _, state, _ = layer.prefill(x)
        _, state, _ = layer.decode(x[:, 0], state.fork())
    pages = weakref.ref(state.cache._own)
    del state
    assert pages() is None


@pytest.mark.parametrize("modes", [(True, False), (False, True)])
def test_prefill_and_decode_in_different_inference_modes(modes):
    layer, x = layer_of("ledger and convolution"), x_of(2, 9)
    want = layer(x).y[:, -1]
    first, second = (torch.inference_mode if mode else torch.no_grad for mode in modes)
    with first():
        _, state, _ = layer.prefill(x[:, :7])
    with second():
        _, state, _ = layer.decode(x[:, 7], state)
    with first():
        close(layer.decode(x[:, 8], state).y, want, 1e-5)
    layer.train()(x).y.sum().backward()


def test_counts_taken_in_inference_mode_go_on():
    layer, twin = counting(), counting()
    for seed in range(3):
        for one, mode in ((layer, torch.inference_mode), (twin, torch.no_grad)):
            with mode():
                one(x_of(2, 20, seed=seed))
            hb.step_controllers(one)
    layer(x_of(2, 20)).y.sum().backward()
    assert layer.selector.controller.tau == twin.selector.controller.tau
    assert layer.selector.controller.tau.isfinite()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_moves_the_threshold_as_without_it(reentrant):
    """The forward pass runs twice and is counted twice, which changes no fraction."""
    layer, twin = counting(), counting()
    for seed in range(4):
        x = x_of(2, 20, seed=seed).requires_grad_()
        twin(x).y.sum().backward()
        checkpoint(lambda x: layer(x).y, x, use_reentrant=reentrant).sum().backward()
        hb.step_controllers(layer)
        hb.step_controllers(twin)
        assert layer.selector.controller.tau == twin.selector.controller.tau


def cast_by_assign(layer):
    with torch.device("meta"):
        new = hb.HAMLayer(16, 4, selector=hb.Threshold(hb.TargetFraction(0.3)))
    new.load_state_dict({k: v.bfloat16() for k, v in layer.state_dict().items()}, assign=True)
    return new


def cast_in_place(layer):
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data = tensor.data.bfloat16()
    return layer


@pytest.mark.parametrize("cast", [cast_by_assign, cast_in_place])
def test_thresholds_that_others_cast_to_bfloat16_are_float32_again(cast):
    layer = counting()
    layer(x_of(2, 20))
    hb.step_controllers(layer)
    tau = layer.selector.controller.tau.item()
    layer = cast(layer)
    controller, x = layer.selector.controller, x_of(2, 20).bfloat16()
    assert controller.tau.dtype == torch.float32
    assert controller.tau.item() == pytest.approx(tau, rel=0.01)
    assert layer.eval()(x).y.dtype == torch.bfloat16
    layer.train()(x)
    hb.step_controllers(layer)
    assert {buffer.dtype for buffer in layer.buffers()} == {torch.float32}
    assert controller.tau.isfinite()


def test_a_gradient_scaler_that_skips_a_step_moves_no_threshold():
    layer = counting()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    hb.hook_controllers(optimizer, layer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    moved = []
    for _ in range(40):
        with torch.autocast("cpu", torch.float16):
            loss = layer(x_of(2, 20)).y.float().square().mean()
        scaler.scale(loss).backward()
        before, scale = layer.selector.controller.tau.item(), scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append((scaler.get_scale() == scale, layer.selector.controller.tau.item() != before))
    assert {False, True} == {stepped for stepped, _ in moved}
    assert not any(change for stepped, change in moved if not stepped)
    assert layer.selector.controller.tau.isfinite()


def test_autocast_at_the_prompt_alone_is_refused_and_leaves_the_state():
    layer, x = layer_of(), x_of(2, 9)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            _, state, _ = layer.prefill(x[:, :8])
        message = "state: expected a cache of torch.float32, as keys and values here"
        with pytest.raises(ValueError, match=message):
            layer.decode(x[:, 8], state)
        with torch.autocast("cpu", torch.bfloat16):
            got = layer.decode(x[:, 8], state).y
    close(got.float(), layer(x).y[:, -1], 0.05)


def test_a_full_backward_hook_keeps_the_fields_of_the_output():
    layer, x = layer_of().train(), x_of(2, 9).requires_grad_()
    calls = []
    layer.register_full_backward_hook(lambda *_: calls.append(1))
    layer(x).y.sum().backward()
    _, state, _ = layer.prefill(x)
    layer.decode(x[:, 0], state)
    assert calls == [1]


def test_checks_refuse_to_run_without_assert_statements(monkeypatch):
    from hamblocks.testing import check

    module = types.ModuleType("check_compiled_with_O")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__file__ = check.__file__
    source = Path(check.__file__).read_text(encoding="utf-8")
    exec(compile(source, check.__file__, "exec", optimize=1), vars(module))
    with pytest.raises(RuntimeError, match="expected Python without -O, which removes its asserts"):
        module.Check("check_gate_law", "gate", lambda *_: None)(hb.PeriodicGate(2))
