"""The commands of Slurm: submit, ask, cancel. What Slurm itself says about a failure is passed on."""

import re
import shutil
import subprocess
from pathlib import Path

from seqengine.errors import InputError

SECONDS = 120.0
OVER = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)
"""States of a job that will not run again."""


class RefusedError(InputError):
    """Slurm is not there, or said no: nothing was submitted."""


def require(command: str) -> None:
    """Raises InputError if Slurm's commands are not on this machine."""
    if shutil.which(command) is None:
        raise RefusedError(
            f"Slurm: must be on this machine, and `{command}` is not on the PATH. Log in to a machine of the cluster, or use "
            "--scheduler torchrun or local; --dry-run prints the script without Slurm."
        )


def submit(script: Path) -> str:
    """The number of the new job. Raises RefusedError with Slurm's own words, or InputError if Slurm does not answer."""
    done = _call("sbatch", "--parsable", str(script))
    found = re.search(r"^(\d+)(;.*)?$", done.stdout.strip(), re.MULTILINE)
    if done.returncode != 0 or found is None:
        raise RefusedError(f"sbatch refused the job: {_words(done)}")
    return found[1]


def show(job: str) -> dict[str, str] | None:
    """What the controller knows of a job (JobState, Reason, NodeList, RunTime, Restarts ...); None if it has forgotten it."""
    done = _call("scontrol", "--oneliner", "show", "job", job)
    if done.returncode != 0:
        if "Invalid job id" in done.stdout + done.stderr:
            return None
        raise InputError(f"scontrol cannot tell about job {job}: {_words(done)}")
    return dict(re.findall(r"(\w+)=(\S*)", done.stdout))


def remembered(job: str) -> str | None:
    """State and exit code of an old job from the accounting, where the cluster keeps one."""
    if shutil.which("sacct") is None:
        return None
    fields = "--format=State,ExitCode,Elapsed"
    done = _call("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", fields)
    lines = done.stdout.split("\n")[0].split("|")
    if done.returncode != 0 or len(lines) != 3:
        return None
    return f"{lines[0]}, exit code {lines[1]}, elapsed {lines[2]}"


def is_over(job: dict[str, str] | None) -> bool:
    """The job neither runs nor waits, and will not."""
    return job is None or job.get("JobState", "") in OVER


def cancel(job: str) -> None:
    """Raises InputError with Slurm's own words if it refuses."""
    done = _call("scancel", job)
    if done.returncode != 0:
        raise InputError(f"scancel refused: {_words(done)}")


def _call(command: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    require(command)
    try:
        return subprocess.run(
            [command, *arguments],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{command}: no answer within {SECONDS:.0f} s; the cluster's controller is busy or away. See squeue whether "
            "anything was submitted, and try again."
        ) from None
    except OSError as error:
        raise InputError(f"{command}: cannot be started: {error}.") from None


def _words(done: "subprocess.CompletedProcess[str]") -> str:
    text = " ".join(line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip())
    return text or f"exit code {done.returncode}"
