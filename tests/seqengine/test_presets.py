"""The recipes in configs/: each loads, has the published sizes, and says how to run it."""

import pytest
import torch

from seqengine.config.layers import PRESETS, preset_names
from seqengine.config.load import load
from seqengine.meaning import meant_otherwise
from seqengine.model import LanguageModel

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


# Millions of parameters, from the names that the models were published under; GLA has its head apart.
LANGUAGE_MODELS = {
    "hyena-125m": 124.5, "hyena-355m": 357.1, "hyena-1.3b": 1317.8,
    "h3-125m": 126.1, "h3-355m": 361.1, "h3-1.3b": 1326.1, "h3-2.7b": 2671.1,
    "gla-340m": 374.5, "gla-1.3b": 1365.5, "striped-hyena2-1b": 1108.2, "striped-hyena2-7b": 6582.3,
}  # fmt: skip
TINY = ["gla-tiny", "h3-tiny", "hyena-tiny", "striped-hyena2-tiny"]
HYENADNA = [*SIZES, "hyenadna"]
RECIPES = [*HYENADNA, *LANGUAGE_MODELS, "lm"]


def test_the_presets_are_the_published_sizes_their_bases_and_the_tiny_ones() -> None:
    assert preset_names() == sorted([*RECIPES, *TINY, "demo", "genomic-benchmarks"])


@pytest.mark.parametrize(("name", "millions"), LANGUAGE_MODELS.items())
def test_language_model_has_the_published_number_of_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = LanguageModel(load(name, need_data=False).config.model)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("name", TINY)
def test_tiny_recipe_needs_no_data_and_says_what_to_expect(name: str) -> None:
    header = (PRESETS / f"{name}.toml").read_text(encoding="utf-8").partition("\n\n")[0]
    for part in (f"seqengine train {name}\n", "# Hardware:  two CPU cores", "# Expected:  validation loss", "arXiv:"):
        assert part in header
    config = load(name).config
    with torch.device("meta"):
        model = LanguageModel(config.model)
    assert sum(p.numel() for p in model.parameters()) < 300_000
    assert config.total_tokens < 2_000_000


def test_striped_hyena_has_the_published_order_of_layers() -> None:
    names = load("striped-hyena2-7b", need_data=False).config.model.mixer_names
    assert [i for i, name in enumerate(names) if name == "attention"] == [3, 10, 17, 24, 31]
    assert [i for i, name in enumerate(names) if name == "hyena_li"][:4] == [2, 6, 9, 13]
    h3 = load("h3-355m", need_data=False).config.model.mixer_names
    assert [i for i, name in enumerate(h3) if name == "attention"] == [1, 13]


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
    sources = ("arXiv:2306.15794", "hg38_hyena") if name in HYENADNA else ("# Source:",)
    for part in (f"seqengine train {name} data.fasta=", "# Hardware:", "# Expected:", *sources):
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


def test_genomic_benchmarks_is_the_published_recipe_for_the_weights_of_tiny_1k() -> None:
    config = load("genomic-benchmarks", need_data=False).config
    assert (config.windows_per_step, config.data.seq_len, config.data.rc_prob) == (128, 256, 0.0)
    assert (config.optim.lr, config.optim.betas, config.optim.weight_decay) == (6e-4, (0.9, 0.999), 0.1)
    assert (config.schedule.warmup, config.schedule.min_ratio, config.model.embed_dropout) == (0.01, 0.1, 0.1)
    weights = load("hyenadna-tiny-1k", need_data=False).config.model
    assert meant_otherwise(weights, config.model) == []
    with torch.device("meta"):
        mine, theirs = (LanguageModel(m).state_dict() for m in (config.model, weights))
    assert {n: t.shape for n, t in mine.items() if not n.startswith("head.")} == {n: t.shape for n, t in theirs.items()}
    header = (PRESETS / "genomic-benchmarks.toml").read_text(encoding="utf-8").partition("\n\n")[0]
    for part in (
        "seqengine train genomic-benchmarks data.folder=",
        "# Hardware:",
        "# Expected:",
        "# Source:",
        "# Here:",
    ):
        assert part in header


def test_base_is_the_published_recipe() -> None:
    config = load("hyenadna", need_data=False).config
    assert config.windows_per_step == 256
    assert (config.optim.lr, config.optim.betas, config.optim.weight_decay) == (6e-4, (0.9, 0.999), 0.1)
    assert (config.schedule.kind, config.schedule.warmup, config.schedule.min_ratio) == ("cosine", 0.01, 0.1)
    assert (config.model.embed_dropout, config.train.clip, config.data.rc_prob) == (0.1, 1.0, 0.5)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_every_size_can_be_tried_on_synthetic_data(name: str) -> None:
    assert load(name, ["data.source=synthetic", "data.synthetic.length=30M"]).config.data.source == "synthetic"
