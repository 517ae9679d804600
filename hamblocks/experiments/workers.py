"""Work in processes of one thread each."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def workers(count: int) -> Iterator[Callable[..., Future[Any]]]:
    """A function that submits work to `count` processes of one thread each, or does it here for 0.

    Small models gain nothing from a second thread, and processes of several threads hinder each
    other.
    """
    if count == 0:
        yield _do_here
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=torch.set_num_threads, initargs=(1,)) as p:
        yield p.submit


def _do_here(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(function(*arguments))
    return future
