"""Runs a function on many elements: in this process, in several, or on Beam workers.

An `Each` calls function(element, progress) for every element and returns when all are done. What
the function makes, it writes to files.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from tqdm import tqdm

from data_pipelines.common import NO_BEAM
from imagen_jax.common.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_done: Any = None  # in a worker process: the shared counts of items and bytes


class Each(Protocol):
    def __call__(
        self,
        function: Callable[[Any, Callable[[int, int], None]], None],
        elements: Sequence[Any],
        label: str,
        total_bytes: int,
    ) -> None: ...


def local(workers: int) -> Each:
    """Returns an `Each` that uses this process, or `workers` others if there are more than one."""
    pool = functools.cache(lambda: _Pool(workers))  # started when there is work for it

    def each(function, elements, label, total_bytes):
        if not elements:
            return
        with _bar(label, total_bytes) as update, one_line():
            if min(workers, len(elements)) == 1:
                for element in elements:
                    function(element, update)
            else:
                pool().run(function, elements, update)

    return each


@contextlib.contextmanager
def _bar(label: str, total_bytes: int) -> Iterator[Callable[[int, int], None]]:
    """Shows bytes read with the time left, and items a second; yields the function to update it."""
    start, items = time.perf_counter(), 0
    words = {"desc": label, "unit": "B", "unit_scale": True, "mininterval": 0.5}
    with tqdm(total=total_bytes or None, **words) as bar:

        def update(num: int, size: int) -> None:
            nonlocal items
            items += num
            speed = items / (time.perf_counter() - start)
            bar.set_postfix_str(f"{items:,} items, {speed:,.0f} items/s", refresh=False)
            bar.update(size)

        yield update
        bar.update(max(0, total_bytes - bar.n))  # what was read but is no image


class _Pool:
    """Worker processes that count what they have done."""

    def __init__(self, workers: int):
        context = multiprocessing.get_context("spawn")  # a fork would copy other threads' locks
        self._done, self._shown = context.Array("q", 2), (0, 0)
        self._pool = ProcessPoolExecutor(workers, context, _start_worker, (self._done,))

    def run(self, function, elements, update) -> None:
        running = [self._pool.submit(_call, function, element) for element in elements]
        try:
            while running:
                finished, running = wait(running, 0.5, FIRST_EXCEPTION)
                now = tuple(self._done)
                update(*(a - b for a, b in zip(now, self._shown, strict=True)))
                self._shown = now
                for future in finished:
                    future.result()
        except BrokenProcessPool as e:
            raise UserError(
                "a worker process was killed, perhaps for want of memory. Finished files are kept: "
                "run the same command again, with fewer --workers"
            ) from e
        except BaseException:
            self._pool.shutdown(cancel_futures=True)
            raise


def _start_worker(done) -> None:
    global _done
    _done = done
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()


def _die_with_parent(parent: int) -> None:
    """Ends this process if the command is killed; the pool itself would wait forever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _call(function, element) -> None:
    def progress(items: int, size: int) -> None:
        with _done.get_lock():
            _done[0] += items
            _done[1] += size

    with one_line():
        function(element, progress)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Turns a full disk into a UserError."""
    try:
        yield
    except OSError as e:
        if e.errno not in _FULL:
            raise
        raise UserError(
            f"{e.strerror} ({e.filename or 'while writing the dataset'}). Finished files are kept: "
            "make room and run the same command again"
        ) from e


def beam(options: Sequence[str]) -> Each:
    """Returns an `Each` that uses the workers of an Apache Beam pipeline.

    Raises:
      UserError: Beam is not installed.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as e:
        raise UserError(NO_BEAM) from e
    pipeline_options = PipelineOptions([f"--{option}" for option in options])

    def each(function, elements, label, total_bytes):
        del total_bytes
        if not elements:
            return
        try:
            with apache_beam.Pipeline(options=pipeline_options) as pipeline:
                spread = pipeline | "List" >> apache_beam.Create(elements) | apache_beam.Reshuffle()
                spread | label >> apache_beam.Map(_call_quietly, function)
        except Exception as e:  # runners add to the exceptions of workers, or wrap them
            *before, text = str(e).split("UserError: ")
            if before or isinstance(e, UserError):
                raise UserError(re.split(r" \[while running|\\n|\n", text)[0]) from e
            raise

    return each


def _call_quietly(element, function) -> None:
    with one_line():
        function(element, lambda items, size: None)
