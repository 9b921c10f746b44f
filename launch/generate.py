"""`seqengine generate`: the continuations of prompts, as they are drawn."""

import argparse
import sys

import torch

from seqengine.checkpoint.restore import restore_model
from seqengine.data.tokenizer import A, T, decode, encode_exactly
from seqengine.distill import distill
from seqengine.errors import InputError
from seqengine.evaluate import arithmetic
from seqengine.generate import Sampling, stream
from seqengine.launch.environment import Processes
from seqengine.launch.process import choose_device
from seqengine.model import LanguageModel
from seqengine.parallel.mesh import Mesh
from seqengine.rundir import CheckpointTarget

BASES = torch.arange(A, T + 1)
"""What is drawn from: A, C, G, T."""


def write_continuations(arguments: argparse.Namespace, processes: Processes) -> None:
    """A line for each prompt: it and what follows; a single prompt's is printed as it grows. Raises InputError."""
    target = CheckpointTarget.find(arguments.target)
    config = target.run.read_config(tuple(arguments.overrides), need_data=False).config
    prompts = [torch.from_numpy(encode_exactly(prompt)).long() for prompt in arguments.prompt]
    device = choose_device(config, processes)
    try:
        how = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
        model, _ = restore_model(target, config, Mesh.single(device))
        if arguments.distill is not None:
            model = _distilled(model, arguments.distill)
        with arithmetic(config, device):
            columns = stream(model, prompts, max_new_tokens=arguments.tokens, sampling=how, allowed=BASES)
            if len(prompts) == 1:
                sys.stdout.write(arguments.prompt[0])
                for tokens in columns:
                    sys.stdout.write(decode(tokens))
                    sys.stdout.flush()
                sys.stdout.write("\n")
            else:
                rows = torch.stack([torch.zeros(len(prompts), dtype=torch.int64), *columns], dim=1)[:, 1:]
                for prompt, row in zip(arguments.prompt, rows, strict=True):
                    print(prompt + decode(row))
    except ValueError as error:
        raise InputError(str(error)) from None


def _distilled(model: LanguageModel, how: str) -> LanguageModel:
    """how: a number of modes, or auto:TOLERANCE. The errors go to standard error. Raises ValueError."""
    kind, _, tolerance = how.partition(":")
    try:
        if kind == "auto":
            order, limit = None, float(tolerance)
        else:
            order, limit = int(how), None
    except ValueError:
        raise InputError(
            f"--distill: must be a number of modes such as 16, or auto:TOLERANCE such as auto:1e-3; got {how!r}."
        ) from None
    distilled, report = distill(model, order=order, tolerance=limit)
    print(report.describe(), file=sys.stderr)
    return distilled
