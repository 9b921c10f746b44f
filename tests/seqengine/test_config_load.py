"""Loading a config: layers, provenance, and every mistake told in words, all at once."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from seqengine.config.data import SourceSection
from seqengine.config.load import Loaded, load
from seqengine.config.run import RunConfig
from seqengine.config.sections import TrainSection
from seqengine.errors import InputError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def read(tmp_path: Path, text: str, *overrides: str) -> Loaded:
    return load(write(tmp_path / "run.toml", text), overrides, need_data=False)


def problems(tmp_path: Path, text: str, *overrides: str, need_data: bool = False) -> tuple[str, ...]:
    path = write(tmp_path / "run.toml", text)
    with pytest.raises(InputError) as caught:
        load(path, overrides, need_data=need_data)
    for problem in caught.value.problems:
        for jargon in ("Input should", "http", "pydantic", "type=", "Value error", "function-", "\n"):
            assert jargon not in problem
    return caught.value.problems


def only_problem(tmp_path: Path, text: str, *overrides: str, need_data: bool = False) -> str:
    (problem,) = problems(tmp_path, text, *overrides, need_data=need_data)
    return problem


STEPS = "[train]\nsteps = 10\n"
SOURCES = get_args(SourceSection.model_fields["source"].annotation)


# Mistakes in one key


def test_typo_suggests_the_right_key(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, STEPS + "[data]\nseq_lne = 5\n")
    assert problem == f"data.seq_lne: unknown key; did you mean 'data.seq_len'? ({tmp_path}/run.toml:4)"


def test_key_of_another_section_is_suggested(tmp_path: Path) -> None:
    assert "train.lr: unknown key; did you mean 'optim.lr'?" in only_problem(tmp_path, STEPS, "train.lr=1e-3")


def test_key_outside_any_section_is_suggested(tmp_path: Path) -> None:
    assert only_problem(tmp_path, "lr = 1e-3\n" + STEPS).startswith("lr: unknown section; did you mean 'optim.lr'?")


def test_typo_in_a_section_is_suggested(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, STEPS + "[optmi]\nlr = 1e-3\n")
    assert problem == f"optmi: unknown section; did you mean 'optim'? ({tmp_path}/run.toml:3)"


def test_typo_in_a_nested_table_is_suggested(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, STEPS + "[model]\nfilter = {ordr = 3}\n")
    assert "model.filter.ordr: unknown key; did you mean 'model.filter.order'" in problem


def test_unknown_key_without_a_likely_one_lists_the_keys(tmp_path: Path) -> None:
    assert "[parallel] has: backend, zero, replicate, shard, sequence" in only_problem(
        tmp_path, STEPS, "parallel.zzz=1"
    )


def test_text_where_a_number_belongs(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, STEPS + "\n[optim]\nlr = 'fast'\n")
    assert problem == f"optim.lr: must be a number above 0, got 'fast' ({tmp_path}/run.toml:5)"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=-1", "optim.lr: must be a number above 0, got -1 (command line)"),
        ("optim.lr=nan", "optim.lr: must be a number above 0, got nan (command line)"),
        ("optim.lr=true", "optim.lr: must be a number above 0, got true (command line)"),
        ("run.deterministic=1", "run.deterministic: must be true or false, got 1 (command line)"),
        ("run.name=3", "run.name: must be text in quotes, got 3 (command line)"),
        (
            "data.source=fast",
            f"data.source: must be {', '.join(map(repr, SOURCES[:-1]))} or {SOURCES[-1]!r}, got 'fast' (command line)",
        ),
        ("optim={}", None),
        ("optim=3", "optim: must be a table, got 3 (command line)"),
        ("data.fasta=3", "data.fasta: must be a path in quotes, got 3 (command line)"),
    ],
)
def test_wrong_values_are_worded_for_people(tmp_path: Path, override: str, expected: str | None) -> None:
    if expected is None:
        read(tmp_path, STEPS, override)
    else:
        assert only_problem(tmp_path, STEPS, override) == expected


@pytest.mark.parametrize("value", ["1.5", "'x'", "true", "0", "-3", "[1]", "{a = 1}"])
@pytest.mark.parametrize("key", ["train.micro_batch", "model.d_inner", "ckpt.every", "schedule.warmup", "eval.windows"])
def test_a_union_gives_one_message(tmp_path: Path, key: str, value: str) -> None:
    if (key, value) in (("ckpt.every", "1.5"), ("schedule.warmup", "0")):
        read(tmp_path, STEPS, f"{key}={value}")
    else:
        assert only_problem(tmp_path, STEPS, f"{key}={value}").startswith(f"{key}: must be ")


def test_a_union_names_every_way_out(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, STEPS, "train.micro_batch=some")
    assert problem.startswith(
        "train.micro_batch: must be a whole number above 0 (such as 1000, '1k', '1Ki' or '10B') or 'auto'"
    )


@pytest.mark.parametrize("value", ["[0.9]", "[0.9, 0.95, 0.99]", "[0.9, 1.0]", "['a', 0.9]", "0.9"])
def test_array_of_numbers_is_told_as_a_whole(tmp_path: Path, value: str) -> None:
    problem = only_problem(tmp_path, STEPS, f"optim.betas={value}")
    assert problem.startswith(
        "optim.betas: must be an array of 2 values, each a number of at least 0 and below 1, got "
    )


def test_array_of_tables_names_the_element(tmp_path: Path) -> None:
    text = STEPS + "[[optim.groups]]\nmatch = 'a'\n[[optim.groups]]\nlr_scale = 'x'\n"
    assert problems(tmp_path, text) == (
        f"optim.groups[1].match: missing; it must be text in quotes ({tmp_path}/run.toml:5)",
        f"optim.groups[1].lr_scale: must be a number of at least 0, got 'x' ({tmp_path}/run.toml:6)",
    )


def test_check_of_the_model_names_its_key_and_line(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, STEPS + "[model.filter]\nemb_dim = 6\n")
    assert problem.startswith("model.filter.emb_dim: must be odd")
    assert problem.endswith(f"({tmp_path}/run.toml:4)")


def test_several_errors_come_at_once(tmp_path: Path) -> None:
    text = "[optim]\nlr = 'fast'\n[data]\nseq_len = 2048\nfasta = '/nowhere.fa'\n"
    text += "[log]\nevrey = 1\n[train]\nbatch_tokens = 3000\n"
    found = "\n".join(problems(tmp_path, text, "oops", need_data=True))
    for part in (
        "optim.lr",
        "log.evrey",
        "model.max_len",
        "train.steps or train.tokens",
        "batch_tokens = 3000",
        "'oops'",
        "/nowhere",
    ):
        assert part in found


# Impossible combinations


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.batch_tokens=1000"], ["train.batch_tokens = 1000", "multiple of data.seq_len = 1024", "set"]),
        (["train.batch_tokens=4Ki", "parallel.replicate=3"], ["4 windows per step", "by parallel.replicate = 3"]),
        (["train.batch_tokens=4Ki", "parallel.replicate=2", "train.micro_batch=4"], ["2 per replica", "batch = 4"]),
        (["train.batch_tokens=4Ki", "train.micro_batch=3"], ["4 windows per step", "train.micro_batch = 3"]),
        (["parallel.sequence=2000"], ["parallel.sequence = 2000", "more ranks than tokens", "data.seq_len = 1024"]),
        (["data.seq_len=2048"], ["data.seq_len = 2048", "model.max_len = 1024", "set model.max_len = 2048"]),
        (["data.bed=x.bed"], ["data.bed = 'x.bed' needs data.fasta", "add data.fasta="]),
        (["data.source=synthetic", "data.fasta=x.fa"], ["data.fasta would not be read", "data.source = 'synthetic'"]),
        (["data.source=synthetic", "data.synthetic.length=5k"], ["data.synthetic.length = 5000", "at least 20501"]),
        (["schedule.warmup=10M"], ["schedule.warmup = 10000000 tokens", "163840 tokens of the run"]),
        (["run.dir=runs/{date}"], ["only {name} is filled in", "got 'runs/{date}'"]),
        (["model.vocab_size=4"], ["model.vocab_size = 4", "at least 12"]),
    ],
)  # fmt: skip
def test_impossible_combinations_name_keys_values_and_remedy(
    tmp_path: Path, overrides: list[str], parts: list[str]
) -> None:
    problem = only_problem(tmp_path, STEPS, *overrides)
    for part in parts:
        assert part in problem
    assert "command line" in problem


STAGES = "data.stages=[{seq_len=256, tokens=40960}, {seq_len=1024}]"


@pytest.mark.parametrize(
    ("overrides", "keys", "parts"),
    [
        (["train.batch_tokens=1000"], "train.batch_tokens data.seq_len", ["set train.batch_tokens = 1024 or 2048"]),
        (["data.stages=[{seq_len=48, tokens=1}, {seq_len=1024}]"], "data.stages[0].seq_len", ["= 16368 or 16416"]),
        (
            ["parallel.replicate=3"],
            "train.batch_tokens data.seq_len parallel.replicate",
            ["16 windows per step", "3072"],
        ),
        (
            ["parallel.backend=fsdp2", "parallel.replicate=3", "parallel.shard=3"],
            "train.batch_tokens data.seq_len parallel.replicate",
            ["parallel.replicate x parallel.shard = 9"],
        ),
        (
            ["train.micro_batch=3"],
            "train.batch_tokens data.seq_len parallel.replicate train.micro_batch",
            ["a divisor of 16"],
        ),
        (["data.stages=[{seq_len=1024, micro_batch=5}]"], "data.stages[0].micro_batch", ["micro_batch = 5"]),
        (["parallel.sequence=1025"], "parallel.sequence data.seq_len", ["to at most 1024"]),
        (
            ["data.stages=[{seq_len=1024, sequence=1025}]"],
            "data.stages[0].sequence",
            ["data.stages[0].sequence = 1025"],
        ),
        (["data.stages=[{seq_len=2048, tokens=1}, {seq_len=1024}]"], "data.stages[0].seq_len model.max_len", ["2048"]),
        ([STAGES, "data.seq_len=512"], "data.seq_len data.stages[1].seq_len", ["set data.seq_len = 1024"]),
        ([STAGES, "train.steps=2"], "data.stages train.tokens train.steps", ["40960 tokens", "the 32768 of the run"]),
        ([STAGES, "train.tokens=40960"], "data.stages train.tokens train.steps", ["the 40960 of the run"]),
        (["parallel.backend=deepspeed"], "parallel.backend parallel.zero", ["set it to 1, 2 or 3"]),
        (["parallel.zero=3"], "parallel.zero parallel.backend", ["got parallel.backend = 'none'"]),
        (["parallel.shard=2"], "parallel.shard parallel.backend", ["set parallel.backend = 'fsdp2'"]),
        (["activation.offload=true"], "activation.offload activation.checkpoint", ["got 'none'"]),
    ],
)
def test_meshes_stages_and_backends_that_do_not_fit(
    tmp_path: Path, overrides: list[str], keys: str, parts: list[str]
) -> None:
    problem = only_problem(tmp_path, STEPS, *overrides)
    text, _, origins = problem.rpartition(" (")
    assert all(f"{key}: " in origins for key in keys.split()), origins
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("parallel.replicate=2", "parallel.replicate = 2: ZeRO cuts one copy over all ranks"),
        ("precision.params=fp64", "precision.params = 'fp64': DeepSpeed has no float64"),
        ("optim.name=muon", "optim.name = 'muon' needs whole matrices, which ZeRO cuts"),
        ("optim.ema=0.99", "optim.ema = 0.99 needs whole weights, which parallel.zero = 3 cuts"),
    ],
)
def test_zero_refuses_what_needs_whole_weights(tmp_path: Path, override: str, text: str) -> None:
    problem = only_problem(tmp_path, STEPS, "parallel.backend=deepspeed", "parallel.zero=3", override)
    assert problem.startswith(text)
    assert override.partition("=")[0] in problem.rpartition(" (")[2]


@pytest.mark.parametrize(
    "overrides",
    [
        [STAGES],
        ["parallel.backend=deepspeed", "parallel.zero=2", "optim.ema=0.99", "precision.params=bf16"],
        ["parallel.backend=fsdp2", "parallel.replicate=2", "parallel.shard=2", "optim.name=muon", "optim.ema=0.99"],
        ["activation.checkpoint=block", "activation.offload=true", "parallel.backend=ddp", "parallel.shard=1"],
    ],
)
def test_meshes_stages_and_backends_that_fit(tmp_path: Path, overrides: list[str]) -> None:
    read(tmp_path, STEPS, *overrides)


def test_text_with_nul_is_refused_but_as_a_separator(tmp_path: Path) -> None:
    text = 'data.source = "text"\ndata.separator = "\\u0000"\nrun.dir = "a\\u0000"\n' + STEPS
    wide = "model.vocab_size=258"
    assert only_problem(tmp_path, text, wide).startswith("run.dir: must not hold the character NUL")


def test_suggested_synthetic_length_is_accepted(tmp_path: Path) -> None:
    read(tmp_path, STEPS, "data.source=synthetic", "data.synthetic.length=20501")


def test_a_run_needs_a_length(tmp_path: Path) -> None:
    assert "train.steps or train.tokens must be given" in only_problem(tmp_path, "[train]\nclip = 0.0\n")


def test_an_impossible_config_cannot_be_built_directly() -> None:
    with pytest.raises(ValidationError, match=r"train\.steps or train\.tokens must be given"):
        RunConfig()
    assert RunConfig(train=TrainSection(steps=2)).total_steps == 2


# Data files


def test_missing_fasta_key_says_how_to_set_it(tmp_path: Path) -> None:
    assert "add data.fasta=/path/to/genome.fa" in only_problem(tmp_path, STEPS, need_data=True)


def test_missing_files_are_named_with_key_path_and_origin(tmp_path: Path) -> None:
    text = STEPS + f"[data]\nfasta = '{tmp_path}/no.fa'\n"
    assert problems(tmp_path, text, f"data.bed={tmp_path}", need_data=True) == (
        f"data.fasta: no such file: '{tmp_path}/no.fa'; check the path ({tmp_path}/run.toml:4)",
        f"data.bed: is not a file: '{tmp_path}'; check the path (command line)",
    )


def test_data_files_that_exist_are_accepted(tmp_path: Path) -> None:
    fasta = write(tmp_path / "a.fa", ">a\nACGT\n")
    loaded = load(write(tmp_path / "run.toml", STEPS), [f"data.fasta={fasta}"])
    assert loaded.config.data.fasta == fasta


def test_synthetic_data_needs_no_file(tmp_path: Path) -> None:
    path = write(tmp_path / "run.toml", STEPS)
    assert load(path, ["data.source=synthetic"]).config.data.source == "synthetic"


# What follows from a config


def test_figures_of_a_run_in_steps_and_in_tokens(tmp_path: Path) -> None:
    config = read(tmp_path, STEPS, "train.batch_tokens=4Ki", "run.name=x").config
    assert (config.windows_per_step, config.total_steps, config.total_tokens) == (4, 10, 40960)
    assert config.run_dir == Path("runs/x")
    config = read(tmp_path, STEPS, "train.tokens=10k", "train.batch_tokens=4Ki").config
    assert (config.total_steps, config.total_tokens) == (3, 10_000)


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "run.toml", STEPS)
    load(path, need_data=False)
    with pytest.raises(InputError):
        load(path, ["optim.lr=fast"])
    assert list(tmp_path.iterdir()) == [path]
