"""Weights as files, in and out: what is written comes back bit for bit, and what is no such file is named."""

import json
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from seqengine.errors import InputError
from seqengine.interop import files, formats
from seqengine.interop.hyenadna import Layout
from seqengine.interop.hyenadna import state_dict as hyenadna_state_dict
from tests.seqengine import test_interop_hyenadna as independent
from tests.seqengine.weights import MODELS, tiny
from tests.tolerances import assert_close

IDS = torch.randint(0, 12, (2, 40), generator=torch.Generator().manual_seed(0))
HEADS = {"hyenadna": "lm_head.weight", "h3": "lm_head.weight", "gla": "lm_head.weight", "evo2": "unembed.weight"}


def is_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_comes_back_bit_for_bit_with_the_same_logits(tmp_path, name, tied):
    model = tiny(name, tied_head=tied)
    formats.save(model, tmp_path / "a", name)
    back, found = formats.load(tmp_path / "a")
    assert found.name == name
    assert back.config.tied_head == tied
    assert not back.training
    if name == "evo2":  # whose rotary frequencies are written as the published ones are, in float32
        assert_close(back(IDS), model(IDS))
    else:
        assert torch.equal(back(IDS), model(IDS))
    formats.save(back, tmp_path / "b", name)
    assert torch.equal(formats.load(tmp_path / "b")[0](IDS), back(IDS))
    (first, first_config), (again, again_config) = (files.read_folder(tmp_path / x) for x in "ab")
    assert is_same(first, again)
    assert first_config == again_config
    assert not any(p.name.startswith(".") for p in tmp_path.iterdir())


@pytest.mark.parametrize("name", MODELS)
def test_float64_stays_float64(tmp_path, name):
    model = tiny(name).double()
    formats.save(model, tmp_path / "a", name)
    back, _ = formats.load(tmp_path / "a")
    assert back.embedding.weight.dtype == torch.float64
    assert all(
        t.dtype == torch.float64 for k, t in load_file(tmp_path / "a" / files.WEIGHTS).items() if "inv_freq" not in k
    )


def test_hyenadna_folder_is_as_the_hub_has_them(tmp_path):
    formats.save(tiny("hyenadna"), tmp_path / "a", "hyenadna")
    assert {p.name for p in (tmp_path / "a").iterdir()} == files.WRITTEN
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["model_type"] == "hyenadna"
    assert config["architectures"] == ["HyenaDNAForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"].endswith("-hf--modeling_hyena.HyenaDNAForCausalLM")
    assert (config["max_seq_len"], config["d_inner"], config["tie_word_embeddings"]) == (64, 32, False)
    tokenizer = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert (tokenizer["tokenizer_class"], tokenizer["padding_side"]) == ("HyenaDNATokenizer", "left")
    assert (tokenizer["eos_token"], tokenizer["model_max_length"]) == ("[SEP]", 64)
    keys = load_file(tmp_path / "a" / files.WEIGHTS).keys()
    assert sum(key.endswith(".freq") for key in keys) == 2, "one for each layer's filter"
    assert "lm_head.weight" in keys


def test_gla_head_that_is_the_embedding_is_stored_once(tmp_path):
    for tied in (True, False):
        formats.save(tiny("gla", tied_head=tied), tmp_path / str(tied), "gla")
        tensors, config = files.read_folder(tmp_path / str(tied))
        assert config["tie_word_embeddings"] == tied
        assert ("lm_head.weight" in tensors) == (not tied)


def folder_of(tmp_path: Path, name: str = "hyenadna") -> Path:
    formats.save(tiny(name), tmp_path / "a", name)
    return tmp_path / "a"


