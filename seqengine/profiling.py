"""A window of steps under torch's profiler: RUN/profile/rank-R-step-N.json.gz, to open in ui.perfetto.dev or chrome://tracing.

On CUDA also what the allocator did in them, RUN/profile/rank-R-step-N.pickle, to open at docs.pytorch.org/memory_viz.
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from seqengine.config.sections import LogSection
from seqengine.errors import InputError

PROFILES = "profile"
MOST_EVENTS = 100_000
"""Allocations and frees that a memory snapshot remembers, the newest ones."""


class Profiler:
    """Traces the steps log.profile_step to log.profile_step + log.profile_steps - 1 of a rank; by default none.

    Call `step(n)` as step n begins, 1 for the first of a run, and `close` at the end, also after an exception: what was traced
    until then is written. A run that begins inside the window traces the rest of it. Other steps cost a comparison.
    Raises InputError for log.memory_snapshot without CUDA; RuntimeError as the window begins if another profiler runs.
    """

    def __init__(self, log: LogSection, run_dir: Path, rank: int, device: torch.device | None = None) -> None:
        self._first, self._num_steps = log.profile_step, log.profile_steps
        self._folder, self._rank = run_dir / PROFILES, rank
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if log.memory_snapshot and self._device.type != "cuda":
            raise InputError(f"log.memory_snapshot: needs CUDA; got {self._device.type}. Leave it false.")
        self._with_snapshot = log.memory_snapshot
        self._profile: profile | None = None
        self._name = ""

    def step(self, step: int) -> None:
        """This rank begins this step."""
        is_inside = 0 < self._first <= step < self._first + self._num_steps
        if is_inside and self._profile is None:
            self._start(step)
        elif not is_inside and self._profile is not None:
            self.close()

    def _start(self, step: int) -> None:
        if torch._C._autograd._profiler_enabled():  # torch would crash as it writes the second trace
            raise RuntimeError(
                "log.profile_step: another profiler runs in this process; end it, or set log.profile_step = 0."
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        self._name = f"rank-{self._rank}-step-{step}"
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            if self._with_snapshot:
                torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()

    def close(self) -> None:
        """Write what was traced, aside and renamed. May be called twice, and before any step."""
        if self._profile is None:
            return
        traced, self._profile = self._profile, None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        traced.stop()
        target = self._folder / f"{self._name}.json.gz"
        aside = target.with_name(f"{self._name}.tmp.json.gz")  # the end tells torch to compress
        traced.export_chrome_trace(str(aside))
        aside.replace(target)
        if self._with_snapshot:
            snapshot = self._folder / f"{self._name}.pickle"
            torch.cuda.memory._dump_snapshot(str(snapshot.with_suffix(".tmp")))
            snapshot.with_suffix(".tmp").replace(snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)
