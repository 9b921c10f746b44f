"""Batches read ahead of training by threads; what is read, and in which order, does not depend on how many there are.

Threads, because reading is numpy on mapped files: there is nothing to pickle and no process to lose.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

from seqengine.data.contract import Batch
from seqengine.data.stream import Stream

AHEAD = 2
"""Batches that are asked for ahead, per worker."""


class Request(NamedTuple):
    """Arguments of `Stream.batch`: samples first .. first + rows - 1, tokens [begin, end)."""

    first: int
    rows: int
    begin: int
    end: int


class Reader:
    """Reads a stream with `workers` threads; 0: in the caller's. Made before or after a fork, it starts its threads when used.

    Memory: at most AHEAD * workers batches beside the one in use.
    """

    def __init__(self, stream: Stream, *, workers: int) -> None:
        if workers < 0:
            raise ValueError(f"Reader: workers must be at least 0; got {workers}")
        self.stream = stream
        self.workers = workers
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    def batches(self, requests: Iterator[Request]) -> Iterator[Batch]:
        """The batch of each request, in order. `requests` may be endless; it is asked at most AHEAD * workers ahead.

        Raises what reading a batch, or asking for a request, raises: at that batch's turn, after all before it.
        """
        if self._closed:
            raise ValueError("Reader.batches: the reader is closed")
        if not self.workers:
            for request in requests:
                yield self._read(request)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="seqengine-data")
        yield from self._ahead(self._pool, requests)

    def _ahead(self, pool: ThreadPoolExecutor, requests: Iterator[Request]) -> Iterator[Batch]:
        pending: deque[Future[Batch]] = deque()
        try:
            for future in _asked(pool, requests, self._read):
                pending.append(future)
                if len(pending) > AHEAD * self.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _read(self, request: Request) -> Batch:
        return self.stream.batch(request.first, request.rows, begin=request.begin, end=request.end)

    def close(self) -> None:
        """Ends the threads and waits for them. May be called again."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _asked(
    pool: ThreadPoolExecutor, requests: Iterator[Request], read: Callable[[Request], Batch]
) -> Iterator[Future[Batch]]:
    """The batch to come of each request; of one that could not be asked for, the reason."""
    asking = iter(requests)
    while True:
        try:
            request = next(asking)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001  (raised again when it is this batch's turn)
            failed: Future[Batch] = Future()
            failed.set_exception(error)
            yield failed
            return
        yield pool.submit(read, request)