def shard(folder: Path, parts: int = 3) -> dict[str, str]:
    """Cut model.safetensors into shards with an index; returns the index's map."""
    tensors = load_file(folder / files.WEIGHTS)
    where = {key: f"model-{i % parts + 1:05d}-of-{parts:05d}.safetensors" for i, key in enumerate(tensors)}
    for name in set(where.values()):
        save_file({k: t for k, t in tensors.items() if where[k] == name}, folder / name, metadata={"format": "pt"})
    (folder / files.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    (folder / files.WEIGHTS).unlink()
    return where


def test_shards_and_torch_files_hold_the_same(tmp_path):
    folder = folder_of(tmp_path)
    tensors, config = files.read_folder(folder)
    whole = formats.load(folder)[0](IDS)
    assert is_same(files.read_folder(folder / files.WEIGHTS)[0], tensors)
    shard(folder)
    assert is_same(files.read_folder(folder)[0], tensors)
    for n, (name, content) in enumerate(
        {
            "pytorch_model.bin": tensors,
            "weights.ckpt": {"state_dict": tensors, "epoch": 3, "optimizer_states": [{"lr": 0.1}]},
            "model.pt": {"model": tensors, "step": 4},
            "weights.pth": tensors | {"blocks.0._extra_state": None},
        }.items()
    ):
        other = tmp_path / str(n)
        other.mkdir()
        torch.save(content, other / name)
        (other / "config.json").write_text(json.dumps(config))
        assert is_same(files.read_folder(other)[0], tensors)
        assert torch.equal(formats.load(other)[0](IDS), whole)


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


def test_a_file_that_runs_code_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "x": Harmful()}, "weights.ckpt")
    Path("config.json").write_text("{}")
    with pytest.raises(InputError, match=r"weights\.ckpt: must be a whole torch file of tensors"):
        formats.load(Path("weights.ckpt"))
    assert not Path("harm").exists()


