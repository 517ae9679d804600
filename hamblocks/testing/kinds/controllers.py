"""Checks of controllers: `controller(score) -> tau`, moved by `step()`."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hamblocks.testing.budget import assert_bits
from hamblocks.testing.check import Check, Options
from hamblocks.testing.comparing import (
    assert_reads_what_was_written,
    assert_twice,
    compiled,
    prefixed,
    reload,
    unchanged,
)
from hamblocks.testing.inputs.draw import Draw
from hamblocks.testing.inputs.scores import Scores, scores


def training(part: Any) -> Any:
    """A copy in training mode."""
    part = copy.deepcopy(part)
    return part.train() if isinstance(part, nn.Module) else part


def _held(controller: Any) -> dict[str, Tensor]:
    """Copies of all tensors in the state dict of a module."""
    return (
        {name: x.clone() for name, x in controller.state_dict().items()}
        if isinstance(controller, nn.Module)
        else {}
    )


def steps(controller: Any, case: Scores, count: int = 4) -> dict[str, Tensor]:
    """Tau after each of `count` steps over drawn scores."""
    taken = {}
    for number in range(count):
        score = Scores(
            case.tokens, case.batch, None, case.heads, case.kind, seed=case.seed + number
        ).tensors()["score"]
        controller(score)
        controller.step()
        taken[f"tau after step {number + 1}"] = controller(score).detach().clone()
    return taken


def taus(part: Any, case: Scores) -> dict[str, Tensor]:
    """Tau of a copy of a controller in training mode, after each step over drawn scores."""
    return steps(training(part), case)


def _tau_is_a_number(part: Any, case: Scores, _options: Options) -> None:
    """tau is float32 `[]`, not NaN, without gradient, for any scores: none, equal, infinite, NaN."""
    controller = training(part)
    score = case.tensors()["score"]
    for _ in range(3):
        tau = controller(score)
        assert isinstance(tau, Tensor), f"tau: {type(tau).__name__}, expected a tensor"
        assert tau.dtype == torch.float32, f"tau: {tau.dtype}, expected torch.float32"
        assert tau.shape == (), f"tau: shape {list(tau.shape)}, expected []"
        assert not tau.requires_grad, "tau: carries a gradient, expected none"
        assert not bool(tau.isnan()), f"tau: NaN, from {case.kind} scores"
        controller.step()


def _tau_stays_float32(part: Any, case: Scores, _options: Options) -> None:
    """Casting the model to another dtype does not change tau."""
    controller = training(part)
    steps(controller, case)
    score = case.tensors()["score"]
    before = controller.eval()(score).clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        tau = copy.deepcopy(controller).to(dtype)(score)
        assert tau.dtype == torch.float32, (
            f"tau: {tau.dtype} after to({dtype}), expected torch.float32"
        )
        with prefixed(f"to({dtype}) changed tau"):
            assert_bits({"tau": tau}, {"tau": before})


def _moves_only_in_step(part: Any, case: Scores, _options: Options) -> None:
    """A call only counts scores; only `step()` moves tau."""
    controller = training(part)
    steps(controller, case)
    score = case.tensors()["score"]
    before = controller(score).clone()
    for _ in range(3):
        controller(score - 5)
    with prefixed("tau moved without a step"):
        assert_bits({"tau": controller(score)}, {"tau": before})


def _rests_in_eval(part: Any, case: Scores, _options: Options) -> None:
    """In eval mode nothing is counted and nothing moves."""
    controller = training(part)
    steps(controller, case)
    rested = training(controller).eval()
    before = _held(rested)
    steps(rested, case)
    with prefixed("eval mode changed what the controller holds"):
        assert_bits(_held(rested), before)
    again = replace(case, seed=case.seed + 9)
    with prefixed("calls in eval mode were counted: training goes on with other thresholds"):
        assert_bits(steps(rested.train(), again), steps(controller, again))


def _steps_without_scores_move_nothing(part: Any, case: Scores, _options: Options) -> None:
    """A step without any score, or with padding (NaN) alone, does not move tau."""
    controller = training(part)
    steps(controller, case)
    score = case.tensors()["score"]
    controller.step()  # consumes the scores that the last call counted
    before = copy.deepcopy(controller).eval()(score).clone()
    for nothing in (None, score[:, :0], torch.full_like(score, math.nan)):
        if nothing is not None:
            controller(nothing)
        controller.step()
        with prefixed(
            "tau moved by "
            + ("nothing" if nothing is None else f"{list(nothing.shape)} scores of padding")
        ):
            assert_bits({"tau": copy.deepcopy(controller).eval()(score)}, {"tau": before})


def _reaches_its_fraction(part: Any, case: Scores, _options: Options) -> None:
    """On scores of one distribution, the fraction that reaches tau is within 0.03 of the target."""
    controller = training(part)
    draw = Draw(case.seed)
    for _ in range(200):
        controller(draw.normal(2, 128, 2, dtype=torch.float32))
        controller.step()
    score = draw.normal(4, 4096, 2, dtype=torch.float32)
    admitted = float((score >= controller.eval()(score)).float().mean())
    assert abs(admitted - controller.fraction) < 0.03, (
        f"{admitted:.3f} reach tau, expected {controller.fraction}"
    )


def _set_threshold_sets_tau(part: Any, case: Scores, _options: Options) -> None:
    """`set_threshold(x)` sets tau to x at once; NaN raises a ValueError and changes nothing."""
    score = case.tensors()["score"]
    controller: Any = copy.deepcopy(part)
    if isinstance(controller, nn.Module):
        controller.eval()
    for value in (0.25, -math.inf, math.inf, -3.0):
        controller.set_threshold(value)
        assert float(controller(score)) == value, (
            f"tau: {float(controller(score))} after set_threshold({value})"
        )
    try:
        controller.set_threshold(math.nan)
    except ValueError:
        assert float(controller(score)) == -3.0, (
            "set_threshold(NaN) raised an error but changed tau"
        )
        return
    raise AssertionError("set_threshold(NaN) was accepted")


def _state_dict_is_all_there_is(part: Any, case: Scores, _options: Options) -> None:
    """The state dict holds everything: a copy that loads it after a step continues the same way."""
    assert isinstance(part, nn.Module), (
        f"{type(part).__name__} is no torch.nn.Module: a model neither saves nor moves its threshold"
    )
    controller, other = training(part), training(part)
    steps(controller, case)
    controller.step()  # a model is saved between a step and the next forward pass
    reload(controller, other)
    again = replace(case, seed=case.seed + 9)
    with prefixed("a copy that loaded the state dict continues with other thresholds"):
        assert_bits(steps(other, again), steps(controller, again))


def _counts_are_no_buffers(part: Any, case: Scores, _options: Options) -> None:
    """Buffers that a wrapper overwrites between two calls of a step, as DDP does, lose no count."""
    alone, wrapped = training(part), training(part)
    for controller in (alone, wrapped):
        steps(controller, case)
        controller.step()
    held = {name: buffer.clone() for name, buffer in wrapped.named_buffers()}
    for number in range(3):
        score = replace(case, seed=case.seed + 20 + number).tensors()["score"]
        alone(score)
        with torch.no_grad():
            for name, buffer in wrapped.named_buffers():
                buffer.copy_(held[name])
        wrapped(score)
    for controller in (alone, wrapped):
        controller.step()
    score = case.tensors()["score"]
    with prefixed("a controller whose buffers were overwritten between two calls differs"):
        assert_bits({"tau": wrapped.eval()(score)}, {"tau": alone.eval()(score)})


def _averages_are_thresholds(part: Any, case: Scores, _options: Options) -> None:
    """Averages of the buffers, as EMA and SWA take, give a tau between those averaged, not NaN."""
    controller, averaged = training(part), training(part).eval()
    score = case.tensors()["score"]
    taus = [float(averaged(score))]
    for number in range(4):
        steps(controller, replace(case, seed=case.seed + number), 1)
        controller.step()
        taus.append(float(training(controller).eval()(score)))
        with torch.no_grad():
            for mean, new in zip(averaged.buffers(), controller.buffers(), strict=True):
                mean.copy_(mean + (new - mean) * 0.25 if mean.is_floating_point() else new)
        tau = float(averaged(score))
        assert not math.isnan(tau), f"tau: NaN in an average over thresholds {taus}"
        finite = [one for one in taus if math.isfinite(one)] or taus
        room = 1e-25 + 1e-5 * max(map(abs, finite)) if math.isfinite(finite[0]) else 0.0
        assert min(finite) - room <= tau <= max(finite) + room, (
            f"tau: {tau} in an average over thresholds {taus}"
        )


def _set_fraction_admits_it(part: Any, case: Scores, _options: Options) -> None:
    """After training, `set_fraction(f)` admits f of the scores within 0.03; 0 and 1 are exact."""
    controller = training(part)
    draw = Draw(case.seed)
    controller.set_fraction(0.5)  # before the first score, too
    for _ in range(30):
        controller(draw.normal(2, 128, 2, dtype=torch.float32))
        controller.step()
    score = draw.normal(4, 4096, 2, dtype=torch.float32)
    controller.eval()
    for fraction in (0.5, 0.05, 1.0, 0.25, 0.0, 0.9):
        controller.set_fraction(fraction)
        tau = controller(score)
        share = float((score >= tau).float().mean())
        assert abs(share - fraction) < 0.03, (
            f"{share:.3f} reach tau after set_fraction({fraction}), expected {fraction}"
        )
        exact = {0.0: math.inf, 1.0: -math.inf}.get(fraction, float(tau))
        assert float(tau) == exact, (
            f"tau: {float(tau)} after set_fraction({fraction}), expected {exact}"
        )
    for wrong in (-0.1, 1.1, math.nan):
        try:
            controller.set_fraction(wrong)
        except ValueError:
            continue
        raise AssertionError(f"set_fraction({wrong}) was accepted")


def _same_call_same_bits(part: Any, case: Scores, _options: Options) -> None:
    """The same steps give the same thresholds, bit for bit, whatever the random state."""
    assert_twice(lambda: taus(part, case))


def _nothing_given_changes(part: Any, case: Scores, _options: Options) -> None:
    """A call and a step do not change the scores they get."""
    controller, score = training(part), case.tensors()["score"]
    with unchanged({"score": score}):
        controller(score)
        controller.step()


def _reads_no_unwritten_memory(part: Any, case: Scores, _options: Options) -> None:
    """Thresholds do not depend on uninitialised memory (`torch.empty`)."""
    assert_reads_what_was_written(lambda: taus(part, case))


def _compiled_is_eager(part: Any, case: Scores, _options: Options) -> None:
    """`torch.compile(fullgraph=True)` counts the same and returns the same tau as eager."""
    eager, traced = training(part), training(part)
    with compiled(traced) as fast:
        for _ in range(2):
            score = case.tensors()["score"]
            with prefixed("compiled and eager differ"):
                assert_bits({"tau": fast(score)}, {"tau": eager(score)})
                assert_bits(_held(traced), _held(eager))
            for one in (eager, traced):
                one.step()
    with prefixed("compiled and eager count differently"):
        assert_bits({"tau": traced.eval()(score)}, {"tau": eager.eval()(score)})


def _no_module(part: Any, _options: Options) -> str | None:
    return None if isinstance(part, nn.Module) else "it is no torch.nn.Module"


def _no_fraction(part: Any, _options: Options) -> str | None:
    return None if hasattr(part, "fraction") else "it has no target fraction"


def _no_set_fraction(part: Any, _options: Options) -> str | None:
    return None if hasattr(part, "set_fraction") else "it has no set_fraction"


def _no_threshold(part: Any, _options: Options) -> str | None:
    return None if hasattr(part, "set_threshold") else "it has no set_threshold"


PLAIN = (
    Scores(9, 2, kind="normal"),
    Scores(7, 1, kind="ties", seed=1),
    Scores(5, 2, kind="constant"),
)


def _check(name: str, body: Any, edges: Any = PLAIN, **more: Any) -> Check:
    drawn = {"kind": "normal"} if name == "reaches_its_fraction" else {}

    def cases(_options: Options) -> Any:
        return scores(packed=None, empty_rows=False, **drawn)

    alone = more.pop("alone", False)
    return Check(
        f"check_controller_{name}",
        "controller",
        body,
        None if alone else cases,
        lambda _options: edges,
        **more,
    )


CHECKS = [
    _check(
        "tau_is_a_number",
        _tau_is_a_number,
        (*PLAIN, Scores(0), Scores(batch=0), Scores(kind="infinite")),
    ),
    _check("tau_stays_float32", _tau_stays_float32, applies=_no_module, share=2),
    _check("moves_only_in_step", _moves_only_in_step, share=2),
    _check("rests_in_eval", _rests_in_eval, applies=_no_module, share=2),
    _check(
        "steps_without_scores_move_nothing",
        _steps_without_scores_move_nothing,
        share=2,
        applies=_no_module,
    ),
    _check(
        "reaches_its_fraction", _reaches_its_fraction, PLAIN[:1], applies=_no_fraction, alone=True
    ),
    _check(
        "set_threshold_sets_tau",
        _set_threshold_sets_tau,
        PLAIN[:1],
        applies=_no_threshold,
        alone=True,
    ),
    _check(
        "set_fraction_admits_it",
        _set_fraction_admits_it,
        PLAIN[:1],
        applies=_no_set_fraction,
        alone=True,
    ),
    _check("counts_are_no_buffers", _counts_are_no_buffers, applies=_no_module, share=2),
    _check("averages_are_thresholds", _averages_are_thresholds, applies=_no_module, share=2),
    _check("state_dict_is_all_there_is", _state_dict_is_all_there_is, share=2),
    _check("same_call_same_bits", _same_call_same_bits, share=2),
    _check("nothing_given_changes", _nothing_given_changes, share=2),
    _check("reads_no_unwritten_memory", _reads_no_unwritten_memory, share=2),
    _check(
        "compiled_is_eager",
        _compiled_is_eager,
        PLAIN[:1],
        applies=_no_module,
        slow=True,
        alone=True,
    ),
]
