"""What the mixers of a model send to split a window over ranks: bytes of one rank, as the ledger counts them.

A mixer is a row of twins (parallel.api); each twin's bytes are those of `parallel.cost`, `conv_cost` and `attention_cost`, from
the layout alone. Tests compare every mixer with what its ledger says, forward and backward, on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, singledispatch
from typing import Literal

from seqengine.mixers.attention import Attention
from seqengine.mixers.gated_delta import GatedDelta
from seqengine.mixers.gla import Gla
from seqengine.mixers.h3 import H3
from seqengine.mixers.heads import HeadInputs
from seqengine.mixers.hyena import Hyena
from seqengine.mixers.hyena_li import HyenaLI
from seqengine.mixers.hyena_mr import HyenaMR
from seqengine.mixers.hyena_se import HyenaSE
from seqengine.mixers.linear_attention import LinearAttention
from seqengine.mixers.mixer import Mixer
from seqengine.mixers.retention import Retention
from seqengine.mixers.s4_layer import FilterLayer
from seqengine.mixers.s4d import DiagonalLayer
from seqengine.mixers.slstm import SLstm
from seqengine.mixers.ssd import Ssd
from seqengine.mixers.two_sided import taps_to_sides
from seqengine.parallel import attention_cost, conv_cost, cost
from seqengine.parallel.attention_plan import Mask
from seqengine.parallel.layout import offsets, split_sizes

COMPARED = 16
"""Of attention over more ranks the algorithm is taken by rule: to compare the bytes of all ranks takes P^2 steps."""
Exchange = Literal["halo", "scan", "transpose", "ring", "pipeline"]


@dataclass(frozen=True)
class Sent:
    """Of one twin: bytes that leave a rank, and messages that wait for each other, which is what latency counts."""

    exchange: Exchange
    forward: int
    backward: int
    rounds: int
    to_all: bool = False
    """To every rank of the sequence alike, not to a neighbour."""


@dataclass(frozen=True)
class Split:
    """A window of `tokens` over `ranks`, seen from one of them, and the numbers that are sent."""

    tokens: int
    ranks: int
    rank: int
    rows: int
    width: int
    """Bytes of an activation: 2 with precision.params = 'bf16'."""
    exact: int
    """Bytes of a state: 4, or 8 with 'fp64'."""
    device: str

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        return offsets(split_sizes(self.tokens, self.ranks))

    @property
    def mean_tokens(self) -> int:
        return self.tokens // self.ranks

    @property
    def unprojected(self) -> "Split":
        """Where a twin gets the residual stream itself, which autocast leaves as it is."""
        return replace(self, width=self.exact)


def short_conv(at: Split, channels: int, taps: int) -> Sent:
    """The last taps - 1 inputs of the ranks before."""
    where = (at.bounds, at.rank, taps - 1, at.rows * channels * at.width)
    return Sent("halo", cost.halo_bytes(*where), cost.halo_backward_bytes(*where), 1)


def long_conv(at: Split, channels: int, taps: int | None, filters: int = 0) -> Sent:
    """taps: of a filter that every rank holds, `filters` of them; None: of one that is made where it is used."""
    if taps is None:
        algorithm = "transpose"
    else:
        size = (channels, at.rows, at.width, at.device)
        algorithm = conv_cost.long_conv_algorithm(at.bounds, taps, *size)
    if algorithm == "halo" and taps is not None:
        return short_conv(at, channels, taps)
    if algorithm == "fft" and taps is not None:
        layout, real = conv_cost.FourStep.of(at.bounds, taps, False), max(4, at.exact)
        shape = (at.rank, at.rows * channels, filters, at.width, real)
        return Sent("transpose", layout.sent_bytes(*shape), layout.sent_bytes(*shape, backward=True), 5, to_all=True)
    return _transposed(at, channels)


def _transposed(at: Split, channels: int) -> Sent:
    sent = conv_cost.long_conv_bytes(at.bounds, at.rank, channels, at.rows * at.width)
    return Sent("transpose", sent, sent, 2, to_all=True)


def two_sided_conv(at: Split, channels: int, most: int) -> Sent:
    """Filters of up to `most` taps to each side, which every rank makes."""
    before, ahead = taps_to_sides(at.tokens, most)
    left, right = before - 1, ahead
    if conv_cost.long_conv_algorithm(at.bounds, left + right + 1) == "halo":
        needed, row = conv_cost.windows(at.bounds, left, right), at.rows * channels * at.width
        forward = conv_cost.window_bytes(at.bounds, needed, at.rank, row)
        return Sent("halo", forward, conv_cost.window_backward_bytes(at.bounds, needed, at.rank, row), 1)
    return _transposed(at, channels)


def scan(at: Split, heads: int, state: int, transition: int, shard: int, *, weighs_both: bool = False) -> Sent:
    """state, transition: bytes of one head (or channel) of all rows; shard: of the tokens' values, which decide on groups."""
    both = heads * (state + transition if weighs_both else state)
    groups = max(1, min(cost.modal_conv_groups(at.ranks, both, shard, at.device), heads))
    forward = backward = rounds = 0
    gathers = False
    for part in split_sizes(heads, groups):
        size = (part * state, part * transition)
        algorithm = cost.scan_algorithm(at.ranks, *size)
        forward += cost.scan_bytes(at.ranks, at.rank, algorithm, *size)
        backward += cost.scan_backward_bytes(at.ranks, at.rank, algorithm, *size)
        depth = (at.ranks - 1).bit_length()
        rounds += {"gather": depth, "log": 1 + depth, "serial": at.ranks - 1}[algorithm]
        gathers = gathers or algorithm == "gather"
    return Sent("scan", forward, backward, rounds, to_all=gathers)