def test_damaged_files_are_named(tmp_path):
    folder = folder_of(tmp_path)
    good = (folder / files.WEIGHTS).read_bytes()
    for bad in (b"", good[:7], good[:100], good[:-1], b"\xff" * 200, good + b"x"):
        (folder / files.WEIGHTS).write_bytes(bad)
        with pytest.raises(InputError, match=r"model\.safetensors: must be a whole safetensors file: "):
            formats.load(folder)
    (folder / files.WEIGHTS).write_bytes(good)
    torch.save(load_file(folder / files.WEIGHTS), folder / "weights.pt")
    good, rng = (folder / "weights.pt").read_bytes(), random.Random(0)
    for length in (0, 1, 100, len(good) // 2, len(good) - 1):
        (folder / "weights.pt").write_bytes(good[:length])
        with pytest.raises(InputError, match=r"weights\.pt: must "):
            formats.load(folder / "weights.pt")
    for _ in range(60):  # damage that is found is told as such, whatever torch raised
        bad = bytearray(good)
        for _ in range(5):
            bad[rng.randrange(2000)] = rng.randrange(256)
        (folder / "weights.pt").write_bytes(bad)
        with suppress(InputError):
            formats.load(folder / "weights.pt")


def config_text(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)


def config_change(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config_text(folder, json.dumps({k: v for k, v in {**config, **changes}.items() if v != "delete"}))


def tensors_change(folder: Path, **changes: torch.Tensor) -> None:
    tensors = {**load_file(folder / files.WEIGHTS), **changes}
    (folder / files.WEIGHTS).unlink()
    save_file(tensors, folder / files.WEIGHTS)


def index_change(folder: Path, **changes: Any) -> None:
    where = shard(folder)
    (folder / files.INDEX).write_text(json.dumps({"weight_map": {**where, **changes}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, r"a: must be a folder with config\.json and weights"),
        (lambda f: (f / files.WEIGHTS).unlink(), r"a: must hold model\.safetensors"),
        (lambda f: (f / "config.json").unlink(), r"a/config\.json: must be the config of the weights in model\.safetens"),
        (lambda f: config_text(f, "{\n]"), r"a/config\.json: must be JSON; line 2"),
        (lambda f: config_text(f, "[1]"), r"a/config\.json: must be a JSON object; got list"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), r"a/config\.json: cannot be read"),
        (lambda f: config_change(f, d_model="delete"), r"a/config\.json: hyenadna config: d_model must be given"),
        (lambda f: config_change(f, d_model="wide"), r"a/config\.json: is no config of hyenadna weights: .*d_model"),
        (lambda f: config_change(f, n_layer=3), r"model\.safetensors: .*layers\.2\..* is missing(.|\n)*and 18 more keys"),
        (lambda f: config_change(f, max_seq_len=60), r"model\.safetensors: .*pos_emb\.z must have shape \(1, 60, 5\)"),
        (lambda f: config_change(f, model_type="gla"), r"a/config\.json: must be the config of hyenadna .* one of gla"),
        (lambda f: tensors_change(f, extra=torch.zeros(1)), r"a/model\.safetensors: .*extra is not a key"),
        (lambda f: index_change(f, extra="model-00001-of-00003.safetensors"), r"00001-of-00003\.safetensors: extra is miss"),
        (lambda f: index_change(f, extra="model-4.safetensors"), r"a/model-4\.safetensors: is missing"),
        (lambda f: index_change(f, extra="../x.safetensors"), r"extra: must be in a file of the same folder"),
        (lambda f: (f / files.INDEX).write_text("{}"), r"index\.json: must have a table 'weight_map'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_named(tmp_path, change, message):
    folder = folder_of(tmp_path)
    change(folder)
    with pytest.raises(InputError, match=message) as raised:
        formats.load(folder)
    assert len(raised.value.problems) <= formats.MOST_PROBLEMS + 1


def test_several_files_of_weights_need_a_name(tmp_path):
    folder = folder_of(tmp_path)
    for name in ("x.pt", "y.pt"):
        torch.save(load_file(folder / files.WEIGHTS), folder / name)
    assert formats.load(folder)[1].name == "hyenadna"  # model.safetensors goes first
    (folder / files.WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"several files of weights: x\.pt, y\.pt"):
        formats.load(folder)
    assert formats.load(folder / "y.pt")[1].name == "hyenadna"
    with pytest.raises(InputError, match=r"config\.json: weights must be a file"):
        files.read_tensors(folder / "config.json")
    torch.save({"a": 1}, folder / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt: a: must be a tensor; got int"):
        formats.load(folder / "x.pt")
    torch.save([torch.zeros(1)], folder / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt: must hold a state dict; got list"):
        formats.load(folder / "x.pt")


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_another_format_are_told_apart(tmp_path, name):
    folder = folder_of(tmp_path, name)
    for other in MODELS:
        if other != name:
            with pytest.raises(InputError, match=f"must hold {other} weights; its keys are those of {name}"):
                formats.load(folder, other)
    with pytest.raises(InputError, match="format: must be one of evo2, gla, h3, hyenadna; got 'hyena'"):
        formats.load(folder, "hyena")
    assert formats.load(folder, name)[1].name == name


def test_weights_of_no_known_format(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.zeros(1)}, tmp_path / files.WEIGHTS)
    with pytest.raises(InputError, match="is of no format that is known by its keys; name one"):
        formats.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("hyenadna", {"order": 3}, r"model\.order must be 2"),
        ("hyenadna", {"norm_eps": 1e-6}, r"model\.norm_eps must be 1e-05"),
        ("hyenadna", {"short_filter": 4}, r"cannot hold model\.short_filter = 4; the format has 3"),
        ("hyenadna", {"filter": {"order": 8, "shift": 0.0}}, r"cannot hold model\.filter\.shift = 0\.0; the format has 0\.05"),
        ("h3", {"norm": "rms"}, r"h3: cannot hold model\.norm = 'rms'; the format has 'layer'"),
        ("h3", {"mixers": {"attention": {"window": 8}}}, r"cannot hold model\.mixers\.attention\.window = 8"),
        ("gla", {"mixers": {"gla": {"gate_normalizer": 8.0}}}, r"model\.mixers\.gla\.gate_normalizer must be 16\.0; got 8\.0"),
        ("evo2", {"mixers": {"hyena_mr": {"short_filter": 4}}}, r"cannot hold model\.mixers\.hyena_mr\.short_filter = 4"),
        ("evo2", {"norm": "rms"}, r"evo2: cannot hold model\.norm = 'rms'"),
        ("evo2", {"layers": (), "pattern": ("linear_attention",), "n_layer": 1}, "evo2: needs .* with mixers of attention, hy"),
    ],
)  # fmt: skip
def test_models_that_a_format_has_not_are_refused(tmp_path, name, changes, message):
    settings = MODELS[name] | changes
    if settings.get("layers") == ():
        settings = {k: v for k, v in settings.items() if k != "layers"}
    model = formats.LanguageModel(formats.ModelConfig.model_validate(settings))
    with pytest.raises(InputError, match=message):
        formats.save(model, tmp_path / "a", name)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_it_is_an_export_and_force_is_given(tmp_path, monkeypatch):
    folder, model = folder_of(tmp_path), tiny("gla")
    with pytest.raises(InputError, match="exists; name another folder, or give --force"):
        formats.save(model, folder, "gla")
    formats.save(model, folder, "gla", replace=True)
    assert {p.name for p in folder.iterdir()} == {"config.json", files.WEIGHTS}
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(InputError, match="cannot be written: No space left"):
            formats.save(tiny("h3"), folder, "h3", replace=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(
        InputError, match=r"--force replaces only what an export wrote; this folder also holds thesis\.tex"
    ):
        formats.save(model, folder, "gla", replace=True)
    with pytest.raises(InputError, match="it is a file"):
        formats.save(model, folder / "thesis.tex", "gla", replace=True)


class TestTransformers:
    """Only where it is installed; its own loader finds every weight of what is written."""

    pytestmark = pytest.mark.filterwarnings("ignore")

    def test_loads_a_hyenadna_folder_into_modules_of_the_published_names(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        model = formats.hyenadna.load(independent.published(dtype=torch.float32), independent.config())
        formats.save(model, tmp_path / "a", "hyenadna")

        class Config(transformers.PretrainedConfig):
            model_type = "hyenadna"

        class Skeleton(transformers.PreTrainedModel):
            config_class = Config

            def __init__(self, config: Any) -> None:
                super().__init__(config)
                for key, value in hyenadna_state_dict(
                    model, layout=Layout("hyena.backbone.", "lm_head.weight")
                ).items():
                    *path, name = key.split(".")
                    place: torch.nn.Module = self
                    for part in path:
                        if part not in place._modules:
                            place.add_module(part, torch.nn.Module())
                        place = place.get_submodule(part)
                    place.register_parameter(name, torch.nn.Parameter(torch.zeros_like(value)))
                for layer in self.hyena.backbone.layers.children():  # one activation, under three names
                    filter = layer.mixer.filter_fn.implicit_filter
                    for j in ("3", "5"):
                        filter.add_module(j, filter.get_submodule("1"))
                self.all_tied_weights_keys: dict[str, str] = {}

            _keys_to_ignore_on_load_missing = [r"freq"]  # noqa: RUF012

            def _init_weights(self, module: torch.nn.Module) -> None:
                """All come from the file."""

        opened, found = Skeleton.from_pretrained(tmp_path / "a", output_loading_info=True)
        assert not found["missing_keys"]
        assert not found["unexpected_keys"]
        assert not found["mismatched_keys"]
        assert (opened.config.d_model, opened.config.max_seq_len) == (independent.D, independent.L_MAX)
        weights = {key: value.detach() for key, value in opened.state_dict().items()}
        expected = independent.independent_logits(
            weights, independent.IDS, 2, prefix="hyena.backbone.", head="lm_head.weight"
        )
        assert_close(model(independent.IDS), expected)

    def test_loads_a_gla_folder_into_flash_linear_attention(self, tmp_path):
        pytest.importorskip("transformers")
        models = pytest.importorskip("fla.models")
        model = tiny("gla")
        formats.save(model, tmp_path / "a", "gla")
        opened, found = models.GLAForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
        assert not found["missing_keys"]
        assert not found["unexpected_keys"]
        opened.save_pretrained(tmp_path / "b")
        assert torch.equal(formats.load(tmp_path / "b")[0](IDS), model(IDS))
