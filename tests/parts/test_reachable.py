"""Controllers and modules are found in modules, plain objects, containers and closures."""

import functools
import os
import subprocess
import sys
import types
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import hamblocks as hb
from hamblocks.reachable import find_controllers, hidden_modules, is_controller, model_controllers


class Mine:
    """A user's selector: a plain object whose controller has a name of its own."""

    def __init__(self, controller=None):
        self.tau_source = hb.TargetFraction(0.25) if controller is None else controller

    def __call__(self, score, ledger=None, *, position=None, cu_seqlens=None):
        call = {"position": position, "cu_seqlens": cu_seqlens}
        return hb.Selection(hb.ops.select_threshold(score, self.tau_source(score), **call))


class Plain:
    """A user's controller: no module."""

    def __init__(self, tau=0.5):
        self.tau, self.steps = torch.tensor(tau), 0

    def __call__(self, score):
        return self.tau

    def step(self):
        self.steps += 1


class Slotted:
    __slots__ = ("__private", "empty", "inner")

    def __init__(self, inner):
        self.inner = inner
        self.__private = Mine()


class Named(namedtuple("Named", "first second")):
    pass


@dataclass
class Data:
    inner: object


class Holder(nn.Module):
    def __init__(self, **plain):
        super().__init__()
        vars(self).update(plain)


def closure(controller):
    return lambda score: controller(score)


def default(controller):
    def choose(score, by=controller):
        return by(score)

    return choose


def keyword(controller):
    def choose(score, *, by=controller):
        return by(score)

    return choose


def attribute(controller):
    def choose(score):
        return choose.by(score)

    choose.by = controller
    return choose


def wrapped(controller):
    inner = closure(controller)

    @functools.wraps(inner)
    def outer(score):
        return outer.__wrapped__(score)

    return outer


