"""One thread a process: forked ranks must not inherit a thread pool, and two test processes share two cores.

The same holds for the commands that tests start: threads that wait for a core make a step many times slower.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def poisoned_memory():
    """Fresh tensors are filled with NaN (or the largest integer), so that an element that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def set_num_threads() -> Iterator[Callable[[int], None]]:
    """torch's, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def deepspeed_imported():
    """Here, before ranks are forked, with what it imports when it starts: seconds that each of them would take."""
    if importlib.util.find_spec("deepspeed") is not None:
        with warnings.catch_warnings(action="ignore"):
            importlib.import_module("deepspeed")
            importlib.import_module("torch._inductor.compile_fx")


@pytest.fixture
def real_data() -> Path:
    """Folder of real genomes and text; tests that want it are skipped where there is none."""
    folder = os.environ.get("SEQENGINE_TEST_DATA")
    if not folder:
        pytest.skip("SEQENGINE_TEST_DATA is not set: no real genomes here")
    return Path(folder)
