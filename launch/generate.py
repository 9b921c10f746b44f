"""`seqengine generate`: the continuations of prompts, as they are drawn."""

import argparse
import sys

import torch

from seqengine.checkpoint.restore import restore_model
from seqengine.data.tokenizer import A, T, decode, encode_exactly
from seqengine.errors import InputError
from seqengine.evaluate import arithmetic
from seqengine.generate import Sampling, stream
from seqengine.launch.environment import Processes
from seqengine.launch.process import choose_device
from seqengine.parallel.mesh import Mesh
from seqengine.rundir import CheckpointTarget

BASES = torch.arange(A, T + 1)
"""What is drawn from: A, C, G, T."""


def write_continuations(arguments: argparse.Namespace, processes: Processes) -> None:
    """A line for each prompt: it and what follows; a single prompt's is printed as it grows. Raises InputError."""
    target = CheckpointTarget.find(arguments.target)
    config = target.run.read_config(tuple(arguments.overrides)).config
    prompts = [torch.from_numpy(encode_exactly(prompt)).long() for prompt in arguments.prompt]
    device = choose_device(config, processes)
    try:
        how = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
        model, _ = restore_model(target, config, Mesh.single(device))
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
