"""Runs and checkpoints that cannot be gone on with, read or written, and targets and settings of other commands."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from seqengine.checkpoint.state import RECORD
from tests.launch.bad_input import Case, fasta, files, train
from tests.seqengine.checkpoints import sign_again

RUN, ONE, TWO = Path("runs/run"), Path("runs/run/ckpt/step-00000001"), Path("runs/run/ckpt/step-00000002")
TENSORS, MANIFEST = "__0_0.distcp", "MANIFEST.sha256"


def resume(
    *overrides: str, words: str | tuple[str, ...], prepare: Callable[[], object] | None = None, **options: bool
) -> Case:
    """The same command again, for two steps more."""
    return train("train.steps=4", *overrides, words=words, prepare=prepare, has_run=True, **options)


def command(*arguments: str, words: str | tuple[str, ...], prepare: Callable[[], object] | None = None) -> Case:
    """Another command on the run of two steps."""
    return Case(arguments, (words,) if isinstance(words, str) else words, prepare=prepare, has_run=True)


def edit(path: Path, change: Callable[[bytes], bytes]) -> Callable[[], None]:
    """A file with other contents."""
    return lambda: _write(path, change(path.read_bytes()))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def damage_all() -> None:
    for directory in (ONE, TWO):
        _write(directory / TENSORS, flip((directory / TENSORS).read_bytes()))


def only_two(then: Callable[[], object]) -> Callable[[], None]:
    """One checkpoint, and what is done to it."""

    def prepare() -> None:
        shutil.rmtree(ONE)
        then()

    return prepare


def record(**changes: object) -> Callable[[], None]:
    """The only checkpoint's record changed, and signed again: damage that hashes do not show."""

    def change() -> None:
        file = TWO / RECORD
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        sign_again(TWO)

    return only_two(change)


def in_place_of(path: Path) -> Callable[[], None]:
    """A file where the run wants a directory."""

    def prepare() -> None:
        if path.is_dir():
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not a directory\n")

    return prepare


def folder_in_place_of(path: Path) -> Callable[[], None]:
    """A directory where the run wants a file."""

    def prepare() -> None:
        path.unlink(missing_ok=True)
        (path / "x").mkdir(parents=True)

    return prepare


def config_line(line: str) -> Callable[[], None]:
    """The run's own config.toml begins with this line."""
    return edit(RUN / "config.toml", lambda text: line.encode() + b"\n" + text)


PROGRESS = {"step": 2, "tokens": 512, "samples": 16, "seconds": 1.0, "stage": 0}

DAMAGED = [
    resume(words=("runs/run/ckpt: no checkpoint is whole", "step-00000001: __0_0.distcp does not", "step-00000002"),
           prepare=damage_all),
    resume(words=("step-00000002", "__0_0.distcp is missing"), prepare=only_two(lambda: (TWO / TENSORS).unlink())),
    resume(words=("step-00000002", "has no MANIFEST.sha256"), prepare=only_two(lambda: (TWO / MANIFEST).unlink())),
    resume(words=("line 1 of MANIFEST.sha256",), prepare=only_two(edit(TWO / MANIFEST, lambda b: b"x" + b))),
    resume(words="MANIFEST.sha256 is damaged", prepare=only_two(edit(TWO / MANIFEST, lambda b: b[:-1]))),
    resume(words="MANIFEST.sha256 is empty", prepare=only_two(edit(TWO / MANIFEST, lambda b: b""))),
    resume(words="engine.json does not have the contents", prepare=only_two(edit(TWO / RECORD, flip))),
    resume(words=".metadata is missing", prepare=only_two(lambda: (TWO / ".metadata").unlink())),
    resume(words=("step-00000002", "checkpoint format must be 1 or 2; got 99"), prepare=record(format=99)),
    resume(words="engine.json is of step 7", prepare=record(progress={**PROGRESS, "step": 7})),
    resume(words=("engine.json", "must be the record of a checkpoint"), prepare=record(progress={"steps": 2})),
    resume(words=("engine.json", "must be the record of a checkpoint"), prepare=record(progress={**PROGRESS, "tokens": "x"})),
    resume(words=("engine.json", "must be the record of a checkpoint"), prepare=record(weather="fine")),
    resume(words=("engine.json", "must be the record of a checkpoint"), prepare=record(stream=3)),
    resume(words="data state: must hold the whole numbers", prepare=record(stream={"seed": 1})),
    resume(words=("data state", "run.seed"), prepare=record(stream={"seed": 1, "epoch": 0, "samples": 16})),
    resume(words=("data:", "was trained on other data", "step-00000002"), prepare=record(data_hash="e" * 64)),
    resume(words=("data:", "was trained on other data"), prepare=files(genome__fa=fasta("ACGTT" * 1200)), packs=True),
]  # fmt: skip


