"""Twins under torch.compile: what a rank sends is never traced."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo

from seqengine.parallel.context import SequenceContext

P = ParamSpec("P")
R = TypeVar("R")


def breaks_graph(twin: Callable[P, R]) -> Callable[P, R]:
    """A twin that torch.compile runs as it is, between two graphs, where there are several ranks.

    On one rank it is the kernel, a custom operator, and part of the graph.
    """
    # torch.compiler.disable, but the compiler, which takes as long to import as torch, is imported when something is compiled.
    as_it_is: Callable[P, R] = _disable_dynamo(twin)

    @wraps(twin)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        ctx = kwargs.get("ctx")
        if isinstance(ctx, SequenceContext) and ctx.group is not None and torch.compiler.is_compiling():
            return as_it_is(*args, **kwargs)
        return twin(*args, **kwargs)

    return run
