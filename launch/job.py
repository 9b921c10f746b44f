"""`seqengine launch status`, `logs` and `cancel`: a launched run from another terminal."""

import codecs
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from seqengine.errors import InputError
from seqengine.launch import slurm
from seqengine.launch.record import Launch, living
from seqengine.metrics import read_metrics
from seqengine.watchdog import read_beats, stuck_ranks

LOOK_SECONDS = 0.2
ASK_SECONDS = 10.0
"""Between two questions to Slurm whether a job still runs."""


def status(run: Path, *, stuck_seconds: float, as_json: bool) -> int:
    """What is known about the last launch of a run; returns the exit code. Raises InputError if there is none."""
    launch = Launch.find(run)
    found: dict[str, Any] = {"run": str(run), "scheduler": launch.scheduler, "nodes": launch.nodes}
    found |= {"processes": launch.processes, "launched_seconds_ago": time.time() - launch.time, **_job(launch)}
    found["progress"] = _progress(run)
    beats, alive = read_beats(run), {beat.rank for beat in living(run)}
    late = [beat for beat in stuck_ranks(run, stuck_seconds) if found["state"] in ("RUNNING", "unknown")]
    found["ranks"] = {"known": len(beats), "alive": len(alive)}
    found["stuck"] = [vars(beat) | {"quiet_seconds": time.time() - beat.time} for beat in late]
    found["logs"] = str(run / "logs" / f"{launch.logs}-RANK.log")
    print(json.dumps(found) if as_json else _words(found))
    return 0


def _job(launch: Launch) -> dict[str, Any]:
    """state: a word of Slurm's; RUNNING or ended for a local launch; unknown for processes that nobody here started."""
    if launch.scheduler == "local":
        return {"pid": launch.pid, "host": launch.host, "state": "RUNNING" if launch.is_running_here else "ended"}
    if launch.scheduler == "torchrun":
        return {"state": "unknown"}
    if launch.job is None:
        return {"job": None, "state": "unknown"}
    job = slurm.show(launch.job)
    if job is None:
        return {"job": launch.job, "state": slurm.remembered(launch.job) or "over; Slurm has forgotten it"}
    names = {"state": "JobState", "reason": "Reason", "node_list": "NodeList", "elapsed": "RunTime", "limit": "TimeLimit",
             "restarts": "Restarts", "exit_code": "ExitCode"}  # fmt: skip
    return {"job": launch.job, **{ours: job.get(theirs, "?") for ours, theirs in names.items()}}


def _progress(run: Path) -> dict[str, Any]:
    lines = read_metrics(run)
    trained = [line for line in lines if "split" not in line]
    valid = [line for line in lines if line.get("split") == "valid"]
    keys = ("step", "tokens", "loss", "bits_per_token", "tokens_per_second")
    last = {key: trained[-1][key] for key in keys if key in trained[-1]} if trained else {}
    return last | ({"valid_step": valid[-1]["step"], "valid_loss": valid[-1]["loss"]} if valid else {})


def _words(found: dict[str, Any]) -> str:
    lines = [f"run         {found['run']}"]
    what = (
        f"job {found['job']}"
        if "job" in found
        else f"process {found['pid']} on {found['host']}"
        if "pid" in found
        else "by hand"
    )
    lines.append(f"{found['scheduler']:<11} {what}: {found['state']}")
    if found.get("reason", "None") != "None":
        lines.append(f"reason      {found['reason']}")
    where = f" ({found['node_list']})" if found.get("node_list", "(null)") not in ("(null)", "") else ""
    lines.append(f"size        {found['nodes']} nodes{where}, {found['processes']} processes")
    if "elapsed" in found:
        lines.append(
            f"time        {found['elapsed']} of {found['limit']}, {found['restarts']} restarts, exit code {found['exit_code']}"
        )
    progress = found["progress"]
    if "loss" in progress:
        lines.append(
            f"step        {progress['step']}, loss {progress['loss']:.5f} nats, {progress['tokens_per_second']:,.0f} tokens/s"
        )
    else:
        lines.append("step        none logged yet")
    if "valid_loss" in progress:
        lines.append(f"validation  loss {progress['valid_loss']:.5f} nats at step {progress['valid_step']}")
    lines.append(f"ranks       {found['ranks']['alive']} alive of {found['ranks']['known']} that have begun")
    for beat in found["stuck"]:
        where = f"rank {beat['rank']} (process {beat['pid']} on {beat['host']})"
        lines.append(
            f"stuck       {where}: no progress for {beat['quiet_seconds']:.0f} s, step {beat['step']}, phase {beat['phase']}"
        )
    return "\n".join([*lines, f"logs        {found['logs']}"])


def logs(run: Path, *, rank: int | None, follow: bool) -> int:
    """Print the log of a rank (0 if none is given), or of the batch script while no rank has begun."""
    launch = Launch.find(run)
    folder = run / "logs"
    file = folder / f"{launch.logs}-{rank or 0}.log"
    if rank is None and not file.exists() and (folder / f"{launch.logs}.log").exists():
        file = folder / f"{launch.logs}.log"
    if not file.exists() and not follow:
        there = ", ".join(sorted(path.name for path in folder.glob(f"{launch.logs}*.log"))) or "none yet"
        raise InputError(
            f"{file}: there is no such log; {folder} has {there}. Name a rank with --rank, or follow with -f."
        )
    follower = Follower(file)
    if not follow:
        follower.stop()
        follower.run()
        return 0
    is_over = threading.Thread(target=_stop_when_over, args=(launch, run, follower), daemon=True)
    is_over.start()
    try:
        follower.run()
    except KeyboardInterrupt:
        return 130
    return 0


def _stop_when_over(launch: Launch, run: Path, follower: "Follower") -> None:
    while _is_active(launch, run):
        time.sleep(ASK_SECONDS if launch.scheduler == "slurm" else LOOK_SECONDS)
    follower.stop()


def _is_active(launch: Launch, run: Path) -> bool:
    if launch.scheduler == "slurm":
        return launch.job is None or not slurm.is_over(slurm.show(launch.job))
    return launch.is_running_here or (launch.scheduler == "torchrun" and bool(living(run)))


class Follower:
    """Prints what a file has and gets, until it is stopped; the file may come later."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End `run` once it has printed what is there now."""
        self._stopped.set()

    def run(self) -> None:
        """Returns when stopped."""
        place, decoder = 0, codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            is_last = self._stopped.is_set()
            if self._file.exists():
                with self._file.open("rb") as file:
                    file.seek(place)
                    while block := file.read(1 << 16):
                        place += len(block)
                        sys.stdout.write(decoder.decode(block))
                sys.stdout.flush()
            if is_last:
                return
            self._stopped.wait(LOOK_SECONDS)


def cancel(run: Path) -> int:
    """End the last launch of a run; returns the exit code. Its processes are asked to save first."""
    launch = Launch.find(run)
    if not _is_active(launch, run):
        print(f"{run}: nothing runs; there is nothing to cancel")
        return 0
    if launch.scheduler == "slurm":
        if launch.job is None:
            raise InputError(f"{run}: the number of its job is not known; look for it with squeue.")
        slurm.cancel(launch.job)
        print(f"cancelled   Slurm job {launch.job}")
    elif launch.scheduler == "local" and launch.pid is not None:
        os.kill(launch.pid, signal.SIGTERM)
        print(f"cancelled   process {launch.pid}, which saves first")
    else:
        (run / "stop").touch()
        print("cancelled   the run saves after this step, and ends")
    return 0
