"""A bad argument is a ValueError that names the argument, what was expected and what came."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hamblocks.testing import AttentionInputs, DeltaRuleInputs, Scores
from hamblocks_ops import (
    compact,
    explain,
    gated_delta_rule,
    select_first,
    select_threshold,
    select_topk,
    select_window,
    selected_attention,
    surprise,
    value_checks,
)

INF, NAN = float("inf"), float("nan")


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def with_one(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[-1] = value
    return x


def rule() -> dict[str, Any]:
    return DeltaRuleInputs(tokens=5, batch=1, group=2, dtype=torch.float32).tensors() | {
        "cu_seqlens": ints(0, 5)
    }


def attention() -> dict[str, Any]:
    return AttentionInputs(tokens=5, batch=1, group=2, dtype=torch.float32, bias="some").tensors()


def attention_packed() -> dict[str, Any]:
    return attention() | {"cu_seqlens": ints(0, 2, 5)}


def scores() -> dict[str, Any]:
    return Scores(tokens=5, batch=1, kind="normal").tensors() | {"cu_seqlens": ints(0, 5)}


def rows() -> dict[str, Any]:
    return {"residual": torch.ones(1, 5, 2, 3), "v": torch.ones(1, 5, 2, 3)}


def lifetimes() -> dict[str, Any]:
    return {"evict_at": torch.ones(1, 5, 2, dtype=torch.int32)}


# of each tensor argument: the calls that take it; every one is tried with the wrong type, rank,
# size and dtype
CALLS: dict[Callable[..., Any], tuple[Callable[[], dict[str, Any]], dict[str, Any]]] = {
    gated_delta_rule: (rule, {}),
    surprise: (rows, {}),
    select_threshold: (scores, {"tau": 0.0}),
    select_topk: (scores, {"k": 2}),
    select_window: (scores, {"width": 2}),
    select_first: (scores, {"n": 2}),
    compact: (lifetimes, {}),
    selected_attention: (attention, {}),
}


def test_the_good_calls_are_good() -> None:
    for op, (build, options) in CALLS.items():
        op(**build(), **options)


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda x: x.tolist(),
    "rank -1": lambda x: x[0],
    "rank +1": lambda x: x[None],
    "size": lambda x: torch.cat([x, x], 1),
    "dtype": lambda x: x.long() if x.is_floating_point() else x.float(),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "device": lambda x: x.to("meta"),
}


def other_kinds() -> Iterator[Any]:
    """op, argument, change, and the names that the error may start with."""
    for op, (build, _) in CALLS.items():
        tensors = [name for name in build() if name != "cu_seqlens"]
        # these set the sizes, and the first the device, that the others are then compared with
        sets = ["v"] if op is surprise else ["q", "k"] if op is selected_attention else tensors[:1]
        for name in tensors:
            others = [other for other in tensors if other != name]
            for kind in CHANGES:
                compared = (kind == "size" and name in sets) or (
                    kind == "device" and name == sets[0]
                )
                if compared and (
                    not others or (kind == "size" and op is selected_attention and name == "q")
                ):
                    continue  # q may have any length, and a tensor that stands alone any device
                yield pytest.param(
                    op,
                    name,
                    kind,
                    others if compared else [name],
                    id=f"{op.__name__}-{name}-{kind}",
                )


@pytest.mark.parametrize(("op", "name", "kind", "blamed"), list(other_kinds()))
def test_tensors_of_another_kind(
    op: Callable[..., Any], name: str, kind: str, blamed: list[str]
) -> None:
    build, options = CALLS[op]
    call = build()
    call[name] = CHANGES[kind](call[name])
    with pytest.raises(ValueError, match=rf"^({'|'.join(blamed)}): expected .+, got .+"):
        op(**call, **options)


def bad(
    op: Callable[..., Any], name: str, value: Any, *, base: Any = None, got: str = "", at: str = ""
) -> Any:
    """One row: `value`, or a function of the good value, for the argument `name`; the error starts
    with `at` or it."""
    return pytest.param(
        op,
        base or CALLS[op][0],
        name,
        value,
        at or name,
        got,
        id=f"{op.__name__}-{name}-{got or value}",
    )


TABLE = [
    *[
        bad(op, "cu_seqlens", value, got=got, base=base)
        for op, base in (
            (gated_delta_rule, rule),
            (select_threshold, scores),
            (select_topk, scores),
            (select_window, scores),
            (select_first, scores),
            (compact, lifetimes),
            (selected_attention, attention),
        )
        for value, got in (
            (ints(0, 3, 2, 5), "2 after 3"),
            (ints(1, 5), "first 1"),
            (ints(0, 4), "last 4"),
            (ints(0, 6), "last 6"),
            (torch.tensor([0.0, 5.0]), "float32"),
            (ints(0, 5)[None], r"\[1, 2\]"),
            (torch.zeros(0, dtype=torch.int32), r"\[0\]"),
            ([0, 5], "list"),
        )
    ],
    bad(gated_delta_rule, "g", lambda x: with_one(x, 1e-3), got="to 0.001"),
    bad(gated_delta_rule, "g", lambda x: with_one(x, NAN), got="nan"),
    bad(gated_delta_rule, "beta", lambda x: with_one(x, -1e-3), got="from -0.001"),
    bad(gated_delta_rule, "beta", lambda x: with_one(x, 2.5), got="to 2.5"),
    bad(gated_delta_rule, "beta", lambda x: with_one(x, NAN), got="nan"),
    bad(gated_delta_rule, "k", lambda x: x.double(), got="float64"),
    bad(gated_delta_rule, "v", lambda x: x.bfloat16(), got="bfloat16"),
    bad(gated_delta_rule, "v", lambda x: x[:, :, :3], got="3 heads"),
    bad(gated_delta_rule, "q", lambda x: x[..., :0], at="k", got=r"\[1, 5, 2, 4\]"),
    bad(gated_delta_rule, "v", lambda x: x[..., :0], got=r"\[1, 5, 4, 0\]"),
    bad(gated_delta_rule, "v", lambda x: x[:, :, :0], got=r"\[1, 5, 0, 3\]"),
    *[
        bad(op, "scale", value, got=got)
        for op in (gated_delta_rule, selected_attention)
        for value, got in (("half", "half"), (torch.tensor(0.5), r"float32 \[\]"))
    ],
    bad(gated_delta_rule, "initial_state", lambda x: torch.cat([x, x]), got=r"\[2, 4, 4, 3\]"),
    bad(gated_delta_rule, "metric", "euclid", got="euclid"),
    bad(surprise, "metric", "euclid", got="euclid"),
    bad(surprise, "metric", None, got="None"),
    bad(surprise, "residual", lambda x: x.double(), got="float64"),
    bad(select_threshold, "tau", NAN, got="nan"),
    bad(select_threshold, "tau", torch.tensor([0.0, NAN]), got="NaN"),
    bad(select_threshold, "tau", torch.zeros(3), got=r"\[3\]"),
    bad(select_threshold, "tau", torch.zeros(2, 2), got=r"\[2, 2\]"),
    bad(select_threshold, "tau", torch.zeros(2, dtype=torch.int64), got="int64"),
    bad(select_threshold, "tau", "low", got="low"),
    bad(select_threshold, "tau", None, got="None"),
    *[
        bad(op, name, value, got=got)
        for op, name in (
            (select_topk, "k"),
            (select_window, "width"),
            (select_first, "n"),
            (compact, "capacity"),
        )
        for value, got in (
            (-1, "int -1"),
            (1.5, "float 1.5"),
            (True, "bool True"),
            (torch.tensor(2), "int64"),
        )
    ],
    *[
        bad(op, "position", value, got=got)
        for op in (select_threshold, select_topk, select_window, select_first, compact)
        for value, got in (
            (torch.zeros(1, 5), "float32"),
            (torch.zeros(1, 4, dtype=torch.int32), r"\[1, 4\]"),
            (torch.zeros(5, dtype=torch.int32), r"\[5\]"),
            (torch.zeros(1, 5, 3, dtype=torch.int32), r"\[1, 5, 3\]"),
            ([0, 1], "list"),
        )
    ],
    bad(selected_attention, "q", lambda x: x[:, :, :3], at="k", got="2 heads"),
    # SDPA ends the process where there is no head
    bad(selected_attention, "q", lambda x: x[:, :, :0], got=r"\[1, 5, 0, 4\]"),
    bad(selected_attention, "q", lambda x: x[..., :0], got=r"\[1, 5, 4, 0\]"),
    bad(selected_attention, "k", lambda x: x.double(), got="float64"),
    bad(selected_attention, "v", lambda x: x.double(), got="float64"),
    bad(selected_attention, "evict_at", lambda x: torch.cat([x, x], 2), got=r"\[1, 5, 4\]"),
    bad(selected_attention, "logit_bias", lambda x: with_one(x, INF), got="inf"),
    bad(selected_attention, "logit_bias", lambda x: with_one(x, NAN), got="nan"),
    bad(selected_attention, "key_lengths", ints(6), got="6"),
    bad(selected_attention, "key_lengths", ints(-1), got="-1"),
    bad(selected_attention, "key_lengths", ints(1, 2), got=r"\[2\]"),
    bad(selected_attention, "key_lengths", torch.ones(1), got="float32"),
    bad(selected_attention, "key_lengths", ints(3), base=attention_packed, got="int32"),
    bad(selected_attention, "query_position", ints(0, 1, 2, 3, 4), got=r"\[5\]"),
    bad(selected_attention, "query_position", torch.zeros(1, 5), got="float32"),
    bad(
        selected_attention,
        "query_position",
        torch.zeros(1, 5, 2, dtype=torch.int32),
        got=r"\[1, 5, 2\]",
    ),
    bad(selected_attention, "key_position", ints(0, 1, 2, 3, 4), got=r"\[5\]"),
    bad(selected_attention, "key_position", torch.zeros(1, 5), got="float32"),
    bad(
        selected_attention,
        "key_position",
        torch.zeros(1, 5, 3, dtype=torch.int32),
        got=r"\[1, 5, 3\]",
    ),
    bad(
        selected_attention,
        "q",
        lambda x: x[:, :3],
        base=attention_packed,
        at="cu_seqlens",
        got="5 keys, 3 queries",
    ),
]


@pytest.mark.parametrize(("op", "base", "name", "value", "at", "got"), TABLE)
def test_bad_values(
    op: Callable[..., Any], base: Any, name: str, value: Any, at: str, got: str
) -> None:
    call = base() | CALLS[op][1]
    call[name] = value(call[name]) if callable(value) else value
    with pytest.raises(ValueError, match=rf"^{at}: expected .+, got .*{got}"):
        op(**call)


@pytest.mark.parametrize(
    "op", [gated_delta_rule, select_topk, compact, selected_attention], ids=lambda x: x.__name__
)
def test_packed_batches_have_one_row(op: Callable[..., Any]) -> None:
    build, options = CALLS[op]
    call = {
        name: torch.cat([x, x])
        for name, x in build().items()
        if name not in ("cu_seqlens", "initial_state")
    }
    with pytest.raises(
        ValueError, match=r"^cu_seqlens: expected a packed batch .*, got a batch of 2 rows"
    ):
        op(**call, **options, cu_seqlens=ints(0, 5))


@pytest.mark.parametrize(
    "op", [gated_delta_rule, surprise, selected_attention], ids=lambda x: x.__name__
)
def test_integer_inputs(op: Callable[..., Any]) -> None:
    build, _ = CALLS[op]
    first = "v" if op is surprise else "q"
    call = {name: x.long() if x.is_floating_point() else x for name, x in build().items()}
    with pytest.raises(ValueError, match=f"^{first}: expected a floating-point dtype, got int64"):
        op(**call)


class Watched(Tensor):
    """A tensor that must not be read on the host."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not re.search(r"\b(item|tolist|aminmax|__bool__|__float__)\b", str(func)), (
            f"{func} reads the tensor"
        )
        return super().__torch_function__(func, types, args, kwargs or {})


