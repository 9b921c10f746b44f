"""A request to stop: a flag that a signal or a file in the run's directory sets, for the loop to look at between steps.

Each rank has its own flag; ranks agree on it elsewhere. The flag and the second signal must work while the main thread waits in
a collective, where Python runs no handlers: the C library's handler writes the signal's number to a pipe (`set_wakeup_fd`), and
a thread reads it.
"""

import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

ECHO_SECONDS = 0.5
STOP_FILE_SECONDS = 0.5


class StopRequest:
    """Set by one of `signals` (names such as "SIGTERM") or by the existence of `stop_file`, for the time of a `with` block.

    A second signal ends the process at once with exit code 128 + its number, even while the main thread waits for other ranks.
    One that comes within half a second of the first is its echo, not a second: Slurm signals a launcher and its workers alike,
    and the launcher passes its own on.
    Signals: handled in the main thread only; a `with` block of another thread looks at the file alone. Forked children, such
             as data workers, have the handlers of before.
    Raises:  ValueError for a name that is no signal.
    """

    def __init__(self, signals: Sequence[str], stop_file: Path | None) -> None:
        known = {number.name: number for number in signal.Signals}
        unknown = [name for name in signals if name not in known]
        if unknown:
            raise ValueError(f"ckpt.on_signal: must be names of signals, such as SIGTERM; got {', '.join(unknown)}.")
        self._signals = [known[name] for name in signals]
        self._stop_file = stop_file
        self._reason: str | None = None
        self._next_look = 0.0
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._old_wakeup = -1
        self._thread: threading.Thread | None = None

    @property
    def reason(self) -> str | None:
        """Who asked: a signal's name, "stop file", or None. Once set it stays. Looks at the file twice a second at most."""
        if self._reason is None and self._stop_file is not None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + STOP_FILE_SECONDS
            if self._stop_file.exists():
                self._reason = "stop file"
        return self._reason

    def clear_stop_file(self) -> None:
        """Remove the file, so that the next life of the run does not stop too. For one rank, once all have agreed."""
        if self._stop_file is not None:
            self._stop_file.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        if self._signals and threading.current_thread() is threading.main_thread():
            reader, writer = self._pipe = os.pipe()
            os.set_blocking(writer, False)
            self._old_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, args=(reader,), name="stop request", daemon=True)
            self._thread.start()
            self._before = {number: signal.signal(number, self._note) for number in self._signals}
            os.register_at_fork(after_in_child=_forgetter(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pipe is None or self._thread is None:
            return
        reader, writer = self._pipe
        self._restore()
        os.close(writer)  # the thread reads the end of the pipe, and ends
        self._thread.join()
        os.close(reader)
        self._pipe = self._thread = None

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        signal.set_wakeup_fd(self._old_wakeup)

    def _forget(self) -> None:
        """In a forked child: signals to it are none of the parent's, whose pipe it must not write to."""
        if self._pipe is not None:
            self._restore()
            for end in self._pipe:
                os.close(end)
            self._pipe = self._thread = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, as soon as it runs Python: the flag is set when the call that a signal interrupted is left."""
        self._reason = self._reason or signal.Signals(number).name

    def _listen(self, reader: int) -> None:
        first: float | None = None
        while received := os.read(reader, 1):
            number = received[0]
            if number not in self._signals:
                continue
            if first is None:
                first = time.monotonic()
                self._note(number, None)
            elif time.monotonic() - first > ECHO_SECONDS:
                name = signal.Signals(number).name
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, _farewell(name))
                os._exit(128 + number)


def _farewell(name: str) -> bytes:
    return f"seqengine: {name} after another signal: ending at once, without saving.\n".encode()


def _forgetter(request: StopRequest) -> Callable[[], None]:
    """A callback for forked children that does not keep the request: Python has no way to take such a callback back."""
    reference = weakref.ref(request)

    def forget() -> None:
        alive = reference()
        if alive is not None:
            alive._forget()

    return forget
