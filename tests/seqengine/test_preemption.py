"""Requests to stop: real signals to this process and to small ones that do not import torch."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from seqengine.preemption import ECHO_SECONDS, StopRequest

ROOT = Path(__file__).parent.parent.parent
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
HEADER = """
import ctypes, os, signal, sys, time
from pathlib import Path
from seqengine.preemption import StopRequest

def wait_in_c():
    "As a collective does: the main thread runs no Python, and other threads may."
    libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)

def say(text):
    print(text, flush=True)

"""


def start(script: str) -> "subprocess.Popen[str]":
    """A process that runs the script, once it has said "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", HEADER + script],
        env={"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    if line != "ready\n":
        process.kill()
        pytest.fail(f"{line}{process.stderr.read()}")
    return process


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_sets_the_flag_and_the_old_handlers_come_back(name):
    before = {n: signal.getsignal(getattr(signal, n)) for n in SIGNALS}
    threads = threading.active_count()
    with StopRequest(SIGNALS, None) as request:
        assert request.reason is None
        os.kill(os.getpid(), getattr(signal, name))
        assert request.reason == name
    assert {n: signal.getsignal(getattr(signal, n)) for n in SIGNALS} == before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads
    assert request.reason == name


def test_a_signal_sent_from_another_thread_sets_the_flag_of_the_main_one():
    with StopRequest(["SIGUSR1"], None) as request:
        thread = threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), signal.SIGUSR1))
        thread.start()
        thread.join()
        assert request.reason == "SIGUSR1"


def test_another_thread_looks_at_the_file_alone(tmp_path):
    found = []

    def look():
        with StopRequest(SIGNALS, tmp_path / "stop") as request:
            (tmp_path / "stop").touch()
            found.append((request.reason, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [("stop file", before)]


def test_a_stop_file_sets_the_flag_and_is_looked_at_twice_a_second_at_most(tmp_path, monkeypatch):
    file, looks, clock = tmp_path / "stop", [], [100.0]
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: (looks.append(path), exists(path))[1])
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    request = StopRequest(SIGNALS, file)
    assert [request.reason for _ in range(1000)] == [None] * 1000
    assert looks == [file]
    file.touch()
    assert request.reason is None
    clock[0] += 0.51
    assert request.reason == "stop file"
    request.clear_stop_file()
    assert not exists(file)
    request.clear_stop_file()
    assert request.reason == "stop file"
    assert len(looks) == 2


def test_a_name_that_is_no_signal_is_named():
    with pytest.raises(ValueError, match=r"ckpt\.on_signal: .* got SIGUSR, TERM"):
        StopRequest(["SIGUSR", "SIGTERM", "TERM"], None)


STUCK = """
with StopRequest(["SIGTERM", "SIGUSR1", "SIGINT"], None) as request:
    say("ready")
    wait_in_c()
"""


@pytest.mark.parametrize("name", SIGNALS)
def test_a_second_signal_of_any_kind_ends_a_process_whose_main_thread_waits(name):
    process = start(STUCK)
    process.send_signal(signal.SIGUSR1)
    time.sleep(ECHO_SECONDS + 0.3)
    assert process.poll() is None
    number = getattr(signal, name)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 128 + number
    assert err == f"seqengine: {name} after another signal: ending at once, without saving.\n"


def test_an_echo_of_the_first_signal_is_no_second_one():
    process = start("""
with StopRequest(["SIGTERM", "SIGUSR1"], None) as request:
    say("ready")
    while not request.reason:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
    say(request.reason)
    sys.exit(75)
""")
    process.send_signal(signal.SIGUSR1)
    assert finish(process) == (75, "SIGUSR1\n", "")


def test_the_flag_is_set_while_the_main_thread_waits():
    process = start("""
import threading
with StopRequest(["SIGTERM"], None) as request:
    def report():
        while not request.reason:
            time.sleep(0.01)
        say(request.reason)
        os._exit(7)
    threading.Thread(target=report, daemon=True).start()
    say("ready")
    wait_in_c()
""")
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (7, "SIGTERM\n", "")


def test_a_forked_child_has_the_old_handlers_and_its_signals_are_its_own():
    process = start("""
with StopRequest(["SIGTERM", "SIGUSR1"], None) as request:
    child = os.fork()
    if child == 0:
        os.write(1, b"ready\\n" if signal.set_wakeup_fd(-1) == -1 else b"a pipe\\n")
        time.sleep(30)
        os._exit(0)
    say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if not sys.stdin.readline() else "")
    time.sleep(0.2)
    say(request.reason)
""")
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
    os.kill(child, signal.SIGTERM)
    assert finish(process) == (0, "-15\nNone\n", "")