def modal_conv(at: Split, samples: int, channels: int, modes: int, *, is_complex: bool) -> Sent:
    """samples: of all rows, one state of `modes` numbers for each channel."""
    state = samples * modes * at.exact * (2 if is_complex else 1)
    return scan(at, channels, state, 0, samples * channels * at.width * at.mean_tokens)


def gla(at: Split, heads: int, K: int, V: int, transition: int, value_width: int) -> Sent:
    """transition: numbers of a head's decay that are sent: K, 1, or none where decays are constants."""
    state, shard = at.rows * K * V * at.exact, at.rows * heads * V * at.mean_tokens * value_width
    return scan(at, heads, state, at.rows * transition * at.exact, shard)


def delta_rule(at: Split, heads: int, K: int, V: int) -> Sent:
    """The transition is a K x K matrix of each head."""
    state, transition = at.rows * K * V * at.exact, at.rows * K * K * at.exact
    return scan(at, heads, state, transition, at.rows * heads * V * at.mean_tokens * at.width, weighs_both=True)


def pipeline(at: Split, state: int) -> Sent:
    """A recurrence: its state goes from rank to rank, which wait for each other."""
    forward = cost.pipeline_bytes(at.bounds, at.rank, state)
    return Sent("pipeline", forward, cost.pipeline_backward_bytes(at.bounds, at.rank, state), at.ranks - 1)


def attention(at: Split, heads: int, groups: int, K: int, causal: bool, window: int | None) -> Sent:
    """By ring, transpose (ulysses), or neighbours (gather), as the twin chooses."""
    mask = Mask(causal, window, (0, at.tokens))
    sizes = attention_cost.Sizes(at.rows, heads, groups, K, K, at.width, at.exact)
    algorithm = "auto" if at.ranks <= COMPARED or window is not None else _likely(at.ranks, heads, groups)
    how = attention_cost.choose(at.bounds, at.rank, mask, sizes, at.device, algorithm, None, None)
    forward = attention_cost.attention_bytes(how, sizes)
    backward = attention_cost.attention_backward_bytes(how, sizes)
    if how.gathered:
        return Sent("halo", forward, backward, 1)
    if how.route.size == 1:
        return Sent("transpose", forward, backward, 2, to_all=True)
    return Sent("ring", forward, backward, how.route.size - 1)


def _likely(ranks: int, heads: int, groups: int) -> str:
    """What sends the fewest bytes as a rule, without a look at the bytes of every rank."""
    if attention_cost.shares_heads(ranks, heads, groups):
        return "ulysses"
    return "ring_ulysses" if 1 < attention_cost.widest_head_ranks(ranks, heads, groups) < ranks else "ring"


@singledispatch
def exchanges(mixer: Mixer, at: Split) -> Sequence[Sent]:
    """What a mixer's twins send, in the order of their forward; nothing on one rank."""
    raise NotImplementedError(f"exchanges: no formula for {type(mixer).__name__}")


