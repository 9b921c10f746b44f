"""The recipes in configs/: each loads, has the published sizes, and says how to run it."""

import pytest

from seqengine.config.layers import PRESETS, preset_names
from seqengine.config.load import load

# Width, layers, longest sequence (the published l_max less 2), as published with arXiv:2306.15794.
SIZES = {
    "hyenadna-tiny-1k": (128, 2, 1024),
    "hyenadna-tiny-1k-d256": (256, 2, 1024),
    "hyenadna-tiny-16k-d128": (128, 2, 16384),
    "hyenadna-small-32k": (256, 4, 32768),
    "hyenadna-medium-160k": (256, 8, 160_000),
    "hyenadna-medium-450k": (256, 8, 450_000),
    "hyenadna-large-1m": (256, 8, 1_000_000),
}


RECIPES = [name for name in preset_names() if name != "demo"]


def test_the_presets_are_the_published_sizes_and_their_base() -> None:
    assert preset_names() == sorted([*SIZES, "hyenadna", "demo"])


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_preset_has_the_published_size(name: str, size: tuple[int, int, int]) -> None:
    config = load(name, need_data=False).config
    assert (config.model.d_model, config.model.n_layer, config.model.max_len) == size
    assert config.data.seq_len == config.model.max_len
    assert config.model.d_inner in (None, 4 * config.model.d_model)


@pytest.mark.parametrize("name", RECIPES)
def test_preset_names_its_run_and_no_data_file(name: str) -> None:
    config = load(name, need_data=False).config
    assert config.run.name == name
    assert (config.data.source, config.data.fasta, config.data.bed) == ("fasta", None, None)


@pytest.mark.parametrize("name", RECIPES)
def test_preset_header_says_command_hardware_figures_and_source(name: str) -> None:
    header = (PRESETS / f"{name}.toml").read_text(encoding="utf-8").partition("\n\n")[0]
    for part in (f"seqengine train {name} data.fasta=", "# Hardware:", "# Expected:", "arXiv:2306.15794", "hg38_hyena"):
        assert part in header


@pytest.mark.parametrize("name", preset_names())
def test_preset_runs_on_one_two_four_and_eight_replicas(name: str) -> None:
    for replicas in (1, 2, 4, 8):
        load(name, [f"parallel.replicate={replicas}"], need_data=False)


def test_demo_is_the_tiny_model_on_the_synthetic_genome_over_two_processes() -> None:
    config = load("demo").config
    assert (config.model.d_model, config.data.source, config.parallel.sequence) == (128, "synthetic", 2)


def test_laptop_recipe() -> None:
    config = load("hyenadna-tiny-1k", need_data=False).config
    assert (config.total_steps, config.windows_per_step, config.optim.lr) == (1200, 16, 3e-3)
    assert (config.model.embed_dropout, config.schedule.kind, config.precision.params) == (0.0, "cosine", "fp32")


def test_base_is_the_published_recipe() -> None:
    config = load("hyenadna", need_data=False).config
    assert config.windows_per_step == 256
    assert (config.optim.lr, config.optim.betas, config.optim.weight_decay) == (6e-4, (0.9, 0.999), 0.1)
    assert (config.schedule.kind, config.schedule.warmup, config.schedule.min_ratio) == ("cosine", 0.01, 0.1)
    assert (config.model.embed_dropout, config.train.clip, config.data.rc_prob) == (0.1, 1.0, 0.5)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_every_size_can_be_tried_on_synthetic_data(name: str) -> None:
    assert load(name, ["data.source=synthetic", "data.synthetic.length=30M"]).config.data.source == "synthetic"
