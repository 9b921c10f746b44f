"""`seqengine generate`: the continuations of prompts, as they are drawn."""

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from seqengine.backends.backend import arithmetic
from seqengine.checkpoint.restore import restore_model
from seqengine.codec import Codec, codec_of
from seqengine.distill import distill
from seqengine.errors import InputError
from seqengine.generate import Sampling, stream
from seqengine.launch.environment import Processes
from seqengine.launch.process import choose_device
from seqengine.model import LanguageModel
from seqengine.parallel.mesh import Mesh
from seqengine.rundir import CheckpointTarget


def write_continuations(arguments: argparse.Namespace, processes: Processes) -> None:
    """A line for each prompt: it and what follows; a single prompt's is printed as it grows. Raises InputError."""
    target = CheckpointTarget.find(arguments.target)
    config = target.run.read_config(tuple(arguments.overrides), need_data=False).config
    codec = codec_of(target.run.path, config.data)
    prompts = [codec.encode(prompt) for prompt in arguments.prompt]
    device = choose_device(config, processes)
    if arguments.tokens < 0:
        raise InputError(f"--tokens: must be at least 0; got {arguments.tokens}.")
    try:
        how = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
        model, _ = restore_model(target, config, Mesh.single(device), averaged=arguments.ema)
        if arguments.distill is not None:
            model = _distilled(model, arguments.distill)
        with arithmetic(config, device):
            columns = stream(model, prompts, max_new_tokens=arguments.tokens, sampling=how, allowed=codec.allowed)
            if len(prompts) == 1:
                _print_as_it_comes(arguments.prompt[0], columns, codec)
            else:
                rows = torch.stack([torch.zeros(len(prompts), dtype=torch.int64), *columns], dim=1)[:, 1:]
                for prompt, row in zip(arguments.prompt, rows, strict=True):
                    print(prompt + codec.decode(_until_end(row, codec)))
    except ValueError as error:
        raise InputError(str(error)) from None


def _print_as_it_comes(prompt: str, columns: Iterator[Tensor], codec: Codec) -> None:
    """Text grows letter by letter: what a token adds is the difference of two decodings, once its letters are whole."""
    sys.stdout.write(prompt)
    ids: list[Tensor] = []
    shown = ""
    for column in columns:
        if codec.end_id is not None and int(column) == codec.end_id:
            break
        ids.append(column)
        text = codec.decode(torch.cat(ids))
        if not text.endswith("\ufffd"):
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    rest = codec.decode(torch.cat(ids)) if ids else ""
    sys.stdout.write(rest[len(shown) :] + "\n")


def _until_end(ids: Tensor, codec: Codec) -> Tensor:
    """What stands before the first end of a document."""
    ends = [] if codec.end_id is None else (ids == codec.end_id).nonzero().flatten().tolist()
    return ids[: ends[0]] if ends else ids


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
