"""The memory of generation: what a state and one chunk take, however long the prompt."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
D, CHUNK, SHORT, LONG = 32, 1024, 5_000, 60_000
BOUND_BYTES = 2 << 20
"""A hidden state for every token of the longer prompt would be 7 MB."""
MIXERS = ("gla", "h3", "hyena_li", "linear_attention", "retention", "s4d", "ssd")
MEASURE = """
import json, os, resource, sys
import torch
import torch._dynamo  # once: every child would, at its first operator
from seqengine.config.model import ModelConfig
from seqengine.generate import generate
from seqengine.model import build_model

folder, D, chunk, short, long, *names = sys.argv[1:]
torch.set_num_threads(1)
heads = {"num_heads": 2}
settings = {name: heads for name in ("gla", "linear_attention", "retention")}
settings |= {"ssd": {"head_dim": 16}, "s4d": {"d_state": 8}, "h3": {"d_state": 8}}


def peak_bytes(model, tokens, chunk_tokens):
    path = f"{folder}/{tokens}.ids"
    prompt = torch.from_file(path, shared=False, size=tokens, dtype=torch.int64)
    generate(model, [prompt], max_new_tokens=3, chunk_tokens=chunk_tokens)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - prompt.nbytes


for tokens in (int(short), int(long)):
    ids = torch.randint(7, 11, (tokens,), generator=torch.Generator().manual_seed(0))
    ids.numpy().tofile(f"{folder}/{tokens}.ids")
del ids
for name in names:
    mixer, _, whole = name.partition(" ")
    sys.stdout.flush()
    child = os.fork()  # a peak of its own
    if child == 0:
        config = ModelConfig(
            arch="lm", d_model=int(D), n_layer=2, max_len=64, pattern=(mixer,), mixers=settings, embed_dropout=0.0
        )
        model = build_model(config, seed=0, params="fp32", device=torch.device("cpu"))
        first = [peak_bytes(model, int(short), int(chunk)) for _ in range(3)][-1]
        last = peak_bytes(model, int(long), int(long) // 4 if whole else int(chunk))
        print(json.dumps([name, last - first]))
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@pytest.fixture(scope="module")
def growth(tmp_path_factory):
    """By how much the peak memory is larger for the longer prompt, without the prompts themselves; by name."""
    folder = tmp_path_factory.mktemp("prompts")
    numbers = [str(n) for n in (D, CHUNK, SHORT, LONG)]
    command = [sys.executable, "-c", MEASURE, str(folder), *numbers, *MIXERS, "gla whole"]
    # Freed tensors go back to the system at once (glibc), so that a peak is what was alive.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("mixer", MIXERS)
def test_peak_memory_does_not_depend_on_the_length_of_the_prompt(mixer, growth):
    assert growth[mixer] < BOUND_BYTES


def test_the_measurement_sees_larger_chunks(growth):
    assert growth["gla whole"] > 3 * BOUND_BYTES