def test_values_of_subclasses_and_meta_tensors_are_not_read() -> None:
    call = rule()
    del call["cu_seqlens"]
    wrong = call["beta"] + 5
    with pytest.raises(ValueError, match=r"^beta: "):
        gated_delta_rule(**(call | {"beta": wrong}))
    gated_delta_rule(**(call | {"beta": wrong.as_subclass(Watched)}))
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in (call | {"beta": wrong}).items()}
        assert gated_delta_rule(**fake, metric="cosine").out.shape == call["v"].shape
    assert explain(gated_delta_rule, **{name: x.to("meta") for name, x in call.items()}).chosen
    for op in (select_window, select_first):
        build, options = CALLS[op]
        assert (
            op(**{name: x.to("meta") for name, x in build().items()}, **options).device.type
            == "meta"
        )


def test_value_checks_covers_every_device() -> None:
    from hamblocks_ops.arguments import values_are_checked

    there = torch.zeros(3, device="meta")
    assert values_are_checked(torch.zeros(3))
    assert values_are_checked(torch.nn.Parameter(torch.zeros(3)))
    assert not values_are_checked(there)
    assert not values_are_checked(torch.zeros(3).as_subclass(Watched))
    with value_checks():
        assert values_are_checked(there)
    assert not values_are_checked(there)
