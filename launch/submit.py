"""`seqengine launch`: check everything, write what the run needs, submit or start it. A failure leaves nothing behind."""

import json
import os
import platform
import shlex
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from seqengine.check import check_run
from seqengine.config.load import Loaded, load
from seqengine.config.run import RunConfig
from seqengine.config.write import dump
from seqengine.errors import InputError
from seqengine.launch import slurm
from seqengine.launch.job import Follower
from seqengine.launch.record import FOLDER, Launch, check_free, only_one, started_at
from seqengine.launch.request import SCHEDULERS, Request, processes_per_node
from seqengine.launch.scripts import NONE, Place, node_script, slurm_script, words_of_run
from seqengine.launch.torchrun import run_local
from seqengine.rundir import RunDirectory, versions


def launch(config: str, overrides: Sequence[str], request: Request, *, dry_run: bool) -> int:
    """Submit, start or (dry_run) print; returns the exit code. Raises InputError."""
    if request.scheduler not in SCHEDULERS:
        raise ValueError(f"scheduler: must be one of {', '.join(SCHEDULERS)}; got {request.scheduler!r}.")
    loaded = load(config, overrides)
    each = processes_per_node(request, loaded.config)
    loaded = _on_device(loaded, request)
    run = RunDirectory(loaded.config.run_dir)
    run.check_resumable(loaded, request.allow_change)
    check_run(loaded.config, reads_data=not dry_run)
    path = loaded.config.run_dir.absolute()
    check_free(path)
    if dry_run:
        print(_text(request, each, _place(loaded.config, path)), end="")
        return 0
    if request.scheduler == "slurm":
        slurm.require("sbatch")
    with _folders(path) as folders, only_one(path):
        check_free(path)  # nobody else can have begun since
        place = _place(loaded.config, path)
        folders.make(place.folder)
        _write(loaded, request, each, place)
        return _start(loaded.config, request, each, place, folders)


def _on_device(loaded: Loaded, request: Request) -> Loaded:
    """With GPUs asked for, a node that shows none must be an error, not a slow run."""
    gpus = request.gpus_per_node
    if gpus is None:
        return loaded
    if request.scheduler == "local" and torch.cuda.device_count() < gpus:
        raise InputError(
            f"--gpus-per-node: must be at most the {torch.cuda.device_count()} GPUs of this machine; got {gpus}. For "
            "processes on the CPU: --gpus-per-node 0 --tasks-per-node K."
        )
    run = loaded.config.run.model_copy(update={"device": "cuda" if gpus else "cpu"})
    origin = {"run.device": f"--gpus-per-node {gpus}"} if run != loaded.config.run else {}
    return Loaded(loaded.config.model_copy(update={"run": run}), {**loaded.provenance, **origin})


def _place(config: RunConfig, run: Path) -> Place:
    """The next number that is free: an earlier launch is never overwritten."""
    numbers = [int(p.name) for p in (run / FOLDER).glob("*") if p.name.isdigit()]
    return Place(run, run / FOLDER / str(max(numbers, default=0) + 1), Path.cwd(), config.run.name)


class _Folders:
    """Folders that a launch makes, to be removed if it comes to nothing."""

    def __init__(self, run: Path) -> None:
        self.is_kept = False
        self._made: list[Path] = []
        for folder in (run / FOLDER, run / "logs"):
            self.make(folder)

    def make(self, folder: Path) -> None:
        if not folder.exists():
            new = folder
            while not new.parent.exists():
                new = new.parent
            self._made.append(new)
            folder.mkdir(parents=True)

    def remove(self) -> None:
        for folder in self._made:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _folders(run: Path) -> Iterator[_Folders]:
    """RUN/launch and RUN/logs; removed, as far as they are new, if the block fails before it says that they are kept."""
    try:
        folders = _Folders(run)
    except OSError as error:
        raise InputError(f"{run}: cannot be made: {error.strerror or error}.") from None
    try:
        yield folders
    except OSError as error:
        raise InputError(f"{run}: cannot be written: {error.strerror or error}.") from None
    finally:
        if not folders.is_kept:
            folders.remove()