def _inputs(inputs: HeadInputs, at: Split) -> list[Sent]:
    return [short_conv(at, sum(inputs.widths), inputs.taps)] if inputs.taps else []


@exchanges.register
def _(mixer: Hyena, at: Split) -> Sequence[Sent]:
    width, taps = mixer.short_filter_weight.shape
    if mixer.causal:
        long = long_conv(at, mixer.d_model, None)
    else:
        long = two_sided_conv(at, mixer.d_model, at.tokens)
    return [short_conv(at, width, taps), *[long] * (mixer.order - 1)]


@exchanges.register(HyenaSE)
@exchanges.register(HyenaMR)
def _(mixer: HyenaSE | HyenaMR, at: Split) -> Sequence[Sent]:
    width, taps = mixer.short_weight.shape
    filters, reach = mixer.filter.shape
    return [short_conv(at, width, taps), long_conv(at, width // 3, reach, filters)]


@exchanges.register
def _(mixer: HyenaLI, at: Split) -> Sequence[Sent]:
    width, taps = mixer.short_weight.shape
    channels, modes = mixer.residues.shape
    return [short_conv(at, width, taps), modal_conv(at, at.rows, channels, modes, is_complex=False)]


@exchanges.register
def _(mixer: H3, at: Split) -> Sequence[Sent]:
    channels, taps = mixer.shift.C.shape
    samples, modes = at.rows * mixer.head_dim**2, mixer.ssm.C.shape[-2]
    memory = modal_conv(at, samples, mixer.heads, modes, is_complex=True)
    return [long_conv(at, channels, taps, channels), memory]


@exchanges.register
def _(mixer: FilterLayer, at: Split) -> Sequence[Sent]:
    if mixer.causal:
        return [long_conv(at.unprojected, mixer.d_model, None)]
    return [two_sided_conv(at.unprojected, mixer.d_model, mixer.max_len)]


@exchanges.register
def _(mixer: DiagonalLayer, at: Split) -> Sequence[Sent]:
    channels, modes = mixer.skip.shape[0], mixer.ssm.C.shape[-2]
    if mixer.causal:
        return [modal_conv(at.unprojected, at.rows, channels, modes, is_complex=True)]
    return [two_sided_conv(at.unprojected, channels, at.tokens)]


@exchanges.register
def _(mixer: Gla, at: Split) -> Sequence[Sent]:
    heads = mixer.config.num_heads
    K, V = mixer.inputs.widths[0] // heads, mixer.inputs.widths[2] // mixer.kv_heads
    return [*_inputs(mixer.inputs, at), gla(at, heads, K, V, K, at.width)]


@exchanges.register
def _(mixer: LinearAttention, at: Split) -> Sequence[Sent]:
    heads, normalize = mixer.config.num_heads, mixer.config.normalize
    K, V = mixer.inputs.widths[0] // heads, mixer.inputs.widths[2] // heads
    return [gla(at, heads, K, V + normalize, 0, at.exact if normalize else at.width)]


@exchanges.register
def _(mixer: Retention, at: Split) -> Sequence[Sent]:
    heads = mixer.num_heads
    return [gla(at, heads, mixer.inputs.widths[0] // heads, mixer.inputs.widths[2] // heads, 0, at.width)]


@exchanges.register
def _(mixer: Ssd, at: Split) -> Sequence[Sent]:
    inner, states, _ = mixer.inputs.widths
    heads = mixer.heads
    return [*_inputs(mixer.inputs, at), gla(at, heads, states // mixer.groups, inner // heads, 1, at.width)]


@exchanges.register
def _(mixer: GatedDelta, at: Split) -> Sequence[Sent]:
    heads = mixer.config.num_heads
    K, V = mixer.inputs.widths[0] // heads, mixer.inputs.widths[2] // heads
    return [*_inputs(mixer.inputs, at), delta_rule(at, heads, K, V)]


@exchanges.register
def _(mixer: SLstm, at: Split) -> Sequence[Sent]:
    channels = mixer.norm_weight.numel()
    short = [] if mixer.short_weight is None else [short_conv(at.unprojected, channels, mixer.short_weight.shape[1])]
    return [*short, pipeline(at, 4 * at.rows * channels * at.exact)]


@exchanges.register
def _(mixer: Attention, at: Split) -> Sequence[Sent]:
    return [attention(at, mixer.heads, mixer.kv_heads, mixer.head_dim, mixer.causal, mixer.window)]
