"""`seqengine ckpt import` and `export`: published weights to a run's directory, and back."""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from seqengine.check import check_run
from seqengine.checkpoint.restore import restore_model
from seqengine.checkpoint.state import Progress, Record, model_tensors, optimizer_tensors, rng_tensors
from seqengine.checkpoint.store import CheckpointError, CheckpointStore
from seqengine.config.data import DataSection
from seqengine.config.engine import PrecisionSection
from seqengine.config.load import Loaded, load
from seqengine.config.run import RunConfig
from seqengine.config.sections import RunSection, TrainSection
from seqengine.config.write import changed, dump
from seqengine.data.stream import StreamState
from seqengine.errors import FAILED, InputError
from seqengine.interop import formats
from seqengine.interop.files import check_target
from seqengine.model import LanguageModel, build_model
from seqengine.optim import build_optimizer
from seqengine.parallel.mesh import Mesh
from seqengine.rundir import CheckpointTarget, RunDirectory, mesh_record, versions

STEPS, WINDOWS, SEQ_LEN = 1000, 16, 1024
"""Of an imported run whose settings say nothing else: steps, windows a step, and most tokens of a window."""
CHOSEN = ("run.name", "run.dir", "data.seq_len", "train.steps", "train.batch_tokens", "precision.params")
"""Settings of the run that an import makes for these weights."""
MAY_DIFFER = ("model.embed_dropout", "model.resid_dropout", "model.filter.shift")
"""Settings of a model that do not follow from its weights."""


def export_weights(source: Path, folder: Path, name: str, *, replace: bool) -> int:
    """RUN|CHECKPOINT -> FOLDER; returns the exit code. Raises InputError."""
    form = formats.find_format(name)
    target = CheckpointTarget.find(source)
    config = target.run.read_config(need_data=False).config
    check_target(folder, replace=replace)
    try:
        model, found = restore_model(target, config, Mesh.single(torch.device("cpu")))
    except CheckpointError as error:
        return _failed(error)
    formats.save(model, folder, form.name, replace=replace)
    print(f"exported    {found.directory} (verified), step {found.record.progress.step}, to {folder}")
    return 0


