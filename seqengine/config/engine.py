"""[parallel], [precision], [activation], [compile], [comm] and [ckpt]: how a run is spread over a machine, and kept."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, create_model

from seqengine.config.values import Count, Positive, Seconds, Section, Wording, parse_steps_or_seconds


class ParallelSection(Section):
    """[parallel]: the mesh of ranks, replicate x shard x sequence, and who holds which weights."""

    backend: Literal["none", "ddp", "fsdp2", "deepspeed"] = "none"
    """none: every rank holds all weights, gradients are summed after the backward. ddp: torch's DistributedDataParallel, which
    sums them during it. fsdp2: weights, gradients and moments cut over shard x sequence. deepspeed: ZeRO, over all ranks."""
    zero: Literal[1, 2, 3] | None = None
    """With deepspeed: what is cut over ranks. 1: moments; 2: and gradients; 3: and weights."""
    replicate: Positive | Literal["auto"] = "auto"
    """Copies of the weights, each with its own windows; auto = ranks / (shard x sequence), and 1 where shard is auto."""
    shard: Positive | Literal["auto"] = "auto"
    """Groups of `sequence` ranks that share one copy and read different windows; auto = all there are with fsdp2 and deepspeed,
    else 1. With fsdp2, replicate and shard above 1 are HSDP."""
    sequence: Positive = 1
    """Ranks over which each window is split."""

    @property
    def is_sharded(self) -> bool:
        """Ranks hold parts of the weights or of their moments."""
        return self.backend in ("fsdp2", "deepspeed")


class PrecisionSection(Section):
    """[precision]."""

    params: Literal["fp64", "fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; weights are kept in float32 for bf16 (autocast), in float64 for fp64."""


class ActivationSection(Section):
    """[activation]: what the forward pass keeps for the backward."""

    checkpoint: Literal["none", "selective", "block"] = "none"
    """block: each block's input; it runs again in the backward and sends nothing again. selective: all but the insides of MLPs,
    which are most of the memory and little of the time."""
    offload: bool = False
    """With block: what is kept waits in the CPU's memory."""


class CompileSection(Section):
    """[compile]: torch.compile, block by block."""

    enable: bool = False
    """Needs a C++ compiler. A block whose window is split over ranks is compiled between its exchanges."""
    backend: str = "inductor"
    """torch.compile's backend."""


class CommSection(Section):
    """[comm]: how long ranks wait for each other."""

    init_timeout: Annotated[Seconds, Field(gt=0.0)] = 600.0
    """Until all processes have joined, and the longest wait inside one exchange."""
    step_timeout: Annotated[Seconds, Field(ge=0.0)] = 1800.0
    """A rank without progress for this long writes its Python stacks to RUN/stacks and ends the run; 0 = never."""


_Async = create_model(  # `async` is a key, and a word of Python that no class body can define
    "_Async",
    __base__=Section,
    **{
        "async": (
            bool,
            Field(default=False, description="Write while training goes on; weights are copied first. One at a time."),
        )
    },  # type: ignore[call-overload]
)


class CkptSection(_Async):
    """[ckpt]: when to save. A checkpoint is always saved at the end of a run."""

    every: Annotated[
        Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0.0)],
        BeforeValidator(parse_steps_or_seconds),
        Wording("steps or a duration above 0", "500, '1k', '90s' or '30min'"),
    ] = 1800.0
    """Steps (500, '1k') or a duration ('30min', '90s'); a number with a decimal point is seconds."""
    keep: Positive = 3
    """Checkpoints kept; older ones are deleted once a newer one is safe and verified."""
    keep_every: Count | None = Field(default=None, gt=0)
    """Tokens ('1B'): the first checkpoint at or after each multiple is kept for ever."""
    on_signal: tuple[Literal["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"], ...] = (
        "SIGTERM",
        "SIGUSR1",
        "SIGINT",
    )
    """Signals at which all ranks save the same step and end with exit code 75; so does a file `stop` in RUN."""

    @property
    def is_async(self) -> bool:
        """The key `async`."""
        return bool(getattr(self, "async"))