def other_model() -> None:
    """config.toml says another width than the weights have."""
    for file in (RUN / "config.toml", Path("tiny.toml")):
        file.write_text(file.read_text().replace("d_model = 8", "d_model = 16"))


CHANGED = [
    resume(change, words=(f"{key or change.partition('=')[0]}: runs/run was started with", "command line", "--allow-change"))
    for change, key in (
        ("model.d_model=16", ""), ("model.embed_dropout=0.2", ""), ("model.filter.order=4", ""), ("optim.lr=1", ""),
        ("optim.name=muon", ""), ("optim.ema=0.9", ""), ("data.rc_prob=0.1", ""), ("data.valid_fraction=0.2", ""),
        ("train.batch_tokens=512", ""), ("train.clip=2.0", ""), ("run.seed=1", ""), ("precision.params=bf16", ""),
        ("schedule.kind=linear", ""), ("run.deterministic=false", ""), ("data.stages=[{seq_len=32}]", "data.stages"),
    )
] + [
    Case(("train", "tiny.toml", "optim.lr=1", "--allow-change", "optim.lrr"), ("--allow-change", "optim.lrr"), has_run=True),
    Case(("train", "tiny.toml", "optim.lr=1", "--allow-change", "optim.eps"), ("optim.lr: runs/run was",), has_run=True),
    Case(("train", "tiny.toml", "--allow-change", "model.d_model", "model.d_model=16", "train.steps=4"),
         ("step-00000002", "must hold the tensors that are asked for", "shape"), has_run=True),
    Case(("train", "tiny.toml", "--allow-change", "run.seed", "run.seed=1", "train.steps=4"), ("run.seed",), has_run=True),
    resume(words=("step-00000002", "must hold the tensors", "shape"), prepare=other_model),
    command("eval", "runs/run", words=("step-00000002", "must hold the tensors", "shape"), prepare=other_model),
    command("generate", "runs/run", "--prompt", "A", words=("step-00000002", "must hold the tensors"), prepare=other_model),
]  # fmt: skip

DIRECTORIES = [
    resume(words=("runs/run/config.toml:1", "not valid TOML"), prepare=config_line("run]")),
    resume(words=("zzz: unknown section", "runs/run/config.toml:1"), prepare=config_line("zzz = 1")),
    resume(words=("runs/run/config.toml", "UTF-8"), prepare=edit(RUN / "config.toml", lambda text: b"\xff" + text)),
    resume(words=("runs/run", "config.toml", "there is none"), prepare=lambda: (RUN / "config.toml").unlink()),
    resume(words="runs/run/config.toml", prepare=folder_in_place_of(RUN / "config.toml")),
    resume(words="runs/run/environment.json", prepare=folder_in_place_of(RUN / "environment.json")),
    resume(words="runs/run/metrics.jsonl", prepare=folder_in_place_of(RUN / "metrics.jsonl")),
    resume(words="runs/run/ckpt", prepare=in_place_of(RUN / "ckpt")),
    resume(words="runs/run/heartbeat", prepare=in_place_of(RUN / "heartbeat")),
    resume(words="runs/run/stacks", prepare=in_place_of(RUN / "stacks")),
    resume("log.samples=true", words="runs/run/samples", prepare=in_place_of(RUN / "samples")),
    resume("log.tensorboard=true", words="runs/run/tensorboard", prepare=in_place_of(RUN / "tensorboard")),
    train(words=("run.dir", "runs/run"), prepare=in_place_of(RUN)),
    train("run.dir=genome.fa/run", words=("run.dir", "genome.fa")),
    train("run.dir=/proc/none/run", words=("run.dir", "/proc/none"), packs=True),
    train("run.dir=new/" + "x" * 300, words=("run.dir", "xxx")),
    train('run.dir="a\\u0000b"', words="run.dir"),
    train('data.cache="a\\u0000b"', words="data.cache"),
    train('data.fasta="a\\u0000b"', words="data.fasta"),
]  # fmt: skip