def _python(request: Request) -> str:
    return request.python or ("python3" if request.container else sys.executable)


def _text(request: Request, each: int, place: Place) -> str:
    if request.scheduler == "slurm":
        return slurm_script(request, each, place, _python(request))
    if request.scheduler == "torchrun":
        address = request.master_addr or ("127.0.0.1" if request.nodes == 1 else socket.gethostname())
        return node_script(request, each, place, _python(request), address)
    command = shlex.join([_python(request), *_task_words(request, place)])
    return f"cd {shlex.quote(str(place.start))}\n{command}  # {each} times\n"


def _task_words(request: Request, place: Place) -> list[str]:
    """Of each process of a local launch, for Python."""
    return ["-m", "seqengine.launch.task", str(place.logs / place.log_name), NONE, *words_of_run(request, place)]


def _write(loaded: Loaded, request: Request, each: int, place: Place) -> None:
    """RUN/launch/N: the config that the run trains, the script, and what it was made with."""
    place.config.write_text(dump(loaded))
    if request.scheduler != "local":
        (place.script if request.scheduler == "slurm" else place.node_script).write_text(_text(request, each, place))
    record = {
        "command": sys.argv,
        "directory": str(place.start),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": _python(request),
        "versions": versions(),
        "nodes": request.nodes,
        "processes": request.nodes * each,
    }
    (place.folder / "environment.json").write_text(json.dumps(record, indent=2) + "\n")


def _start(config: RunConfig, request: Request, each: int, place: Place, folders: _Folders) -> int:
    record: dict[str, Any] = {
        "scheduler": request.scheduler, "number": int(place.folder.name), "nodes": request.nodes,
        "processes": request.nodes * each, "time": time.time(), "host": socket.gethostname(),
    }  # fmt: skip
    if request.scheduler == "slurm":
        return _submit(record, place, folders)
    launched = Launch(**record, logs=place.log_name)
    folders.is_kept = True
    if request.scheduler == "torchrun":
        launched.write(place.run)
        print(f"run         {config.run_dir}\nscript      {place.node_script}\n\nOn every node:")
        for node in range(request.nodes):
            print(f"    bash {shlex.quote(str(place.node_script))} {node}")
        return 0
    return _run_here(config, request, each, place, launched)


def _submit(record: dict[str, Any], place: Place, folders: _Folders) -> int:
    """The record is written before the job is, so that a launch that is cut short in between is seen by the next."""
    before = Launch.read(place.run)
    launched = Launch(**record, logs="")
    launched.write(place.run)
    folders.is_kept = True  # unless Slurm says no, it may have taken the job
    try:
        job = slurm.submit(place.script)
    except slurm.RefusedError:
        folders.is_kept = False
        Launch.restore(before, place.run)
        raise
    replace(launched, logs=job, job=job).write(place.run)
    print(f"run         {place.run}\nscript      {place.script}\njob         {job}, submitted")
    print(f"watch       seqengine launch status {shlex.quote(str(place.run))}")
    return 0


def _run_here(config: RunConfig, request: Request, each: int, place: Place, launched: Launch) -> int:
    """In the foreground; what rank 0 says is shown."""
    pid = os.getpid()
    replace(launched, pid=pid, started=started_at(pid)).write(place.run)
    logs = place.logs / place.log_name
    print(f"run         {config.run_dir}\nlogs        {logs}-RANK.log", flush=True)
    follower = Follower(Path(f"{logs}-0.log"))
    thread = threading.Thread(target=follower.run, name="follow rank 0", daemon=True)
    thread.start()
    words, restarts = _task_words(request, place), request.max_restarts or 0
    try:
        return run_local(words, each, command=(_python(request),), max_restarts=restarts, signals=config.ckpt.on_signal)
    finally:
        follower.stop()
        thread.join()