def import_weights(source: Path, run: Path, name: str | None, overrides: Sequence[str]) -> int:
    """FOLDER_OR_FILE -> RUN_DIR with one checkpoint, of step 0; returns the exit code. Raises InputError.

    If it fails, nothing is left behind but what data.cache keeps.
    """
    if run.exists():
        raise InputError(f"{run}: exists; an import makes a new run. Name another directory.")
    model, form = formats.load(source, name)
    loaded = _settings(model, source, run, overrides)
    data = check_run(loaded.config).source
    data_hash = "" if data is None else data.content_hash
    ours, difference = _copy_of(model, loaded.config, source)
    aside = run.absolute().with_name(f".{run.absolute().name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        _write_run(RunDirectory(aside), ours, loaded, data_hash)
        aside.rename(run.absolute())
    except CheckpointError as error:
        return _failed(error)
    except OSError as error:
        raise InputError(f"{run}: cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"imported    {source}: {form.name}, {sum(p.numel() for p in ours.parameters()):,} parameters")
    print(f"run         {run}, at step 0 (verified); published weights have no moments, so AdamW starts anew")
    if difference:
        print(f"filters     positional features are computed; those of the file differ by at most {difference:.1e}")
    if form.name != "hyenadna":
        print(
            "tokens      a run reads DNA by HyenaDNA's ids, A 7 to N 11; weights that learnt others know nothing of them"
        )
    if data is None:
        print("data        none given: train and eval need data.fasta=GENOME.fa")
    return 0


def _failed(error: CheckpointError) -> int:
    print(f"seqengine: {error}", file=sys.stderr)
    return FAILED


def _settings(model: LanguageModel, source: Path, run: Path, overrides: Sequence[str]) -> Loaded:
    """The config of the run: the model of the weights, defaults, and what the user says."""
    before = model.config
    given = {word.partition("=")[0].strip() for word in overrides}
    window = min(SEQ_LEN, before.max_len)
    start = RunConfig.model_construct(
        run=RunSection(name=run.name, dir=str(run)),
        model=before,
        data=DataSection(seq_len=window),
        train=TrainSection(steps=None if "train.tokens" in given else STEPS, batch_tokens=WINDOWS * window),
        precision=PrecisionSection(params="fp64" if model.embedding.weight.dtype == torch.float64 else "fp32"),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "import.toml"
        file.write_text(dump(Loaded(start, {})))
        place = re.compile(rf"{re.escape(str(file))}:\d+")
        try:
            loaded = load(file, overrides, need_data=False)
            if loaded.config.data.fasta is not None or loaded.config.data.bed is not None:
                loaded = load(file, overrides)
        except InputError as error:
            raise InputError(*(place.sub("ckpt import", problem) for problem in error.problems)) from None
    if loaded.config.run_dir != run:
        raise InputError(f"run.dir: must be {run}, the directory of the import; got {loaded.config.run_dir}.")
    problems = [
        f"{key}: must be {old!r}, which the weights have; got {new!r}. Leave it out."
        for key, (old, new) in changed(start, loaded.config).items()
        if key.startswith("model.") and key not in MAY_DIFFER
    ]
    if problems:
        raise InputError(*problems)
    return Loaded(loaded.config, {key: _origin(key, value, str(source)) for key, value in loaded.provenance.items()})


def _origin(key: str, value: str, source: str) -> str:
    """Of a setting of the run, which was read from a file that is no more."""
    if value == "command line":
        return value
    if key.startswith("model."):
        return source
    return "ckpt import" if key in CHOSEN else "default"


def _copy_of(model: LanguageModel, config: RunConfig, source: Path) -> tuple[LanguageModel, float]:
    """The weights in a model as a run makes it, and how far its computed features are from those of the file."""
    ours = build_model(config.model, seed=config.run.seed, params=config.precision.params, device=torch.device("cpu"))
    weights = model.state_dict()
    trained = sorted(weights.keys() - ours.state_dict().keys())
    if trained:
        raise InputError(
            f"{source}: {trained[0]} was trained, and a run computes it; use seqengine.interop.hyenadna.load in Python."
        )
    ours.load_state_dict(weights)
    theirs = dict(model.named_buffers())
    gaps = [float((b.double() - theirs[name].double()).abs().max()) for name, b in ours.named_buffers() if b.numel()]
    return ours, max(gaps, default=0.0)


def _write_run(run: RunDirectory, model: LanguageModel, loaded: Loaded, data_hash: str) -> None:
    """A run's directory with a checkpoint, read back and compared."""
    mesh = Mesh.single(torch.device("cpu"))
    record = Record(
        progress=Progress(),
        stream=StreamState(seed=loaded.config.run.seed, epoch=0, samples=0).to_dict(),
        mesh=mesh_record(mesh, "none"),
        data_hash=data_hash,
        versions=versions(),
    )
    store = CheckpointStore(run.checkpoints, mesh, keep=loaded.config.ckpt.keep)
    torch.manual_seed(loaded.config.run.seed)  # the random state is part of a checkpoint
    tensors = model_tensors(model) | optimizer_tensors(model, build_optimizer(model, loaded.config.optim))
    store.save(tensors | rng_tensors(mesh.rank, mesh.device), record)
    run.write(loaded, data_hash, mesh_record(mesh, "none"))
    back, _ = restore_model(CheckpointTarget(run, None), loaded.config, mesh)
    saved, read = model.state_dict(), back.state_dict()
    wrong = [key for key in saved if not torch.equal(saved[key], read[key])]
    if wrong:
        raise CheckpointError(f"could not read back what was written: {wrong[0]} differs")
