"""One optimiser step on one mesh: bytes, memory, and time by an alpha-beta model.

    step = arithmetic + memory traffic + what of the exchanges nothing hides

arithmetic:     the model's FLOPs on a rank, forward, backward and what is made again, over the assumed share of the peak.
memory traffic: TOUCHED bytes for each byte that the forward would keep (written, read on, read in the backward, and its
                gradient's three), FFT_BYTES a token and channel of long convolutions, the optimiser's seven numbers a weight.
exchanges:      messages that wait for each other times the latency (alpha), and bytes over the rate of their link (beta).
                Those of sequences are added whole; those of weights and gradients as far as the compute does not hide them.
recurrence:     an sLSTM takes its tokens one after another, over all ranks.
"""

from dataclasses import dataclass

from seqengine.config.run import RunConfig
from seqengine.launch.planning.exchanges import Sent, Split, exchanges
from seqengine.launch.planning.flops import Flops, count_flops
from seqengine.launch.planning.memory import Activations, RankMemory, Sizes, Timeline, count_sizes, rank_memory
from seqengine.launch.planning.rates import Machine
from seqengine.launch.planning.traffic import Flow, Layout, data_flows, sequence_flows
from seqengine.model import LanguageModel
from seqengine.parallel.conv_cost import FFT_BYTES
from seqengine.parallel.cost import RNN_TOKEN_SECONDS
from seqengine.stages import Stage

TOUCHED = 6
OPTIMIZER_NUMBERS = 7
"""Read: weight, gradient, two moments; written: weight and moments."""


@dataclass(frozen=True)
class StageStep:
    """A step of one stage on one mesh."""

    stage: Stage
    rows: int
    """Windows of a micro-batch."""
    micro_batches: int
    memory: RankMemory
    flows: tuple[Flow, ...]
    parts: dict[str, float]
    """Seconds by what they go to; they add up to the step."""
    mfu: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def bottleneck(self) -> str:
        """What takes most of the step."""
        return max(self.parts, key=lambda name: self.parts[name])


class Planner:
    """What of a run does not depend on its mesh, and steps on any mesh."""

    def __init__(self, config: RunConfig, model: LanguageModel, machine: Machine, *, exact: bool = True) -> None:
        """model: on the meta device. exact: trace micro-batches of any size."""
        self.config, self.model, self.machine = config, model, machine
        self.sizes: Sizes = count_sizes(config, model)
        self.activations = Activations(config, machine.device, exact=exact)
        self._flops: dict[int, Flops] = {}
        self._sent: dict[tuple[int, int, int], list[Sent]] = {}
        self._timelines: dict[tuple[int, int, int, str], Timeline] = {}

    def flops(self, tokens: int) -> Flops:
        """For windows of `tokens`."""
        if tokens not in self._flops:
            self._flops[tokens] = count_flops(self.model, tokens)
        return self._flops[tokens]

    def sent(self, tokens: int, ranks: int, rows: int) -> list[Sent]:
        """What the mixers send in one micro-batch, on a rank in the middle."""
        key = (tokens, ranks, rows)
        if ranks == 1:
            return []
        if key not in self._sent:
            at = split_of(self.config, tokens, ranks, ranks // 2, rows, self.machine.device)
            by_kind: dict[str, list[Sent]] = {}
            for name, block in zip(self.config.model.mixer_names, self.model.each_block(), strict=True):
                if name not in by_kind:
                    by_kind[name] = list(exchanges(block.mixer, at))
            self._sent[key] = [sent for name in self.config.model.mixer_names for sent in by_kind[name]]
        return self._sent[key]

    def timeline(self, rows: int, tokens: int, layout: Layout) -> Timeline:
        key = (rows, tokens, layout.sequence, layout.checkpoint)
        if key not in self._timelines:
            self._timelines[key] = self.activations.timeline(rows, tokens, layout)
        return self._timelines[key]

    def step(self, stage: Stage, layout: Layout, rows: int) -> StageStep:
        """layout.sequence is the stage's. rows divides the windows of a group of ranks."""
        micro_batches = stage.windows_per_step // layout.groups // rows
        needs = self.timeline(rows, stage.seq_len, layout)
        sent = self.sent(stage.seq_len, layout.sequence, rows)
        flows = [
            *sequence_flows(sent, layout, micro_batches, self.machine),
            *data_flows(self.sizes.weights, layout, micro_batches, self.machine),
        ]
        parts = self._compute(stage, layout, rows, micro_batches, needs)
        compute = sum(parts.values())
        parts |= {flow.exchange: flow.seconds for flow in flows if not flow.hides}
        hidden = sum(flow.seconds for flow in flows if flow.hides)
        if hidden > compute:
            name = max((flow for flow in flows if flow.hides), key=lambda flow: flow.seconds).exchange
            parts[name] = parts.get(name, 0.0) + hidden - compute
        done = self.flops(stage.seq_len).total * stage.windows_per_step * stage.seq_len
        peak = layout.ranks * self.machine.flops_per_second(self.config.precision.params)
        return StageStep(
            stage=stage,
            rows=rows,
            micro_batches=micro_batches,
            memory=rank_memory(self.config, self.sizes, layout, needs, micro_batches),
            flows=tuple(flows),
            parts=parts,
            mfu=done / sum(parts.values()) / peak,
        )

    def _compute(
        self, stage: Stage, layout: Layout, rows: int, micro_batches: int, needs: Timeline
    ) -> dict[str, float]:
        """Seconds of what a rank does by itself."""
        machine, flops = self.machine, self.flops(stage.seq_len)
        tokens = stage.windows_per_step * stage.seq_len / layout.ranks
        again = {"none": 0.0, "selective": flops.mlp, "block": flops.forward - flops.head}[layout.checkpoint]
        rate = machine.flops_per_second(self.config.precision.params) * machine.achieved
        exact_rate = min(machine.fp32, machine.flops_per_second(self.config.precision.params)) * machine.achieved
        passes = 3 + (layout.checkpoint == "block")  # the backward of a product is two
        a_tap = flops.filters + flops.filter_outputs / layout.sequence
        made = a_tap * min(stage.seq_len, self.config.model.l_max) * passes * micro_batches
        moved = needs.kept_without * TOUCHED * micro_batches
        if layout.checkpoint == "block":
            moved += needs.kept_without * TOUCHED // 3 * micro_batches
        cut = max(1.0 / layout.sequence, 1.0 / max(1, flops.transformed))
        moved += int(FFT_BYTES * passes * flops.transformed * cut * rows * stage.seq_len * micro_batches)
        held = self.sizes.weights.total // (layout.part if layout.backend in ("fsdp2", "deepspeed") else 1)
        moved += OPTIMIZER_NUMBERS * held
        found = {
            "arithmetic": tokens * (flops.total + again) / rate,
            "filters": made / exact_rate,
            "memory traffic": moved / (machine.bytes_per_second * machine.memory_achieved),
        }
        layers = self.config.model.mixer_names.count("slstm")
        if layers:
            found["recurrence"] = layers * stage.seq_len * RNN_TOKEN_SECONDS * passes * micro_batches
        return {name: seconds for name, seconds in found.items() if seconds > 0}


def split_of(config: RunConfig, tokens: int, ranks: int, rank: int, rows: int, device: str) -> Split:
    """A window over ranks, in the run's arithmetic."""
    width = {"fp64": 8, "fp32": 4, "bf16": 2}[config.precision.params]
    return Split(tokens, ranks, rank, rows, width, max(4, width), device)
