"""One adapter per kind of part, so that a law is written once for all kinds.

A subject holds a part and its inputs, and calls the part as a layer would. Its results and inputs
are `[B, T, ...]` by name; shape letters are explained in docs/reference/shapes.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hamblocks import contracts
from hamblocks.attention import SelectedAttention
from hamblocks.cache import KVCache
from hamblocks.combiners import GatedSum
from hamblocks.gates import PredictionError
from hamblocks.keys import DenseKeys
from hamblocks.layer import HAMLayer
from hamblocks.memory import GatedDeltaMemory
from hamblocks.protocols import (
    LayerDims,
    MemoryTrace,
    NewTokens,
    ProjectsItself,
    ReadsUnstored,
    reads_given,
)
from hamblocks.reachable import hidden_modules
from hamblocks.selectors import Threshold, TopK, Window
from hamblocks.testing.inputs.draw import Draw
from hamblocks.testing.inputs.parts import PartInputs
from hamblocks_ops import surprise
from hamblocks_ops.precision import wide

Results = dict[str, Tensor]


def made(part: Any, dims: LayerDims | None, dtype: torch.dtype, seed: int) -> Any:
    """Returns a copy of a part, built and in eval mode, as a layer would use it.

    Every weight is moved by a random number. At its initial value a weight may hide a mistake: a
    norm whose scale is all ones, for example.

    Args:
        part: any part; it is not changed.
        dims: sizes to build it for; None: it is not built.
        dtype: dtype of the weights.
        seed: seed of the weights.
    """
    part = copy.deepcopy(part)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build = getattr(part, "build", None)
        if build is not None and dims is not None:
            build(dims)
        # modules in a plain part are moved and cast as the layer that registers them does it
        for module in modules_of(part):
            with torch.no_grad():
                for weight in module.parameters():
                    if weight.is_floating_point():
                        weight.add_(torch.randn_like(weight), alpha=0.2)
            module.to(dtype).eval()
    return part


def modules_of(part: Any) -> list[nn.Module]:
    """The part itself if it is a module, else the modules that it holds."""
    return [part] if isinstance(part, nn.Module) else list(hidden_modules(part).values())


class Subject:
    """A part and its inputs. A subclass knows how its kind is called.

    Attributes:
        kind: the kind of part.
        compiles: name of the attribute that `torch.compile` is tried on.
        part: the part, as `made` returns it for this case.
        inputs: arguments by name, each `[B, T, ...]`.
    """

    kind: ClassVar[str]
    compiles: ClassVar[str] = "part"
    part: Any
    inputs: dict[str, Tensor]

    def __init__(self, part: Any, case: PartInputs) -> None:
        self.case = case
        self.part = made(part, case.dims, case.dtype, case.seed)
        self.inputs = self.drawn(case)

    def drawn(self, case: PartInputs) -> dict[str, Tensor]:
        """Draws the inputs of a case."""
        raise NotImplementedError

    def start(self, sequences: int) -> Any:
        """The state of `sequences` sequences before the first token; None: no state."""
        return

    def run(
        self, inputs: Mapping[str, Tensor], state: Any = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Results, Any]:
        """Calls the part.

        Args:
            inputs: `[B, T, ...]` by name; packed: `[1, sum(T), ...]`.
            state: from `start` or from the last call. None: whole sequences.
            cu_seqlens: int32 `[N+1]`, borders of packed sequences.

        Returns:
            The results `[B, T, ...]` by name, and the state for the next call.
        """
        raise NotImplementedError

    def shapes(self) -> dict[str, tuple[tuple[int | None, ...], torch.dtype | None]]:
        """Shape after `[B, T]` and dtype of every result; None: any."""
        raise NotImplementedError


class GateSubject(Subject):
    """`gate(x, trace) -> score, logit_bias`."""

    kind = "gate"

    def drawn(self, case: PartInputs) -> dict[str, Tensor]:
        """x, and the fields of a trace that are tensors."""
        draw, (hidden, heads, kv_heads, dim) = Draw(case.seed), case.dims[:4]
        wider = wide(torch.empty(0, dtype=case.dtype))
        result = {
            "x": case.numbers(draw, hidden),
            "k": F.normalize(case.numbers(draw, heads, dim), dim=-1),
            "v": case.numbers(draw, heads, dim),
            "beta": case.numbers(draw, heads, dtype=wider).tanh().abs(),
            "position": case.position,
        }
        residual = case.numbers(draw, heads, dim)
        metric: str | None = getattr(self.part, "metric", None)
        if metric is None:
            result["residual"] = residual
        else:
            result["score"] = surprise(residual, result["v"], metric=metric)
        result["given"] = case.numbers(draw, heads, dtype=wider)
        stored = {name: case.numbers(draw, kv_heads, dim) for name in ("stored_k", "stored_v")}
        return result | stored

    def trace(self, inputs: Mapping[str, Tensor]) -> MemoryTrace:
        """The trace that a layer passes to the gate, with all that a gate may ask for."""
        fields: dict[str, Any] = {name: inputs.get(name) for name in MemoryTrace._fields}
        return MemoryTrace(**fields | {"metric": getattr(self.part, "metric", None)})

    def run(
        self, inputs: Mapping[str, Tensor], state: Any = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Results, Any]:
        """Results: score, and logit_bias where the gate returns one."""
        score, logit_bias = self.part(inputs["x"], self.trace(inputs))
        # the layer detaches scores: only the bias carries gradient
        return {"score": score.detach()} | (
            {} if logit_bias is None else {"logit_bias": logit_bias}
        ), None

    def shapes(self) -> dict[str, tuple[tuple[int | None, ...], torch.dtype | None]]:
        """Any number of heads: the law `has_its_shapes` knows the three right ones."""
        return {"score": ((None,), None), "logit_bias": ((None,), None)}


class QueryGateSubject(GateSubject):
    """`query_gate(x, trace) -> reads, weight, window`."""

    kind = "query_gate"

    def run(
        self, inputs: Mapping[str, Tensor], state: Any = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Results, Any]:
        """Results: reads as numbers 0 and 1, and weight where the query gate returns one."""
        result = self.part(inputs["x"], self.trace(inputs))
        contracts.check_query_gate(result, inputs["x"])
        reads = {"reads": result.reads.to(inputs["x"].dtype)}
        return reads | ({} if result.weight is None else {"weight": result.weight}), None

    def shapes(self) -> dict[str, tuple[tuple[int | None, ...], torch.dtype | None]]:
        """One decision for all heads."""
        return {"reads": ((), None), "weight": ((1,), None)}


class MemorySubject(Subject):
    """`memory(x, q, k, v, position=) -> read, trace, state`.

    A memory that waits for the selector (`ReadsUnstored`) then reads, with drawn decisions.
    """

    kind = "memory"
    metric: str | None = None

    def drawn(self, case: PartInputs) -> dict[str, Tensor]:
        """x, q, k, v, position, and what is stored for a memory that waits for it."""
        draw, (hidden, heads, kv_heads, dim) = Draw(case.seed), case.dims[:4]
        inputs = {
            "x": case.numbers(draw, hidden),
            "q": case.numbers(draw, heads, dim),
            "k": case.numbers(draw, kv_heads, dim),
            "v": case.numbers(draw, kv_heads, dim),
            "position": case.position,
        }
        if isinstance(self.part, ReadsUnstored):
            inputs["stored"] = draw.integers(0, 2, (*case.rows, self.read_size()[0])) == 1
        return inputs

    def run(
        self, inputs: Mapping[str, Tensor], state: Any = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Results, Any]:
        """Results: the read, and the fields of the trace that are not None."""
        given = dict(inputs)
        stored = given.pop("stored", None)
        read, trace, state = self.part(
            **given, state=state, cu_seqlens=cu_seqlens, metric=self.metric
        )
        if stored is not None:
            read, state = self.part.read_unstored(trace, stored, state=state, cu_seqlens=cu_seqlens)
        fields = {
            name: x
            for name, x in trace._asdict().items()
            if isinstance(x, Tensor) and name not in ("position", "given")
        }
        return {"read": read} | fields, state

    def read_size(self) -> tuple[int, int]:
        """Heads and size of the read."""
        dims = self.case.dims
        if isinstance(self.part, ProjectsItself) and self.part.own_projections:
            return self.part.read_size(dims)
        return dims.num_heads, dims.head_dim

    def shapes(self) -> dict[str, tuple[tuple[int | None, ...], torch.dtype | None]]:
        """Those of the `Memory` protocol."""
        sizes, dtype = self.read_size(), self.case.dtype
        heads = sizes[0]
        return {
            "read": (sizes, dtype),
            "q": ((heads, None), None),
            "k": ((heads, None), None),
            "v": (sizes, None),
            "beta": ((heads,), None),
            "g": ((heads,), None),
            "residual": (sizes, None),
            "score": ((heads,), None),
        }


_ATTENTION = ("q", "k", "v", "evict_at", "position")


class AttentionSubject(Subject):
    """`prepare(q, k, v, ...)`, then `attention(q, keys) -> read`, as a layer calls them.

    Without a state the keys are those of whole sequences; with one they are those of a cache.

    Attributes:
        changed: applied to the prepared q, k, v by name before they are read; None: no change. A
            check that changes a single token changes it here, because `prepare` may mix tokens.
    """

    changed: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None

    kind = "attention"
    compiles = "whole"

    def __init__(self, part: Any, case: PartInputs) -> None:
        super().__init__(part, case)
        # an attribute of the instance: the compile law puts the traced call in its place
        self.whole = self._whole

    def drawn(self, case: PartInputs) -> dict[str, Tensor]:
        """q, k, v, evict_at, position, and logit_bias where the case has one."""
        draw, (_, heads, kv_heads, dim) = Draw(case.seed), case.dims[:4]
        result = {
            "q": case.numbers(draw, heads, dim),
            "k": case.numbers(draw, kv_heads, dim),
            "v": case.numbers(draw, kv_heads, dim),
            "evict_at": case.lifetimes(draw, kv_heads),
            "position": case.position,
        }
        if case.bias:
            result["logit_bias"] = case.numbers(draw, kv_heads, dtype=wide(result["q"]))
        return result

    def start(self, sequences: int) -> tuple[KVCache, Any]:
        """An empty cache, and no state of the part."""
        return KVCache(sequences, page_size=3), None

    def run(
        self, inputs: Mapping[str, Tensor], state: Any = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Results, Any]:
        """Results: the read. The state is a cache and the state of the part."""
        q, k, v, evict_at, position = (inputs[name] for name in _ATTENTION)
        bias = inputs.get("logit_bias")
        if state is None:
            return {"read": self.whole(q, k, v, evict_at, position, bias, cu_seqlens)}, None
        cache, past = state
        q, k, v, after = self.prepared(q, k, v, position, past)
        extension = cache.extend(k, v, position=position, evict_at=evict_at, logit_bias=bias)
        read = self.part(q, extension.keys)
        return {"read": read}, (extension.commit(position.amax(1) + 1), after)

    def prepared(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor,
        past: Any = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """What `prepare` returns, with the change of `changed`."""
        after, prepare = None, getattr(self.part, "prepare", None)
        if prepare is not None:
            tokens = NewTokens(k, v, position, past, cu_seqlens)
            called = getattr(self.part, "prepares_when_called", False)
            q, k, v, after = self.part(q, tokens) if called else tokens.prepared_by(self.part, q)
        if self.changed is not None:
            q, k, v = self.changed({"q": q, "k": k, "v": v}).values()
        return q, k, v, after

    def _whole(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        evict_at: Tensor,
        position: Tensor,
        logit_bias: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """The read of whole sequences."""
        q, k, v, _ = self.prepared(q, k, v, position, None, cu_seqlens)
        keys = DenseKeys(
            k,
            v,
            position=position,
            evict_at=evict_at,
            query_position=position,
            logit_bias=logit_bias,
            cu_seqlens=cu_seqlens,
        )
        read: Tensor = self.part(q, keys)
        return read

    def shapes(self) -> dict[str, tuple[tuple[int | None, ...], torch.dtype | None]]:
        """The read has the shape and dtype of q."""
        return {"read": ((self.case.dims.num_heads, self.case.dims.head_dim), self.case.dtype)}


class CombinerSubject(Subject):
    """`combiner(x, memory_read, attention_read) -> y`."""

    kind = "combiner"

    def drawn(self, case: PartInputs) -> dict[str, Tensor]:
        """x, memory_read, attention_read."""
        draw, (hidden, heads, _, dim) = Draw(case.seed), case.dims[:4]
        return {
            "x": case.numbers(draw, hidden),
            "memory_read": case.numbers(draw, heads, dim),
            "attention_read": case.numbers(draw, heads, dim),
        }

    def run(
        self, inputs: Mapping[str, Tensor], state: Any = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Results, Any]:
        """Results: y."""
        y = self.part(*inputs.values())
        contracts.check_combiner(y, inputs["x"])
        return {"y": y}, None

    def shapes(self) -> dict[str, tuple[tuple[int | None, ...], torch.dtype | None]]:
        """y has the shape and dtype of x."""
        return {"y": ((self.case.dims.hidden_size,), self.case.dtype)}


class LayerSubject(Subject):
    """`layer(x, state=, cu_seqlens=) -> y, state, stats`, or `layer(x) -> y`."""

    kind = "layer"

    def __init__(self, part: Any, case: PartInputs) -> None:
        dims = getattr(part, "dims", None)
        self.hidden_size = case.dims.hidden_size if dims is None else dims.hidden_size
        super().__init__(part, case)

    def drawn(self, case: PartInputs) -> dict[str, Tensor]:
        """x, and given_score where a gate of the layer reads one."""
        draw = Draw(case.seed)
        inputs = {"x": case.numbers(draw, self.hidden_size)}
        if any(reads_given(getattr(self.part, name, None)) for name in ("gate", "query_gate")):
            inputs["given_score"] = case.numbers(draw, 1)
        return inputs

    def start(self, sequences: int) -> Any:
        """What the layer's `init_state` returns."""
        return self.part.init_state(sequences)

    def run(
        self, inputs: Mapping[str, Tensor], state: Any = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Results, Any]:
        """Results: y, and score and evict_at where the layer returns stats with them."""
        given = {} if state is None else {"state": state}
        given |= {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        given |= {"given_score": inputs["given_score"]} if "given_score" in inputs else {}
        result = self.part(inputs["x"], **given)
        if isinstance(result, Tensor):
            return {"y": result}, None
        y, *rest = result
        stats = getattr(result, "stats", None)
        decided = {}
        if stats is not None and stats.score is not None:
            decided = {"score": stats.score, "evict_at": stats.evict_at}
        return {"y": y} | decided, rest[0] if rest else None

    def shapes(self) -> dict[str, tuple[tuple[int | None, ...], torch.dtype | None]]:
        """y has the shape and dtype of x."""
        return {
            "y": ((self.hidden_size,), self.case.dtype),
            "score": ((None,), None),
            "evict_at": ((None,), None),
        }


def layer_with(kind: str, part: Any, dims: LayerDims) -> HAMLayer:
    """A layer of these sizes around a copy of one part.

    The other parts are plain ones under which every part has an effect on the output. A layer
    around an attention part has no memory and a window, so that only attention decides.
    """
    parts: dict[str, Any] = {
        "memory": GatedDeltaMemory(conv_size=2),
        "gate": PredictionError(),
        "selector": (Threshold(0.9) | TopK(2)) & Window(6),
        "query_gate": None,
        "attention": SelectedAttention(rope_theta=None if dims.head_dim % 2 else 10_000.0),
        "combiner": GatedSum(),
    }
    if kind == "attention":
        parts["memory"] = parts["gate"] = None
        parts["selector"] = Window(4)
    if isinstance(part, ReadsUnstored):  # lifetimes are final
        parts["selector"] = Threshold(0.9) | Window(6)
    parts[kind] = copy.deepcopy(part)
    hidden, heads, kv_heads, dim = dims[:4]
    return HAMLayer(hidden, heads, num_kv_heads=kv_heads, head_dim=dim, **parts)
