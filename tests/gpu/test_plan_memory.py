"""The memory of a plan against what a step on a GPU allocates."""

import pytest
import torch

from seqengine.backends.backend import Backend
from seqengine.launch.planning.memory import Activations, count_sizes, rank_memory
from seqengine.launch.planning.traffic import Layout
from seqengine.model import LanguageModel, build_model
from seqengine.parallel.mesh import Mesh
from tests.launch.test_plan_bytes import run_config


@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_a_step_allocates_what_the_plan_says(device, checkpoint):
    rows, tokens = 2, 1 << 16
    config = run_config(("hyena", "hyena"), params="bf16", checkpoint=checkpoint, d_model=256, max_len=tokens)
    layout = Layout(1, 1, 1, "none", None, checkpoint, 1)
    needs = Activations(config, "cuda").timeline(rows, tokens, layout)
    with torch.device("meta"):
        sizes = count_sizes(config, LanguageModel(config.model))
    planned = rank_memory(config, sizes, layout, needs, 1).total
    model = build_model(config.model, seed=0, params="bf16", device=device)
    model.save_memory(checkpoint)
    backend = Backend(model, config, Mesh.single(device))
    ids = torch.randint(7, 11, (rows, tokens), device=device)
    for step in range(2):
        if step:
            torch.cuda.reset_peak_memory_stats()
        backend.begin()
        backend.accumulate(ids, ids.clone(), float(ids.numel()), last=True, dropout_keys=ids[:, 0].clone())
        backend.finish()
        backend.update()
    assert planned == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)
