"""The layers of a config: files that extend each other, overrides, and the origin of every value."""

from pathlib import Path

import pytest

from seqengine.config.lines import scan_lines
from seqengine.config.load import Loaded, load
from seqengine.config.optim import OptimGroup
from seqengine.errors import InputError

STEPS = "[train]\nsteps = 10\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def read(tmp_path: Path, text: str, *overrides: str) -> Loaded:
    return load(write(tmp_path / "run.toml", text), overrides, need_data=False)


def problems(tmp_path: Path, text: str, *overrides: str) -> tuple[str, ...]:
    path = write(tmp_path / "run.toml", text)
    with pytest.raises(InputError) as caught:
        load(path, overrides, need_data=False)
    return caught.value.problems


def only_problem(tmp_path: Path, text: str, *overrides: str) -> str:
    (problem,) = problems(tmp_path, text, *overrides)
    return problem


def test_extends_chain_merges_tables_and_replaces_arrays(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", "[optim]\nlr = 1.0\nbetas = [0.5, 0.5]\neps = 1e-6\n[model.filter]\norder = 8\n" + STEPS)
    (tmp_path / "sub").mkdir()
    write(
        tmp_path / "sub" / "b.toml",
        "extends = '../a.toml'\n[optim]\nlr = 2.0\nbetas = [0.1, 0.2]\n[model]\nd_model = 16\n",
    )
    config = read(tmp_path, "extends = 'sub/b.toml'\n[optim]\nlr = 3.0\n", "model.filter.emb_dim=7").config
    assert (config.optim.lr, config.optim.betas, config.optim.eps) == (3.0, (0.1, 0.2), 1e-6)
    assert (config.model.d_model, config.model.filter.order, config.model.filter.emb_dim) == (16, 8, 7)


def test_provenance_names_file_line_and_layer(tmp_path: Path) -> None:
    write(
        tmp_path / "base.toml",
        "[train]\n# how long\nsteps = 10\n[optim]\nbetas = [\n  0.9,  # ]\n  0.95,\n]\nlr = 1e-3\n",
    )
    text = 'extends = "base.toml"\n[run]\nname = """\na = 1"""\n\n[data]\nseq_len = 512\n[model.filter]\norder = 9\n'
    found = read(tmp_path, text, "eval.every=5").provenance
    assert found["train.steps"] == f"{tmp_path}/base.toml:3 (extended)"
    assert found["optim.betas"] == f"{tmp_path}/base.toml:5 (extended)"
    assert found["optim.lr"] == f"{tmp_path}/base.toml:9 (extended)"
    assert found["run.name"] == f"{tmp_path}/run.toml:3"
    assert found["data.seq_len"] == f"{tmp_path}/run.toml:7"
    assert found["model.filter.order"] == f"{tmp_path}/run.toml:9"
    assert found["eval.every"] == "command line"
    assert found["model.filter.emb_dim"] == "default"


def test_lines_of_all_forms_of_keys() -> None:
    text = "\n".join(
        [
            "a.b = 1",  # 1
            "'q.x' = {y = 2, z = [{w = 3}]}  # comment = 4",
            "s = '''",  # 3
            "[not.a.table]",
            "k = 1'''",
            "n = [",  # 6
            "  [1, 2], # ]",
            '  ["]", "#"],',
            "]",
            "[ t . \"u.v\" ] # head",  # 10
            "k = 1",
            "[[arr]]",  # 12
            "k = 1",
            "[[arr.in]]",  # 14
            "k = 1",
            "[[arr]]",  # 16
            "[arr.sub]",
            "k = 1",  # 18
        ]
    )  # fmt: skip
    lines = scan_lines(text)
    assert scan_lines(text.replace("\n", "\r\n")) == lines
    for path, line in {
        ("a", "b"): 1, ("q.x",): 2, ("q.x", "y"): 2, ("q.x", "z", 0, "w"): 2, ("s",): 3, ("n",): 6, ("t", "u.v"): 10,
        ("t", "u.v", "k"): 11, ("arr",): 12, ("arr", 0): 12, ("arr", 0, "k"): 13, ("arr", 0, "in", 0, "k"): 15,
        ("arr", 1): 16, ("arr", 1, "sub", "k"): 18,
    }.items():  # fmt: skip
        assert lines[path] == line
    assert ("not", "a", "table") not in lines


def test_later_steps_replace_earlier_tokens_and_the_other_way_round(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", "[train]\ntokens = '1M'\n")
    loaded = read(tmp_path, "extends = 'base.toml'\n[train]\nsteps = 3\n")
    assert (loaded.config.train.steps, loaded.config.train.tokens) == (3, None)
    assert loaded.provenance["train.tokens"] == "default"
    train = read(tmp_path, "extends = 'base.toml'\n[train]\nsteps = 3\n", "train.tokens=2M").config.train
    assert (train.steps, train.tokens) == (None, 2_000_000)


def test_steps_and_tokens_in_one_layer_are_an_error(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, "[train]\nsteps = 3\ntokens = '1M'\n")
    assert "train.steps and train.tokens exclude each other" in problem
    assert f"train.tokens = '1M' ({tmp_path}/run.toml:3)" in problem
    assert "exclude each other" in only_problem(tmp_path, STEPS, "train.steps=1", "train.tokens=1M")


def test_extends_may_name_a_preset(tmp_path: Path) -> None:
    loaded = read(tmp_path, "extends = 'hyenadna-tiny-1k'\n[optim]\nlr = 1.0\n")
    assert loaded.config.model.d_model == 128
    assert loaded.provenance["model.d_model"].startswith("configs/hyenadna-tiny-1k.toml:")
    assert loaded.provenance["model.d_model"].endswith(" (extended)")


def test_cycle_names_the_chain(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", "extends = 'run.toml'\n")
    problem = only_problem(tmp_path, "extends = 'a.toml'\n")
    assert problem == f"extends goes in a circle: {tmp_path}/run.toml -> {tmp_path}/a.toml -> {tmp_path}/run.toml"


def test_missing_base_names_the_line_that_wants_it(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, "\nextends = 'no.toml'\n")
    assert problem.startswith(f"extends ({tmp_path}/run.toml:2): {tmp_path}/no.toml: no such config file or preset")
    assert "extends: must be the name of one TOML file" in only_problem(tmp_path, "extends = ['a.toml']\n")


def test_unknown_preset_suggests_one() -> None:
    with pytest.raises(InputError, match="did you mean the preset 'hyenadna-tiny-1k'"):
        load("hyenadna-tiny-1", need_data=False)
    with pytest.raises(InputError, match=r"the presets are: demo, genomic-benchmarks, gla-1\.3b"):
        load("zzz.toml", need_data=False)


def test_toml_syntax_error_names_file_and_line(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, "[train]\nsteps = \n")
    assert problem.startswith(f"{tmp_path}/run.toml:2: not valid TOML: ")
    assert len(problems(tmp_path, "[train\n", "also wrong")) == 2


def test_text_that_is_not_utf8_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"[run]\nname = '\xff'\n")
    with pytest.raises(InputError, match="must be UTF-8 text"):
        load(path)
    path.write_bytes(b"\xef\xbb\xbf[train]\r\nsteps = 3\r\n")
    assert load(path, need_data=False).provenance["train.steps"] == f"{path}:2"


# Overrides


def test_override_values_are_toml_or_else_text(tmp_path: Path) -> None:
    overrides = [
        "optim.lr=1e-3", "run.name=my run", "log.tensorboard=true", "optim.betas=[0.5, 0.6]", "train.batch_tokens=32Ki",
        "optim.groups=[{match = '*.filter.*', lr_scale = 0.5}]", "run.dir='a=b'",
        "ckpt.every=30min", "parallel.replicate=auto",
    ]  # fmt: skip
    config = read(tmp_path, STEPS, *overrides).config
    assert (config.optim.lr, config.run.name, config.log.tensorboard) == (1e-3, "my run", True)
    assert (config.optim.betas, config.train.batch_tokens) == ((0.5, 0.6), 32768)
    assert config.optim.groups == (OptimGroup(match="*.filter.*", lr_scale=0.5),)
    assert (config.run.dir, config.ckpt.every, config.parallel.replicate) == ("a=b", 1800.0, "auto")


def test_override_that_looks_like_a_date_is_text(tmp_path: Path) -> None:
    assert read(tmp_path, STEPS, "run.name=2024-01-01").config.run.name == "2024-01-01"


def test_override_cannot_smuggle_in_a_second_key(tmp_path: Path) -> None:
    config = read(tmp_path, STEPS, "run.name=1\ny = 2").config
    assert config.run.name == "1\ny = 2"


def test_last_of_equal_overrides_wins(tmp_path: Path) -> None:
    assert read(tmp_path, STEPS, "optim.lr=1", "optim.lr=2").config.optim.lr == 2.0


@pytest.mark.parametrize("override", ["optim.lr", "=3", "", "optim..lr=3", ".lr=3", "--fast", "a b=3"])
def test_malformed_override(tmp_path: Path, override: str) -> None:
    assert only_problem(tmp_path, STEPS, override).startswith(
        f"'{override}': an override must look like section.key=value"
    )


def test_override_through_a_value_is_an_error(tmp_path: Path) -> None:
    assert "train.steps is not a table" in only_problem(tmp_path, STEPS, "train.steps.x=3")
    assert "optim.lr is not a table" in only_problem(tmp_path, STEPS, "optim.lr=3", "optim.lr.x=3")
    assert "optim.groups is not a table" in only_problem(tmp_path, STEPS, "optim.groups=[]", "optim.groups.0.match=a")


def test_override_that_is_not_unicode(tmp_path: Path) -> None:
    assert "must be UTF-8 text" in only_problem(tmp_path, STEPS, "data.fasta=\udcff.fa")