PLACES = {
    "itself": lambda c: c,
    "module": lambda c: nn.Sequential(nn.Linear(1, 1), hb.Threshold(c)),
    "plain attribute of a module": lambda c: Holder(held=[Mine(c)]),
    "plain object": Mine,
    "slots": Slotted,
    "dataclass": Data,
    "namespace": lambda c: types.SimpleNamespace(c=c),
    "tuple": lambda c: (1, (2, c)),
    "named tuple": lambda c: Named(None, c),
    "list": lambda c: [[c]],
    "dict": lambda c: {"a": {1: c}},
    "ordered dict": lambda c: OrderedDict(a=c),
    "set": lambda c: {c, 3, "x"},
    "frozenset": lambda c: frozenset([c]),
    "deque": lambda c: deque([c]),
    "partial": lambda c: functools.partial(print, c),
    "partial by keyword": lambda c: functools.partial(print, by=c),
    "bound method": lambda c: Mine(c).__call__,
    "bound call of a controller": lambda c: types.SimpleNamespace(choose=c.__call__),
    "closure": closure,
    "default": default,
    "default by keyword": keyword,
    "attribute of a function": attribute,
    "wrapped function": wrapped,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("make", [hb.TargetFraction, Plain], ids=["module", "plain"])
def test_a_controller_is_found_in_every_place(place, make):
    controller = make(0.5)
    found = find_controllers(PLACES[place](controller))
    assert any(one is controller for one in found)
    assert len(found) == 1 + (place == "slots")  # which holds one more under a private name


def test_each_is_found_once_in_order_and_cycles_end():
    first, second = hb.TargetFraction(0.1), Plain()
    one = Mine(first)
    one.others = [second, one, first, {"again": second}]
    one.itself = one.__call__
    for _ in range(2):
        assert find_controllers(one) == [first, second]
    deep = second
    for _ in range(5000):
        deep = [deep]
    assert find_controllers(deep) == [second]


@pytest.mark.slow
def test_a_set_has_the_same_order_in_every_process():
    code = (
        "import hamblocks as hb; from hamblocks.reachable import find_controllers;"
        "junk = [object() for _ in range({})];"
        "print(find_controllers({{hb.TargetFraction(n / 10) for n in range(9)}}))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code.format(size)],
            env=os.environ | {"PYTHONHASHSEED": str(size)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for size in (1, 1001)
    ]
    assert said[0] == said[1]
    assert said[0].count("TargetFraction") == 9


class Forbidden:
    """Fails where a walk asks for what only Python's own attribute look-up may find."""

    def __getattr__(self, name):
        raise AssertionError(f"the walk asked for {name}")

    @property
    def computed(self):
        raise AssertionError("the walk called a property")


def test_nothing_is_looked_into_that_holds_no_part():
    hidden = Plain()
    tensor = torch.zeros(2)
    tensor.held = hidden
    package = types.ModuleType("package")
    package.held = hidden

    class Type:
        held = hidden

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    optimizer.held = hidden
    assert find_controllers([tensor, package, Type, optimizer, torch.float32, Forbidden()]) == []
    linear = nn.Linear(1, 1)
    linear.register_forward_hook(lambda *_: hidden)
    assert find_controllers(linear) == []


class Recurrent(nn.Module):
    """A module with a step of another kind, as Mamba's."""

    def forward(self, x):
        return x

    def step(self, x, state):
        raise AssertionError("this is no controller's step")


class Forwarding(nn.Module):
    """Forwards every attribute to the module inside, as wrappers do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, score):
        return self.inner(score)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Annealed(nn.Module):
    """A controller around a controller, which it steps itself."""

    def __init__(self):
        super().__init__()
        self.inner = hb.TargetFraction(0.5)

    def forward(self, score):
        return self.inner(score)

    def step(self):
        self.inner.step()


def test_what_is_a_controller():
    for one in (Plain(), hb.TargetFraction(0.5), hb.FixedThreshold(0.0), Annealed()):
        assert is_controller(one)
    function = closure(Plain())
    assert not is_controller(function)
    function.step = lambda: None
    assert is_controller(function)
    optional = types.SimpleNamespace()
    for other in (optional, Recurrent(), Plain, hb.TargetFraction, nn.Linear(1, 1), 0.5, None):
        assert not is_controller(other)
    forwarding = Forwarding(hb.TargetFraction(0.5))
    assert forwarding.step
    assert not is_controller(forwarding)
    assert find_controllers(forwarding) == [forwarding.inner]
    annealed = Annealed()
    assert find_controllers([annealed]) == model_controllers(nn.Sequential(annealed)) == [annealed]


@pytest.mark.filterwarnings("ignore:.*expected controllers:UserWarning")
def test_a_controller_inside_another_is_stepped_by_it_alone():
    class PlainAnnealed(Plain):
        """No module, around a module."""

        def __init__(self):
            super().__init__()
            self.inner = hb.TargetFraction(0.5)

        def step(self):
            self.inner.step()

    for outer in (Annealed(), PlainAnnealed()):
        layer = layer_of(hb.Threshold(outer))
        # the layer may register what the plain object hides, and another layer may use it too
        layer.hidden = outer.inner
        model = nn.ModuleList([layer_of(Mine(outer.inner)), layer])
        assert model_controllers(model) == [outer]
        assert find_controllers([outer.inner, outer]) == [outer]
    first, second = Plain(), Plain()
    first.other, second.other = second, first
    assert find_controllers([first, second]) == [first]
    assert find_controllers([second, first]) == [second]


def layer_of(selector, **parts):
    return hb.HAMLayer(8, 2, selector=selector, **parts)


def stepped(model, *controllers):
    return [
        sum(one is controller for one in model_controllers(model)) for controller in controllers
    ]


@pytest.mark.filterwarnings("ignore:.*expected controllers:UserWarning")
def test_step_controllers_finds_what_the_parts_of_layers_hold():
    plain, moved, free = Plain(), Mine(), hb.TargetFraction(0.5)

    class Gate:
        def __init__(self, controller):
            self.by = controller

        def __call__(self, x, trace):
            return hb.GateOutput(trace.position.float()[..., None])

    model = nn.ModuleList(
        [
            layer_of(Mine(plain), gate=Gate(free)),
            nn.Sequential(layer_of(hb.Window(2) & moved), nn.Linear(8, 8)),
            layer_of(functools.partial(Mine(plain).__call__)),
        ]
    )
    model.unrelated = Mine()  # a plain attribute outside a layer may be anything
    hb.step_controllers(model)
    assert plain.steps == 1
    assert stepped(model, plain, moved.tau_source, free, model.unrelated.tau_source) == [1, 1, 1, 0]
    x = torch.randn(1, 20, 8)
    for layer in (model[0], model[1][0]):
        layer(x)
    hb.step_controllers(model)
    assert moved.tau_source.started


def test_controllers_inside_wrapped_selectors_are_stepped():
    a, b = hb.TargetFraction(0.25), hb.TargetFraction(0.5)
    inner = hb.Cooldown(hb.Threshold(a) | hb.Window(2), 2)
    layer = hb.HAMLayer(8, 2, selector=hb.Budget(inner & hb.Budget(Mine(b), 4), 3))
    assert model_controllers(layer) == [a, b]
    layer(torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(0)))
    hb.step_controllers(layer)
    assert a.tau > b.tau > 0


def test_a_controller_outside_of_layers_is_found_as_a_module():
    class Mixer(nn.Module):
        """A user's own layer."""

        def __init__(self):
            super().__init__()
            self.tau = hb.TargetFraction(0.5)

    own = Mixer()
    assert stepped(nn.Sequential(own, layer_of(hb.Window(2))), own.tau) == [1]
    # a model without any layer is searched whole
    plain = Plain()
    assert stepped(Holder(choose=Mine(plain)), plain) == [1]
    assert stepped(hb.AnyOf(Mine(plain), hb.Window(1)), plain) == [1]
    assert stepped(nn.Sequential(hb.Threshold(plain), layer_of(hb.Window(2))), plain) == [1]


def test_a_model_with_a_step_of_its_own_is_not_stepped():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tau = hb.TargetFraction(0.5)
            # a part that refers to the model it belongs to
            self.layer = layer_of(lambda *args, **more: Mine(self.tau)(*args, **more))

        def forward(self, x):
            return self.layer(x).y

        def step(self):
            hb.step_controllers(self)

    model = Model()
    model(torch.randn(1, 9, 8))
    model.step()
    assert model.tau.started
    for outer in (model, nn.Sequential(model), nn.Sequential(nn.Sequential(model))):
        assert model_controllers(outer) == [model.tau]


class Router:
    """A user's gate: a plain object with weights."""

    def __init__(self):
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
        self.norms = {"in": nn.LayerNorm(8)}

    def __call__(self, x, trace):
        return hb.GateOutput(self.net(self.norms["in"](x)).sigmoid())


def test_hidden_modules_are_told_by_path():
    mine, router = Mine(), Router()
    assert hidden_modules(mine) == {"tau_source": mine.tau_source}
    assert hidden_modules(router) == {"net": router.net, "norms.in": router.norms["in"]}
    assert hidden_modules(hb.Threshold(0.5) | hb.Window(3)) == {}
    assert hidden_modules(hb.Window(3) | mine) == {"right.tau_source": mine.tau_source}
    assert hidden_modules(functools.partial(router, 1)) == {
        "func.net": router.net,
        "func.norms.in": router.norms["in"],
    }
    assert hidden_modules(Mine(Plain())) == {}
    assert hidden_modules(lambda score: mine(score)) == {"mine.tau_source": mine.tau_source}
    # a hidden module may hide others
    deep = Data(Holder(held=Mine()))
    assert hidden_modules(deep) == {
        "inner": deep.inner,
        "inner.held.tau_source": deep.inner.held.tau_source,
    }


def test_of_captured_modules_only_controllers_are_hidden_modules():
    outer, tau = nn.Linear(1, 1), hb.TargetFraction(0.5)
    assert hidden_modules(lambda x: outer(tau(x))) == {"tau": tau}
    assert hidden_modules(outer.forward) == {}
    assert hidden_modules(tau.forward) == {"__self__": tau}
