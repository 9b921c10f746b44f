"""Writing a config: what is dumped reads back equal, with the origin of every value."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqengine.config.data import DataSection
from seqengine.config.engine import CkptSection
from seqengine.config.layers import preset_names
from seqengine.config.load import Loaded, load
from seqengine.config.model import ModelConfig
from seqengine.config.optim import OptimGroup, OptimSection
from seqengine.config.run import RunConfig
from seqengine.config.sections import RunSection, TrainSection
from seqengine.config.write import changed, dump

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


def reread(text: str, folder: Path) -> RunConfig:
    path = folder / "dumped.toml"
    path.write_text(text, encoding="utf-8", newline="")
    return load(path, need_data=False).config


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_reads_back_equal(name: str, tmp_path: Path) -> None:
    loaded = load(name, need_data=False)
    assert reread(dump(loaded), tmp_path) == loaded.config


@given(
    name=TEXT.filter(lambda text: bool(text.strip())),
    folder=TEXT.filter(lambda text: bool(text.strip()) and not set(text) & set("{}")),
    fasta=TEXT.filter(lambda text: not text.startswith("~")),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    groups=st.lists(st.builds(OptimGroup, match=TEXT, weight_decay=st.none() | st.floats(0, 1)), max_size=3),
    every=st.integers(1) | st.floats(0, exclude_min=True, allow_infinity=False),
    origin=TEXT,
)
@settings(max_examples=60, deadline=None)
def test_any_config_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    folder: str,
    fasta: str,
    lr: float,
    groups: list[OptimGroup],
    every: float,
    origin: str,
) -> None:
    config = RunConfig(
        run=RunSection(name=name, dir=folder),
        data=DataSection(fasta=Path(fasta)),
        train=TrainSection(tokens=123456789),
        optim=OptimSection(lr=lr, groups=tuple(groups)),
        ckpt=CkptSection(every=every),
    )
    text = dump(Loaded(config, {"optim.lr": origin, "optim.groups[0].match": origin}))
    assert reread(text, tmp_path_factory.mktemp("dump")) == config


def test_keys_of_the_engine_read_back(tmp_path: Path) -> None:
    overrides = [
        "ckpt.async=true", "ckpt.keep_every=1M", "ckpt.every=90s", 'ckpt.on_signal=["SIGUSR2"]', "activation.checkpoint=block",
        "activation.offload=true", "parallel.backend=deepspeed", "parallel.zero=2", "comm.step_timeout=0", "train.spike=rewind",
        "compile.backend=eager", "data.stages=[{seq_len=64, tokens=65536, sequence=2, micro_batch=8}, {seq_len=1024}]",
        "optim.groups=[{match='*', lr_scale=0.5}]",
    ]  # fmt: skip
    loaded = load("hyenadna-tiny-1k", overrides, need_data=False)
    assert (loaded.config.ckpt.is_async, loaded.config.ckpt.every, loaded.config.ckpt.keep_every) == (True, 90.0, 10**6)
    text = dump(loaded)
    assert "async = true  # command line" in text.splitlines()
    assert loaded.provenance["ckpt.async"] == "command line"
    again = reread(text, tmp_path)
    assert again == loaded.config
    assert (again.ckpt.is_async, again.data.stages[0].micro_batch, again.data.stages[1].tokens) == (True, 8, None)
    assert changed(load("hyenadna-tiny-1k", need_data=False).config, again)["ckpt.async"] == (False, True)
    assert not CkptSection().is_async


def test_each_line_tells_its_origin(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train]\nsteps = 3\n[[optim.groups]]\nmatch = '*'\n[[optim.groups]]\nmatch = 'b'\n")
    lines = dump(load(path, ["optim.lr=0.002", "data.fasta=a.fa"], need_data=False)).splitlines()
    for line in (
        "lr = 0.002  # command line",
        'fasta = "a.fa"  # command line',
        f"steps = 3  # {path}:2",
        f'match = "*"  # {path}:4',
        f'match = "b"  # {path}:6',
        "eps = 1e-08  # default",
    ):
        assert line in lines
    assert all("  # " in line for line in lines if "=" in line)


def test_none_is_left_out(tmp_path: Path) -> None:
    text = dump(load("hyenadna-tiny-1k", need_data=False))
    assert "None" not in text
    assert "tokens =" not in text.replace("batch_tokens =", "")


def test_origins_of_a_dump_are_its_own_lines(tmp_path: Path) -> None:
    text = dump(load("hyenadna-tiny-1k", need_data=False))
    path = tmp_path / "resolved.toml"
    path.write_text(text)
    for key, origin in load(path, need_data=False).provenance.items():
        if origin != "default":
            line = text.splitlines()[int(origin.rpartition(":")[2]) - 1]
            assert line.startswith((key.rpartition(".")[2] + " =", f"[[{key}]]"))


def test_changed_names_keys_with_old_and_new_values() -> None:
    old = RunConfig(train=TrainSection(steps=3))
    groups = (OptimGroup(match="*"),)
    new = RunConfig(
        train=TrainSection(tokens=16384), optim=OptimSection(groups=groups), model=ModelConfig(embed_dropout=0.5)
    )
    assert changed(old, old) == {}
    assert changed(old, new) == {
        "model.embed_dropout": (0.1, 0.5),
        "train.steps": (3, None),
        "train.tokens": (None, 16384),
        "optim.groups": ((), groups),
    }


def test_changed_reaches_nested_tables() -> None:
    old = load("hyenadna-tiny-1k", need_data=False).config
    new = load("hyenadna-tiny-1k", ["model.filter.order=8"], need_data=False).config
    assert changed(old, new) == {"model.filter.order": (64, 8)}
