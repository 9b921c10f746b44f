"""Modal filters over a sequence that is split across ranks: the twin of `seqengine.kernels.api.modal_conv`.

What a rank's T tokens x do to the state is the map s -> lambda^T s + e, e = sum_t lambda^(T-1-t) x[t]. Its decay follows from
the poles and the layout, so that a rank sends e alone, N numbers a channel. First `_LocalState` finds e, at N multiplications
a token where the kernel takes C + 2 N for chunks of C <= 64; then the states are scanned; then the kernel runs once, with the
state that comes in. The other way, the kernel with a zero state and a correction of its outputs, takes the same N once more
for the correction if the exchange is to be hidden, and rounds half-precision outputs twice.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from seqengine.kernels import api as kernels
from seqengine.kernels.modal.filter import complex_modes, powers, real_modes, to_double
from seqengine.kernels.modal.op import Backend
from seqengine.parallel import cost
from seqengine.parallel.compiled import breaks_graph
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.exchange.relayout import on_contiguous
from seqengine.parallel.exchange.scan import Algorithm, start_scan
from seqengine.parallel.layout import split_sizes
from seqengine.parallel.summary import FixedDecay, Summary

BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Numbers of one block of channels: in the cache of a CPU; on a GPU only a bound on memory."""


@breaks_graph
@on_contiguous({"u": 2, "pre_gate": 2, "post_gate": 2}, output=2, documents=False)
def modal_conv(
    u: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    *,
    ctx: SequenceContext,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: Backend = "auto",
    algorithm: Algorithm = "auto",
    node_size: int | None = None,
    channel_groups: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`kernels.modal_conv` of the joined sequence, on this rank's part.

    Local in:  u, pre_gate, post_gate [B, D, T], T = ctx.local_tokens; log_poles, residues [D, N] and skip [D], the same on all
               ranks; initial_state [B, D, N], the state before the global first token, the same on all ranks.
    Local out: (y [B, D, T], final state or None). join(y) == kernels.modal_conv(join(u), ...); the final state is the one after
               the global last token, the same on every rank.
    Traffic:   a `scan` of B * D * N numbers, whatever T is: `cost.scan_bytes` of the state, no transition. algorithm and
               node_size as in `scan`. A zigzag context: u and the gates to contiguous parts and y back by `relayout`,
               `cost.relayout_bytes` more.
    Overlap:   with channel_groups > 1 the exchange of a group runs while the sums or outputs of another are computed, forward
               and backward; that costs a copy of y and du. None: `cost.modal_conv_groups`.
    Memory:    as the kernel, and the state that comes in.
    Gradients: of u and the gates local; of log_poles, residues and skip this rank's partial sums. initial_state and the final
               state count once: see `scan`. A second derivative raises RuntimeError if P > 1.
    Order:     every rank must call, and must run the backward. With ctx.size == 1 it is the kernel and nothing is sent.
    Raises:    ValueError if shapes or dtypes do not fit, or the context has documents, before any message.
    """
    if ctx.size == 1:
        return kernels.modal_conv(
            u,
            log_poles,
            residues,
            skip=skip,
            pre_gate=pre_gate,
            post_gate=post_gate,
            initial_state=initial_state,
            output_final_state=output_final_state,
            backend=backend,
        )
    whole = _Part(u, log_poles, residues, skip, pre_gate, post_gate, initial_state)
    state = _checked_state(whole, backend, ctx)
    if initial_state is not None:
        whole = whole._replace(state=state)
    groups = channel_groups
    if groups is None:
        shard_bytes = u.shape[0] * u.shape[1] * u.element_size() * (ctx.total_tokens // ctx.size)  # not this rank's own
        wanted = cost.modal_conv_groups(ctx.size, state.nbytes, shard_bytes, u.device.type, node_size)
        groups = max(1, min(wanted, u.shape[1]))
    if not 1 <= groups <= max(1, u.shape[1]):
        raise ValueError(f"modal_conv: channel_groups must be from 1 to D = {u.shape[1]}; got {groups}.")
    parts = whole.split(split_sizes(u.shape[1], groups))
    pending = []
    for part in parts:
        local: Tensor = _LocalState.apply(part.u, part.pre_gate, part.log_poles, state.dtype)  # type: ignore[no-untyped-call]
        pending.append(
            start_scan(
                Summary(FixedDecay(part.log_poles, ctx.local_tokens), local),
                ctx=ctx,
                initial=part.state,
                algorithm=algorithm,
                output_final=output_final_state,
                node_size=node_size,
            )
        )
    outputs, finals = [], []
    for part, exchange in zip(parts, pending, strict=True):
        before, final = exchange.finish()
        outputs.append(_outputs(part, before, backend))
        if final is not None:
            finals.append(final)
    return _join(outputs), _join(finals) if output_final_state else None


class _Part(NamedTuple):
    """The arguments of some channels."""

    u: Tensor
    log_poles: Tensor
    residues: Tensor
    skip: Tensor | None
    pre_gate: Tensor | None
    post_gate: Tensor | None
    state: Tensor | None

    def split(self, sizes: list[int]) -> list["_Part"]:
        """Into groups of so many channels."""
        columns = [
            [None] * len(sizes) if x is None else x.split(sizes, dim=dim)
            for x, dim in zip(self, (1, 0, 0, 0, 1, 1, 1), strict=True)
        ]
        return [_Part(*column) for column in zip(*columns, strict=True)]


def _outputs(part: _Part, before: Tensor, backend: Backend) -> Tensor:
    """The kernel with the state that comes in."""
    y, _ = kernels.modal_conv(
        part.u,
        part.log_poles,
        part.residues,
        skip=part.skip,
        pre_gate=part.pre_gate,
        post_gate=part.post_gate,
        initial_state=before,
        backend=backend,
    )
    if y.numel() == 0:  # without tokens y does not depend on the state, but this rank's backward has to take part
        y = y + (before.real.sum() * 0).to(y.dtype)
    return y


def _join(groups: list[Tensor]) -> Tensor:
    return groups[0] if len(groups) == 1 else torch.cat(groups, dim=1)


def _checked_state(whole: _Part, backend: Backend, ctx: SequenceContext) -> Tensor:
    """The initial state, in the dtype of states; ValueError if arguments do not fit. The kernel checks them, on no token."""
    gates = [None if gate is None else gate[..., :0] for gate in (whole.pre_gate, whole.post_gate)]
    _, state = kernels.modal_conv(
        whole.u[..., :0],
        whole.log_poles,
        whole.residues,
        skip=whole.skip,
        pre_gate=gates[0],
        post_gate=gates[1],
        initial_state=whole.state,
        output_final_state=True,
        backend=backend,
    )
    for x in (whole.u, whole.pre_gate, whole.post_gate):
        if x is not None:
            ctx.check_local("modal_conv", x, 2)
    assert state is not None
    return state


class _LocalState(torch.autograd.Function):
    """e[b, d, n] = sum_t lambda[d, n]^(T-1-t) x[b, d, t] with x = pre_gate * u, in the dtype of states; T >= 0.

    With T-1-t = c C + j it is two small products, as in `modal_filter`: over j a matrix product for all c, then over c in
    float64. The gradient of the poles is that of another such sum, sum_t (T-1-t) lambda^(T-1-t) x[t], which the forward takes
    along and saves, so that the backward reads u for the gradient of pre_gate alone.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, pre_gate: Tensor | None, log_poles: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.sizes, ctx.dtype = (u.shape, u.dtype), dtype
        state = torch.zeros(u.shape[0], *log_poles.shape, dtype=dtype, device=u.device)
        slopes = to_double(torch.zeros_like(state)) if ctx.needs_input_grad[2] else None
        with torch.autocast(u.device.type, enabled=False):
            for block in _blocks(u.shape, log_poles):
                tables = _Tables(log_poles[block], u.shape[-1], dtype)
                x = tables.load(u, pre_gate, block)
                state[:, block], slope = tables.sums(x, slopes is not None)
                if slopes is not None and slope is not None:
                    slopes[:, block] = slope
        ctx.save_for_backward(u if ctx.needs_input_grad[1] else None, pre_gate, log_poles, slopes)
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_state: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        u, pre_gate, log_poles, slopes = ctx.saved_tensors
        shape, dtype = ctx.sizes
        du = torch.zeros(shape, dtype=dtype, device=d_state.device) if ctx.needs_input_grad[0] else None
        d_gate = None if u is None else torch.zeros_like(pre_gate)
        d = to_double(d_state).transpose(0, 1)  # [D, B, N]
        with torch.autocast(d_state.device.type, enabled=False):
            for block in _blocks(shape, log_poles) if du is not None or d_gate is not None else []:
                dx = _Tables(log_poles[block], shape[-1], ctx.dtype).input_gradient(d[block])
                if du is not None:
                    du[:, block] = dx if pre_gate is None else dx * pre_gate[:, block]
                if d_gate is not None:
                    d_gate[:, block] = dx * u[:, block]
        d_poles = None
        if slopes is not None:
            d_poles = (slopes.conj_physical() * to_double(d_state)).sum(dim=0).to(log_poles.dtype)
        return du, d_gate, d_poles, None


def _fine(count: int) -> int:
    """The smallest power of two whose square is at least `count`."""
    fine = 1
    while fine * fine < count:
        fine *= 2
    return fine


def _blocks(shape: torch.Size, log_poles: Tensor) -> list[slice]:
    """Of channels; none if there is nothing to sum."""
    (B, D, T), modes = shape, log_poles.shape[1] * (2 if log_poles.is_complex() else 1)
    if shape.numel() == 0:
        return []
    fine = _fine(T)
    numbers = (B * T + B * -(-T // fine) * modes) + 2 * modes * (fine + -(-T // fine))
    width = max(1, BLOCK_ELEMENTS.get(log_poles.device.type, 1 << 20) // numbers)
    return [slice(start, min(start + width, D)) for start in range(0, D, width)]


def _ladder(log_poles: Tensor, step: int, count: int) -> Tensor:
    """lambda^(step i) for i = count-1 .. 0, [d, N, count]: products of two short tables, for exponentials are dear."""
    inner = _fine(count)
    i = torch.arange(inner, device=log_poles.device)
    high = powers(log_poles, i[: -(-count // inner)] * (inner * step))
    low = powers(log_poles, i * step)
    return (high[..., None] * low[..., None, :]).flatten(-2)[..., :count].flip(-1)


class _Tables:
    """Powers of the poles of some channels: fine ones lambda^j, coarse ones lambda^(cC), both from the last to the first."""

    def __init__(self, log_poles: Tensor, tokens: int, dtype: torch.dtype):
        self.tokens, self.is_complex = tokens, log_poles.is_complex()
        self.length = _fine(tokens)
        self.chunks = -(-tokens // self.length)
        self.dtype = torch.empty(0, dtype=dtype).real.dtype
        self.fine = _ladder(log_poles, 1, self.length)  # [d, N, C]
        self.coarse = _ladder(log_poles, self.length, self.chunks)  # [d, N, n]

    def load(self, u: Tensor, pre_gate: Tensor | None, block: slice) -> Tensor:
        """x of the block as [d, B * n, C]: zeros before it fill the first chunk."""
        x = u[:, block].to(self.dtype)
        if pre_gate is not None:
            x = x * pre_gate[:, block].to(self.dtype)
        padded = F.pad(x.transpose(0, 1), (self.chunks * self.length - self.tokens, 0))
        return padded.reshape(padded.shape[0], -1, self.length)

    def sums(self, x: Tensor, with_slope: bool) -> tuple[Tensor, Tensor | None]:
        """sum_t lambda^(T-1-t) x[t] and, if asked for, sum_t (T-1-t) lambda^(T-1-t) x[t]: [B, d, N]."""
        fine = [self.fine]
        if with_slope:
            fine.append(self.fine * torch.arange(self.length - 1, -1, -1, device=x.device))
        rows = torch.bmm(x, real_modes(torch.cat(fine, dim=1)).to(self.dtype).mT)
        modes = complex_modes(rows, self.is_complex).unflatten(1, (-1, self.chunks))  # [d, B, n, N] or [d, B, n, 2 N]
        plain, *by_lag = modes.split(self.coarse.shape[1], dim=-1)
        state = torch.einsum("dbcn,dnc->bdn", plain, self.coarse)
        if not with_slope:
            return state, None
        starts = torch.arange(self.chunks - 1, -1, -1, device=x.device) * self.length
        whole = by_lag[0] + starts[:, None] * plain
        return state, torch.einsum("dbcn,dnc->bdn", whole, self.coarse)

    def input_gradient(self, d_state: Tensor) -> Tensor:
        """dx[t] = Re sum_n conj(lambda^(T-1-t)) d_state, [B, d, T], from [d, B, N]."""
        at_chunk = torch.einsum("dbn,dnc->dbcn", d_state, self.coarse.conj_physical())
        rows = torch.view_as_real(at_chunk.resolve_conj()).flatten(-2) if self.is_complex else at_chunk
        fine = real_modes(self.fine).to(self.dtype)
        dx: Tensor = torch.bmm(rows.to(self.dtype).flatten(1, 2), fine).unflatten(1, (-1, self.chunks)).flatten(2)
        return dx[..., -self.tokens :].transpose(0, 1)
