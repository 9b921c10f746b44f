"""Twins under torch.compile: what a rank sends is never traced."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from seqengine.parallel.context import SequenceContext

P = ParamSpec("P")
R = TypeVar("R")


def breaks_graph(twin: Callable[P, R]) -> Callable[P, R]:
    """A twin that torch.compile runs as it is, between two graphs, where there are several ranks.

    On one rank it is the kernel, a custom operator, and part of the graph.
    """
    as_it_is: Callable[P, R] = torch.compiler.disable(twin)

    @wraps(twin)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        ctx = kwargs.get("ctx")
        if isinstance(ctx, SequenceContext) and ctx.group is not None:
            return as_it_is(*args, **kwargs)
        return twin(*args, **kwargs)

    return run