TARGETS = [
    command(*words, target, words=(target, "must be a run's directory"))
    for target in ("runs/none", "genome.fa", "runs", "runs/run/ckpt/step-00000009")
    for words in (("eval",), ("generate", "--prompt", "A"), ("ckpt", "ls"), ("ckpt", "verify"))
] + [
    command("ckpt", "diff", "runs/run", "runs/none", words=("runs/none", "must be a run's directory")),
    command("ckpt", "consolidate", "runs/none", "a.pt", words=("runs/none", "must be a run's directory")),
    command("ckpt", "export", "runs/none", "out", "--format", "hyenadna", words=("runs/none", "must be a run's directory")),
    command("ckpt", "ls", str(TWO), words=(str(TWO), "it is a checkpoint. Give runs/run")),
    command("ckpt", "import", "runs/none", "new", words="runs/none: must be a folder"),
    command("ckpt", "import", "runs/none", "runs/run", words="runs/run: exists"),
    command("ckpt", "export", "runs/run", "out", "--format", "onnx", words=("format", "'onnx'")),
    command("ckpt", "consolidate", "runs/run", "a.bin", words=("a.bin", "must end in .safetensors or .pt")),
    command("ckpt", "consolidate", "runs/run", "tiny.toml", words=("tiny.toml", "must end in")),
    command("ckpt", "consolidate", "runs/run", "a.pt", words="a.pt: exists", prepare=files(a__pt="")),
    command("ckpt", "consolidate", "runs/run", "a.pt", "--ema", words="holds no averaged weights"),
    command("ckpt", "consolidate", "runs/run", "genome.fa/a.pt", words=("genome.fa/a.pt: cannot be written",)),
    command("eval", str(TWO), words=(str(TWO), "__0_0.distcp does not have the contents"), prepare=damage_all),
    command("eval", "runs/run", words="no checkpoint is whole", prepare=damage_all),
    command("generate", str(ONE), "--prompt", "A", words=(str(ONE), "__0_0.distcp does not"), prepare=damage_all),
    command("ckpt", "diff", str(ONE), str(TWO), words="__0_0.distcp does not", prepare=damage_all),
    command("ckpt", "consolidate", "runs/run", "a.pt", words="no checkpoint is whole", prepare=damage_all),
    command("ckpt", "export", str(TWO), "out", "--format", "hyenadna", words="__0_0.distcp does not", prepare=damage_all),
    command("ckpt", "verify", "runs/run", words="it has none yet", prepare=lambda: shutil.rmtree(RUN / "ckpt")),
    command("eval", "runs/run", words="it has none yet", prepare=lambda: shutil.rmtree(RUN / "ckpt")),
    command("eval", "runs/run", words=("data.fasta: no such file", "genome.fa"), prepare=lambda: Path("genome.fa").unlink()),
    command("eval", "runs/run", words=("runs/run/config.toml:1", "not valid TOML"), prepare=config_line("]")),
    command("eval", str(TWO), words=("runs/run", "config.toml"), prepare=lambda: (RUN / "config.toml").unlink()),
    command("eval", "runs/run", "eval.window=3", words="eval.window: unknown key; did you mean 'eval.windows'"),
    command("eval", "runs/run", "data.seq_len=65", "train.batch_tokens=65", words=("data.seq_len = 65", "model.max_len")),
]  # fmt: skip


def generate(*options: str, words: str | tuple[str, ...]) -> Case:
    return command("generate", "runs/run", "--prompt", "ACGT", *options, words=words)


GENERATE = [
    generate("--temperature", "-1", words=("temperature", "got -1")),
    generate("--temperature", "nan", words=("temperature", "got nan")),
    generate("--top-k", "0", words=("top_k", "got 0")),
    generate("--top-p", "1.5", words=("top_p", "got 1.5")),
    generate("-n", "-1", words="--tokens: must be at least 0; got -1"),
    generate("--ema", words=("runs/run", "averaged weights")),
    generate("--distill", "few", words="--distill: must be a number of modes"),
    generate("--distill", "auto:x", words="--distill: must be a number of modes"),
    generate("--distill", "0", words=("0",)),
    generate("optim.lrr=1", words="optim.lrr: unknown key"),
    command("generate", "runs/run", "--prompt", "AC T", words=("prompt", "' '")),
    command("generate", "runs/run", "--prompt", "", words="prompt"),
    command("generate", "runs/run", "--prompt", "MKVL", words=("prompt", "'M'")),
]

FLAGS = [
    Case(("train",), ("CONFIG",)),
    Case(("train", "tiny.toml", "--max-restarts", "-1"), ("--max-restarts", "'-1'")),
    Case(("train", "tiny.toml", "--max-restart5=1"), ("unrecognized arguments", "--max-restart5")),
    Case(("eval",), ("RUN|CHECKPOINT",)),
    Case(("generate", "runs/run"), ("--prompt",)),
    Case(("generate", "runs/run", "--prompt", "A", "-n", "many"), ("-n", "'many'")),
    Case(("ckpt",), ("COMMAND",)),
    Case(("ckpt", "merge"), ("'merge'",)),
    Case(("ckpt", "ls", "runs/run", "extra"), ("unrecognized arguments: extra",)),
    Case(("ckpt", "export", "runs/run", "out"), ("--format",)),
    Case(("trian", "tiny.toml"), ("'trian'",)),
    Case((), ("COMMAND",)),
]

RUNS = [*DAMAGED, *CHANGED, *DIRECTORIES, *TARGETS, *GENERATE]
