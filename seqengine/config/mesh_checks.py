"""What must hold between lengths of windows, tokens of a step, and the mesh of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from seqengine.config.data import DataSection
from seqengine.config.engine import ActivationSection, ParallelSection, PrecisionSection
from seqengine.config.model import ModelConfig
from seqengine.config.optim import OptimSection
from seqengine.config.sections import TrainSection


@dataclass(frozen=True)
class Problem:
    """A combination that cannot work: the dotted keys that take part, and what must hold, what was got, what to do."""

    keys: tuple[str, ...]
    text: str


class Length(NamedTuple):
    """Windows of one stage, or of the whole run, and the keys that set them."""

    seq_len: int
    sequence: int
    micro_batch: int | Literal["auto"]
    key: str
    sequence_key: str = "parallel.sequence"
    micro_batch_key: str = "train.micro_batch"


def lengths(train: TrainSection, data: DataSection, parallel: ParallelSection) -> list[Length]:
    """Every length of window that a run trains on."""
    if not data.stages:
        return [Length(data.seq_len, parallel.sequence, train.micro_batch, "data.seq_len")]
    found = []
    for i, stage in enumerate(data.stages):
        place = f"data.stages[{i}]"
        found.append(
            Length(
                stage.seq_len,
                stage.sequence or parallel.sequence,
                stage.micro_batch or train.micro_batch,
                f"{place}.seq_len",
                f"{place}.sequence" if stage.sequence else "parallel.sequence",
                f"{place}.micro_batch" if stage.micro_batch else "train.micro_batch",
            )
        )
    return found


def whole_windows(train: TrainSection, data: DataSection, parallel: ParallelSection) -> Iterator[Problem]:
    batch = train.batch_tokens
    for length in lengths(train, data, parallel):
        if batch % length.seq_len:
            near = max(length.seq_len, batch // length.seq_len * length.seq_len)
            yield Problem(
                ("train.batch_tokens", length.key),
                f"train.batch_tokens = {batch} must be a multiple of {length.key} = {length.seq_len} (whole windows); "
                f"set train.batch_tokens = {near} or {near + length.seq_len}",
            )


def even_split(train: TrainSection, data: DataSection, parallel: ParallelSection) -> Iterator[Problem]:
    """With replicate = "auto" the share of a replica is not known yet, but the micro-batch must divide the whole anyway."""
    known = [n for n in (parallel.replicate, parallel.shard) if n != "auto"]
    replicas = known[0] * (known[1] if len(known) > 1 else 1) if known else 1
    product = "parallel.replicate" if parallel.shard in ("auto", 1) else "parallel.replicate x parallel.shard"
    for length in lengths(train, data, parallel):
        windows, remainder = divmod(train.batch_tokens, length.seq_len)
        if remainder:
            continue
        keys: tuple[str, ...] = ("train.batch_tokens", length.key)
        step = (
            f"train.batch_tokens / {length.key} = {train.batch_tokens} / {length.seq_len} = {windows} windows per step"
        )
        share = replicas if length.sequence_key == "parallel.sequence" else 1
        if windows % share:
            yield Problem(
                (*keys, "parallel.replicate"),
                f"{step} must be divisible by {product} = {share}; change {product} to a divisor of "
                f"{windows}, or train.batch_tokens to a multiple of {share * length.seq_len}",
            )
        elif length.micro_batch != "auto" and (windows // share) % length.micro_batch:
            each = f"{step}, {windows // share} per replica," if share > 1 else step
            yield Problem(
                (*keys, "parallel.replicate", length.micro_batch_key),
                f"{each} must be divisible by {length.micro_batch_key} = {length.micro_batch}; set "
                f"{length.micro_batch_key} to a divisor of {windows // share}, or leave it 'auto'",
            )


def ranks_have_tokens(train: TrainSection, data: DataSection, parallel: ParallelSection) -> Iterator[Problem]:
    for length in lengths(train, data, parallel):
        if length.sequence > length.seq_len:
            yield Problem(
                (length.sequence_key, length.key),
                f"{length.sequence_key} = {length.sequence} splits a window over more ranks than tokens: {length.key} = "
                f"{length.seq_len}; set {length.sequence_key} to at most {length.seq_len}",
            )


def window_fits_model(
    train: TrainSection, data: DataSection, parallel: ParallelSection, model: ModelConfig
) -> Iterator[Problem]:
    for length in lengths(train, data, parallel):
        if length.seq_len > model.max_len:
            yield Problem(
                (length.key, "model.max_len"),
                f"{length.key} = {length.seq_len} must be at most model.max_len = {model.max_len}; shorten {length.key}, or "
                f"set model.max_len = {length.seq_len} (a new model: its filters are functions of max_len)",
            )


def stages_reach_the_end(train: TrainSection, data: DataSection) -> Iterator[Problem]:
    if not data.stages:
        return
    last = len(data.stages) - 1
    if data.stages[last].seq_len != data.seq_len:
        key = f"data.stages[{last}].seq_len"
        yield Problem(
            ("data.seq_len", key),
            f"data.seq_len = {data.seq_len} must be {key} = {data.stages[last].seq_len}, the length of the last stage, at "
            f"which the run is evaluated; set data.seq_len = {data.stages[last].seq_len}",
        )
    total = train.tokens if train.steps is None else train.steps * train.batch_tokens
    before = sum(stage.tokens or 0 for stage in data.stages[:-1])
    if total is not None and before >= total:
        yield Problem(
            ("data.stages", "train.tokens", "train.steps"),
            f"data.stages: the stages before the last have {before} tokens, which must be less than the {total} of the run; "
            "shorten them, or train longer",
        )


def backend_fits(
    parallel: ParallelSection, precision: PrecisionSection, optim: OptimSection, activation: ActivationSection
) -> Iterator[Problem]:
    backend = parallel.backend
    if backend == "deepspeed" and parallel.zero is None:
        text = "parallel.backend = 'deepspeed' needs parallel.zero, what is cut over ranks; set it to 1, 2 or 3"
        yield Problem(("parallel.backend", "parallel.zero"), text)
    if backend != "deepspeed" and parallel.zero is not None:
        text = f"parallel.zero = {parallel.zero} is of DeepSpeed, got parallel.backend = '{backend}'; "
        yield Problem(("parallel.zero", "parallel.backend"), text + "delete it, or set parallel.backend = 'deepspeed'")
    if not parallel.is_sharded and parallel.shard not in ("auto", 1):
        text = (
            f"parallel.shard = {parallel.shard} needs a backend that cuts weights, got parallel.backend = '{backend}'; "
        )
        yield Problem(
            ("parallel.shard", "parallel.backend"), text + "set parallel.backend = 'fsdp2', or leave shard out"
        )
    if activation.offload and activation.checkpoint != "block":
        text = f"activation.offload needs activation.checkpoint = 'block', got '{activation.checkpoint}'; set it"
        yield Problem(("activation.offload", "activation.checkpoint"), text)
    if backend == "deepspeed":
        yield from _zero_fits(parallel, precision, optim)


def _zero_fits(parallel: ParallelSection, precision: PrecisionSection, optim: OptimSection) -> Iterator[Problem]:
    instead = "set parallel.backend = 'fsdp2'"
    if parallel.replicate not in ("auto", 1):
        text = f"parallel.replicate = {parallel.replicate}: ZeRO cuts one copy over all ranks; leave it 'auto', or {instead}"
        yield Problem(("parallel.replicate", "parallel.backend"), text)
    if precision.params == "fp64":
        text = "precision.params = 'fp64': DeepSpeed has no float64; take 'fp32' or 'bf16', or " + instead
        yield Problem(("precision.params", "parallel.backend"), text)
    if optim.name != "adamw":
        text = f"optim.name = '{optim.name}' needs whole matrices, which ZeRO cuts; take 'adamw', or {instead}"
        yield Problem(("optim.name", "parallel.backend"), text)
    if optim.ema and parallel.zero == 3:
        text = f"optim.ema = {optim.ema:g} needs whole weights, which parallel.zero = 3 cuts; take zero = 1 or 2, or {instead}"
        yield Problem(("optim.ema", "parallel.zero"), text)
