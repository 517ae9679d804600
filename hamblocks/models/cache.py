"""The cache of a model, with the interface of transformers' `Cache`.

Its length counts the tokens that the model has seen, however few of them the layers store. Shape
letters are explained in docs/reference/shapes.md.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from typing_extensions import Self

from hamblocks.cache import cache_transaction
from hamblocks.models.batches import BatchLayout
from hamblocks.models.configuration import HAMConfig
from hamblocks.protocols import check_count
from hamblocks.state import HAMState
from hamblocks_ops.arguments import wrong

CACHE = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"
"""The name of a cache among arguments and outputs: "cache" from transformers 5.24 on."""

SHAPING = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "layer_types",
    "memory",
    "gate",
    "selector",
    "query_gate",
    "attention",
    "combiner",
    "own_layers",
)
"""Fields in which two configurations must agree for a cache to fit both models."""


class StateCache(Cache):
    """States of HAM layers as a cache of transformers. A call that raises leaves it unchanged.

    Attributes:
        states: one `HAMState` per layer; None before the first token.
        columns: number of columns of the batch seen so far, padding included. transformers calls
            it the sequence length.
        page_size: tokens in a page of a layer's cache.
        max_pages: limit to the pages of a layer's cache, or None.
        rollback: number of last columns that `crop` can always take back.
        is_recording: whether every column since the last `crop` can be taken back too. Assisted
            generation sets it while it runs.
    """

    def __init__(
        self, *, page_size: int = 32, max_pages: int | None = None, rollback: int = 0
    ) -> None:
        """Makes an empty cache, for any batch size.

        Args:
            page_size: tokens in a page of a layer's cache.
            max_pages: limit to the pages of a layer's cache. A call that needs more pages raises a
                ValueError. None: no limit.
            rollback: how many of the last columns `crop` can take back without a checkpoint. Above
                0, the last `rollback` columns of a call run one by one (see
                `HAMLayer.init_state`).

        Raises:
            ValueError: `rollback` is not an integer of at least 0.
        """
        super().__init__(layers=[])
        self.page_size, self.max_pages = page_size, max_pages
        self.rollback, self.is_recording = check_count("rollback", rollback), False
        self.states: list[HAMState] | None = None
        self.columns = 0
        # bool [N, C]: which of the last C columns, those that can be taken back, hold tokens
        self._recorded: Tensor | None = None

    @property
    def seen(self) -> Tensor | None:
        """Tokens seen of each sequence, without padding, int32 `[N]`; None before the first."""
        return None if self.states is None else self.states[0].position

    @contextlib.contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """Restores the cache if the body raises."""
        before = dict(vars(self))
        try:
            with cache_transaction():
                yield
        except BaseException:
            vars(self).update(before)
            raise

    def with_room(self, states: list[HAMState], columns: int) -> list[HAMState]:
        """The states with room to take back what this cache promises, before a call.

        Args:
            states: the states that the call continues.
            columns: how many of the call's last columns may be taken back while the cache records.
        """
        size = self.rollback
        if self.is_recording:
            size = max(size, self._recordable + columns)
        if not size and states[0].ring is None:
            return states
        return [state.with_rollback(size) for state in states]

    def activate_past_recording(self) -> None:
        """Starts a recording; transformers (5.24 on) calls this before assisted generation."""
        self.is_recording = True

    def stop_recording(self) -> None:
        """Ends a recording; `crop` can take back the last `rollback` columns again."""
        self.is_recording = False
        self._forget()

    def _forget(self) -> None:
        """Drops what is recorded of more than the last `rollback` columns."""
        size = self.rollback
        self._change(lambda state: state.with_rollback(size))
        if self._recorded is not None:
            self._recorded = self._recorded[:, -size:] if size else None

    @property
    def _recordable(self) -> int:
        """How many of the last columns can be taken back."""
        return 0 if self._recorded is None else self._recorded.shape[1]

    # called by transformers

    def __len__(self) -> int:
        return 0 if self.states is None else len(self.states)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({max(self.batch_size, 0)} sequences, {self.columns} columns seen)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of columns seen so far, tokens and padding, stored or not."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Returns the columns of an attention mask for `query_length` more, and its offset, 0."""
        return self.columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Returns -1: there is no limit."""
        return -1

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        """Returns -1: there is no limit. Older versions of transformers use this name."""
        return -1

    @property
    def max_cache_len(self) -> None:
        """None: there is no limit."""
        return

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether the cache has seen a token."""
        return self.states is not None

    @property
    def batch_size(self) -> int:
        """Number of sequences; -1 before the first token."""
        return -1 if self.seen is None else self.seen.shape[0]

    @property
    def is_initialized(self) -> bool:
        """Whether the cache has seen a token."""
        return self.states is not None

    @property
    def is_compileable(self) -> bool:
        """False: shapes depend on how many tokens are stored."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take columns back without a `checkpoint`."""
        return self.rollback > 0 or self.is_recording

    @property
    def is_sliding(self) -> list[bool]:
        """False, for every layer."""
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        """False, for every layer."""
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        """False, for every layer."""
        return [False] * len(self)

    def reset(self) -> None:
        """Empties the cache; the next batch may have any size."""
        self.states, self.columns, self._recorded = None, 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces the sequences by sequences `beam_idx[0]`, `beam_idx[1]`, and so on.

        Args:
            beam_idx: int64 `[N']`; a sequence may appear several times or not at all.
        """
        self._change(lambda state: state.reorder(beam_idx.to(state.position.device)))
        if self._recorded is not None:
            self._recorded = self._recorded[beam_idx.to(self._recorded.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times; the copies of a sequence are neighbours."""
        if self.seen is not None:
            self.reorder_cache(
                torch.arange(self.batch_size, device=self.seen.device).repeat_interleave(repeats)
            )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only some sequences: `indices` is int64, or bool `[N]`."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def checkpoint(self) -> None:
        """Records the state of this moment, so that `crop` can return to it."""
        self._change(lambda state: state.checkpoint(key=self.columns))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last columns back, or returns to a recorded checkpoint.

        The cache is then as if the columns had never been seen. It can go back by the last
        `rollback` columns; while it records, by all columns since the last `crop`. A call of this
        method ends what may be taken back by the recording, 0 columns included.

        Args:
            tokens_to_remove: a negative number counts the columns to remove; a positive number is
                the length to return to, as in transformers.

        Raises:
            ValueError: `tokens_to_remove` is not an integer of at least minus the number of
                columns; or the columns are not recorded, and no `checkpoint` was recorded at that
                length.
        """
        if isinstance(tokens_to_remove, Tensor):  # transformers counts matches in a tensor
            tokens_to_remove = tokens_to_remove.item()
        tokens_to_remove = check_count("tokens_to_remove", tokens_to_remove, -self.columns)
        columns = self.columns + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        back = self.columns - columns
        if 0 < back <= self._recordable:
            self._take_back(back)
        elif back:
            self._return_to(columns)
        self.columns = columns
        if self.is_recording:
            self._forget()

    def _take_back(self, columns: int) -> None:
        assert self._recorded is not None
        tokens = self._recorded[:, -columns:].sum(1)
        self._change(lambda state: state.rollback(tokens))
        self._recorded = self._recorded[:, :-columns]

    def _return_to(self, columns: int) -> None:
        """Returns to the checkpoint with that number of columns."""
        known = [point.key for point in self.states[0].checkpoints] if self.states else []
        if columns not in known:
            shown = ", ".join(map(str, known)) or "none"
            expected = f"the length of a checkpoint ({shown})"
            if self._recordable:
                expected += f" or the last {self._recordable} columns"
            raise wrong("tokens_to_remove", expected, f"a length of {columns}")
        # the columns before a checkpoint are not known any more, so none of them can be taken back
        self._change(lambda state: state.crop(key=columns).with_rollback(0))
        self._recorded = None

    # what the cache holds

    def fork(self) -> Self:
        """Returns a second cache that starts from the same state.

        The two share their pages; a page is copied when one of them changes it.
        """
        fork = copy.copy(self)
        fork.states = None if self.states is None else [state.fork() for state in self.states]
        return fork

    @property
    def nbytes(self) -> int:
        """Bytes in use by all layers: memories, ledgers and stored tokens."""
        return sum(state.nbytes for state in self.states or [])

    def _change(self, change: Callable[[HAMState], HAMState]) -> None:
        """Changes the states of all layers; an error leaves all of them unchanged."""
        if self.states is not None:
            with cache_transaction():
                self.states = [change(state) for state in self.states]


@final
class HAMCache(StateCache):
    """The state of a model between two calls, changed in place by every call that is given it.

    Attributes:
        config: configuration of the model that the cache belongs to; None before the first token.
    """

    def __init__(
        self,
        config: HAMConfig | None = None,
        *,
        page_size: int = 32,
        max_pages: int | None = None,
        rollback: int = 0,
    ) -> None:
        """Makes an empty cache, for any batch size.

        Args:
            config: configuration of the model that will use the cache. None: the first model that
                uses it decides.
            page_size: as in `StateCache`.
            max_pages: as in `StateCache`.
            rollback: as in `StateCache`.

        Raises:
            ValueError: `rollback` is not an integer of at least 0.
        """
        super().__init__(page_size=page_size, max_pages=max_pages, rollback=rollback)
        self.config = config

    def check(self, config: HAMConfig, batch: int) -> None:
        """Checks that a model may continue this cache with a batch.

        Args:
            config: configuration of the model.
            batch: number of batch rows.

        Raises:
            ValueError: the cache belongs to a model of another configuration, or its batch size is
                not `batch`.
        """
        if self.config is not None and self.config is not config:
            for name in SHAPING:
                ours, theirs = getattr(config, name), getattr(self.config, name)
                if ours != theirs:
                    raise wrong(
                        "past_key_values",
                        f"a cache of a model with {name} = {ours}",
                        f"one with {theirs}",
                    )
        if self.states is not None and self.batch_size != batch:
            got = f"{batch} (see batch_repeat_interleave, batch_select_indices and reset)"
            raise wrong("input_ids", f"{self.batch_size} sequences, as past_key_values", got)

    def advance(self, config: HAMConfig, states: list[HAMState], layout: BatchLayout) -> None:
        """Stores the states after the columns of a batch with this layout."""
        ring, recorded = states[0].ring, None
        if ring is not None:
            recorded = layout.tokens_of_columns(states[0].position.device)
            if self._recorded is not None:
                recorded = torch.cat([self._recorded, recorded], 1)
            recorded = recorded[:, -ring.size :]
        self._recorded = recorded
        self.config, self.states, self.columns = config, states, self.columns + layout.tokens

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not supported: the layers decide what is stored.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "past_key_values: expected a HAMModel to fill a HAMCache, got keys and values to store"
        )

    @property
    def tokens(self) -> list[Tensor]:
        """Number of stored tokens, int64 `[N, Hkv]`, per layer; 0 in a layer without attention."""
        return [self._tokens(state) for state in self.states or []]

    def _tokens(self, state: HAMState) -> Tensor:
        if state.cache is not None:
            return state.cache.tokens
        heads = 0 if self.config is None else self.config.num_key_value_heads or 0
        return state.position.new_zeros(len(state.position), heads, dtype=torch.int64)


def either_cache(past_key_values: Any, cache: Any) -> Any:
    """Returns the cache that was given under one of its two names, or None.

    Raises:
        ValueError: two caches are given.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise wrong("cache", "None beside past_key_values, its older name", "both")
    return past_key_values if cache is None else cache


def checked_cache(cache: Any, config: HAMConfig, batch: int) -> HAMCache | None:
    """Returns the cache after checking that it fits the model and a batch of `batch` rows.

    Raises:
        ValueError: it is not a HAMCache, or does not fit.
    """
    if cache is None:
        return None
    if not isinstance(cache, HAMCache):
        raise wrong("past_key_values", "a HAMCache", type(cache).__name__)
    cache.check(config, batch)
    return cache
