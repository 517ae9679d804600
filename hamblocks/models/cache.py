"""The cache of a model as transformers wants it: it counts tokens seen, whatever is stored of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor
from transformers import Cache

from hamblocks.cache import cache_transaction
from hamblocks.models.configuration import HAMConfig
from hamblocks.state import HAMState
from hamblocks_ops.arguments import wrong

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
    "attention",
    "combiner",
    "own_layers",
)
"""What two configurations must share for a cache to serve both."""


@final
class HAMCache(Cache):
    """What a model remembers of a batch: a `HAMState` per layer, and how many columns of the batch it has seen.

    Every call that is given the cache goes on where it stands and moves it; a call that raises leaves it as it was.

    Attributes:
        states: one per layer; None before the first token.
        columns: of the batch seen so far, padding included: what transformers calls the sequence length.
        config: of the model that it belongs to; None before the first token.
    """

    def __init__(
        self, config: HAMConfig | None = None, *, page_size: int = 32, max_pages: int | None = None
    ) -> None:
        """An empty cache, for any batch size.

        Args:
            config: of the model that it will serve; None: of the first that it is given to.
            page_size: tokens in a page of a layer's cache.
            max_pages: the most that a layer's cache may grow to; None: no limit.
        """
        super().__init__(layers=[])
        self.config, self.page_size, self.max_pages = config, page_size, max_pages
        self.states: list[HAMState] | None = None
        self.columns = 0

    # what the model asks

    @property
    def seen(self) -> Tensor | None:
        """Tokens seen of every sequence, without padding, int32 `[N]`; None before the first."""
        return None if self.states is None else self.states[0].position

    def check(self, config: HAMConfig, batch: int) -> None:
        """Checks that a model may go on with a batch.

        Raises:
            ValueError: the cache is of another configuration or batch size.
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

    @contextlib.contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """Within this context an exception leaves the cache as it was."""
        before = self.config, self.states, self.columns
        try:
            with cache_transaction():
                yield
        except BaseException:
            self.config, self.states, self.columns = before
            raise

    def advance(self, config: HAMConfig, states: list[HAMState], columns: int) -> None:
        """Takes the states behind so many more columns."""
        self.config, self.states, self.columns = config, states, self.columns + columns

    # what transformers asks

    def __len__(self) -> int:
        return 0 if self.states is None else len(self.states)

    def __repr__(self) -> str:
        return f"HAMCache({max(self.batch_size, 0)} sequences, {self.columns} columns seen)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch seen so far: tokens and padding, stored or not."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns of a mask for so many more tokens, and where they begin."""
        return self.columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no limit."""
        return -1

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        """-1: there is no limit; the name that transformers had for it at first."""
        return -1

    @property
    def max_cache_len(self) -> None:
        """There is no limit."""
        return

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether something was seen."""
        return self.states is not None

    @property
    def batch_size(self) -> int:
        """Sequences; -1 before the first token."""
        return -1 if self.seen is None else self.seen.shape[0]

    @property
    def is_initialized(self) -> bool:
        """Whether something was seen."""
        return self.states is not None

    @property
    def is_compileable(self) -> bool:
        """False: its shapes follow what is stored."""
        return False

    @property
    def is_croppable(self) -> bool:
        """False: a recurrence goes back to a `checkpoint` only."""
        return False

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

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Always raises: what is stored is the layers' decision."""
        raise ValueError(
            "past_key_values: expected a HAMModel to fill a HAMCache, got keys and values to store"
        )

    def reset(self) -> None:
        """Forgets everything; any batch may follow."""
        self.states, self.columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Goes on with sequences beam_idx[0], beam_idx[1], ...; any may come several times or not at all."""
        self._change(lambda state: state.reorder(beam_idx.to(state.position.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, one beside the other."""
        if self.seen is not None:
            self.reorder_cache(
                torch.arange(self.batch_size, device=self.seen.device).repeat_interleave(repeats)
            )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these sequences: indices, or bool `[N]`."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def checkpoint(self) -> None:
        """Records this point, to `crop` back to."""
        self._change(lambda state: state.checkpoint(key=self.columns))

    def crop(self, tokens_to_remove: int) -> None:
        """Goes back to a recorded point.

        Args:
            tokens_to_remove: columns to go back by, as a negative number; a positive one is the length to go back to.

        Raises:
            ValueError: no `checkpoint` was recorded there, or the cache is empty.
        """
        columns = self.columns + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if columns == self.columns:
            return
        recorded = [point.key for point in self.states[0].checkpoints] if self.states else []
        if columns not in recorded:
            known = ", ".join(map(str, recorded)) or "none"
            expected = f"one that leads back to a checkpoint ({known})"
            raise wrong("tokens_to_remove", expected, f"a length of {columns}")
        self._change(lambda state: state.crop(key=columns))
        self.columns = columns

    # what is in it

    def fork(self) -> HAMCache:
        """A second cache to go on from; what is stored is shared until one of the two changes it."""
        fork = HAMCache(self.config, page_size=self.page_size, max_pages=self.max_pages)
        fork.columns = self.columns
        fork.states = None if self.states is None else [state.fork() for state in self.states]
        return fork

    @property
    def nbytes(self) -> int:
        """Bytes in use, of all layers: memories, ledgers and stored tokens."""
        return sum(state.nbytes for state in self.states or [])

    @property
    def tokens(self) -> list[Tensor]:
        """Tokens stored, int64 `[N, Hkv]` for every layer; 0 in a layer without attention."""
        return [self._tokens(state) for state in self.states or []]

    def _tokens(self, state: HAMState) -> Tensor:
        if state.cache is not None:
            return state.cache.tokens
        heads = 0 if self.config is None else self.config.num_key_value_heads or 0
        return state.position.new_zeros(len(state.position), heads, dtype=torch.int64)

    def _change(self, change: Callable[[HAMState], HAMState]) -> None:
        """Changes the states of all layers, or none."""
        if self.states is not None:
            with cache_transaction():
                self.states = [change(state) for state in self.states]
