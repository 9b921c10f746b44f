"""The recipes in configs/lra/: each loads by its path, has the published sizes, and says how to run it."""

from pathlib import Path

import pytest
import torch

from seqengine.config.layers import PRESETS, preset_names
from seqengine.config.load import load
from seqengine.model import LanguageModel

LRA = PRESETS / "lra"
# Length, width, layers, sequences a step, thousands of steps, rate; and of the taps: threshold, dropout, rate.
SIZES = {
    "listops": (2048, 128, 8, 50, 80, 0.01, 0.002, 0.2, 5e-4),
    "imdb": (4096, 256, 6, 16, 50, 0.01, 0.003, 0.2, 1e-3),
    "aan": (8192, 256, 6, 64, 50, 0.01, 0.004, 0.1, 1e-4),
    "cifar": (1024, 512, 6, 50, 200, 0.01, 0.003, 0.2, 1e-3),
    "pathfinder": (1024, 256, 6, 64, 500, 0.004, 0.001, 0.3, 1e-3),
    "path-x": (16384, 256, 6, 16, 500, 5e-4, 0.001, 0.3, 5e-4),
}
WARMUP = {"listops": 10_000, "imdb": 5000, "aan": 2500, "cifar": 1000, "pathfinder": 2500, "path-x": 10_000}
FOLDERS = ("imdb", "aan", "cifar")


def recipe(name, *overrides):
    given = [f"data.folder={LRA}"] if name in FOLDERS else []
    return load(str(LRA / f"{name}.toml"), [*given, *overrides]).config


def test_the_recipes_are_these_and_no_presets():
    assert sorted(path.stem for path in LRA.glob("*.toml")) == sorted([*SIZES, "listops-tiny", "lra"])
    assert not set(SIZES) & set(preset_names())


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_recipe_has_the_published_sizes_and_rates(name, size):
    config = recipe(name)
    taps = config.model.mixers.long_conv
    assert size == (
        config.data.seq_len, config.model.d_model, config.model.n_layer, config.windows_per_step, config.total_steps // 1000,
        config.optim.lr, taps.squash, taps.kernel_dropout, taps.filter_lr,
    )  # fmt: skip
    assert config.model.max_len == config.data.seq_len
    assert config.schedule.warmup_tokens(config.total_tokens) == pytest.approx(WARMUP[name] * config.train.batch_tokens)
    assert config.model.causal == (name not in ("pathfinder", "path-x"))
    assert config.model.norm_place == ("post" if name in ("listops", "cifar") else "pre")
    assert config.model.resid_dropout == (0.1 if name == "cifar" else 0.0)
    assert config.optim.weight_decay == (0.03 if name == "pathfinder" else 0.05)
    assert set(config.model.mixer_names) == {"long_conv"}
    assert (config.model.pooling, config.model.mlp) == ("mean", "none")


@pytest.mark.parametrize("name", [*SIZES, "listops-tiny"])
def test_header_says_command_hardware_figures_and_source_and_the_run_may_learn_inputs_first(name):
    header = (LRA / f"{name}.toml").read_text(encoding="utf-8").partition("\n\n")[0]
    command = f"seqengine train configs/lra/{name}.toml" + (" data.folder=/path/to/" if name in FOLDERS else "\n")
    for part in (command, "# Hardware:", "# Expected:", "# Source:", "arXiv:2302.06646"):
        assert part in header
    assert all(len(line) <= 128 for line in Path(LRA / f"{name}.toml").read_text().splitlines())
    config = recipe(name)
    assert config.run.name == f"lra-{name}"
    assert config.model.num_classes > 0
    assert recipe(name, "model.num_classes=0").model.num_classes == 0


def test_the_tiny_recipe_is_for_a_laptop():
    config = recipe("listops-tiny")
    with torch.device("meta"):
        model = LanguageModel(config.model)
    assert sum(p.numel() for p in model.parameters()) < 100_000
    assert config.total_tokens < 20_000_000
    for replicas in (1, 2, 4):
        recipe("listops-tiny", f"parallel.replicate={replicas}")
