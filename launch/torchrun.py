"""Start the processes of a run on this machine through torchrun's own agent, and give back their exit code."""

import logging
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

MEANINGFUL = (2, 75)
"""Exit codes that keep their meaning when every process that failed ended with them."""


def run_local(arguments: Sequence[str], num_processes: int) -> int:
    """`python -m seqengine ARGUMENTS` in `num_processes` processes; returns 0, 1, or the code that all failures share.

    The rendezvous takes a free port of this machine, so runs do not meet.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"seqengine-{num_processes}",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "seqengine", *arguments)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        ended = ", ".join(f"rank {rank}: {f.exitcode}" for rank, f in sorted(error.failures.items()))
        print(f"seqengine: processes failed (exit codes {ended}); the first error is above.", file=sys.stderr)
        return codes.pop() if len(codes) == 1 and codes <= set(MEANINGFUL) else 1
    return 0
