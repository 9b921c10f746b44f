"""What the Triton kernels of gated linear attention share: chunks of documents, exact decays, and the scan over chunks.

A document is cut into chunks of C tokens. Every exponent is a sum of gates over a range of tokens, so it is at most 0: sums
are never subtracted, and a gate of -inf is an exact factor of 0. With the exclusive suffix sums "out of t" and the inclusive
prefix sums "into t", both within a chunk, the states before the chunks and the gradients after them are

    h' = exp(total) h + (k exp(out))^T v            dh = exp(total) dh' + (scale q exp(into))^T do.

Reference: Yang et al. 2023, arXiv:2312.06635.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, no-untyped-call, untyped-decorator"

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

Precision = Literal["ieee", "tf32"]
"""ieee: float32 (float64) multiply-adds. tf32: operands rounded to 11 bits, tensor cores, sums in float32."""

CHUNK = 64


class Blocks(NamedTuple):
    """Key and value channels of a tile, and how a program runs."""

    BK: int
    BV: int
    num_warps: int


STATE_BLOCKS = {"ieee": Blocks(32, 64, 8), "tf32": Blocks(64, 64, 8), "float64": Blocks(32, 32, 4)}
FEW_PROGRAMS, WANTED_PROGRAMS, SHORTEST_SEGMENT = 256, 1024, 16
"""The scan over chunks is sequential. With fewer programs than the first, documents are cut into segments of at least the
last number of chunks, for about the second number of programs: scanned alone, joined, and scanned again from their starts."""


class Chunks(NamedTuple):
    """Where each chunk lies. With documents `total` is an upper bound: nothing is read back from the device."""

    ends: Tensor | None  # [N + 1] tokens
    offsets: Tensor | None  # [N + 1] chunks before each document
    documents: Tensor | None  # [total] document of each chunk; the chunks too many start after the last one's end
    per_sample: int
    total: int
    sequences: int


class Spans(NamedTuple):
    """Runs of chunks that a program goes through: documents, or segments of them."""

    table: Tensor | None  # [total, 4] sample, first token, end, first chunk; None: the samples
    total: int
    offsets: Tensor | None  # [N + 1] spans before each document; None: per_document each
    per_document: int


def make_chunks(x: Tensor, cu_seqlens: Tensor | None) -> Chunks:
    """Chunks of x [B, T, ...]."""
    B, T = x.shape[:2]
    if cu_seqlens is None:
        count = triton.cdiv(T, CHUNK)
        return Chunks(None, None, None, count, B * count, B)
    ends = cu_seqlens.to(torch.int64).contiguous()
    sequences = ends.shape[0] - 1
    offsets = F.pad(((ends.diff() + (CHUNK - 1)) // CHUNK).cumsum(0), (1, 0))
    total = T // CHUNK + sequences
    documents = torch.searchsorted(offsets, torch.arange(total, device=x.device), right=True) - 1
    return Chunks(ends, offsets, documents.clamp(max=sequences - 1), 0, total, sequences)


@triton.jit
def dot(b_a, b_b, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """a @ b. Operands of tf32 are rounded to nearest here: tensor cores would cut their last bits off."""
    if PRECISION == "tf32":
        b_a = ((b_a.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        b_b = ((b_b.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.dot(b_a, b_b, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def load_tile(p_x, o_t, o_k, m_t, K, x_st, x_sk, ACC: tl.constexpr):
    """x[o_t, o_k], zeros outside m_t and K."""
    mask = m_t[:, None] & (o_k < K)[None, :]
    p_t = p_x + o_t[:, None].to(tl.int64) * x_st
    return tl.load(p_t + o_k[None, :].to(tl.int64) * x_sk, mask=mask, other=0).to(ACC)


@triton.jit
def locate(i_c, ends, offsets, documents, per_sample, T, C: tl.constexpr):
    """Chunk -> sample, first token, end of its document."""
    if ends is None:
        i_b = tl.cast(i_c // per_sample, tl.int64)
        i_t = tl.cast(i_c % per_sample, tl.int64) * C
        end = tl.cast(T, tl.int64)
    else:
        i_n = tl.load(documents + i_c)
        i_b = tl.cast(0, tl.int64)
        i_t = tl.load(ends + i_n) + (i_c - tl.load(offsets + i_n)) * C
        end = tl.load(ends + i_n + 1)
    return i_b, i_t, end


@triton.jit
def shift_down(b_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row i becomes row i - 1; row 0 becomes 0."""
    o_i = tl.arange(0, ROWS)[:, None] + tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
    return tl.where(o_i > 0, tl.gather(b_x, tl.maximum(o_i - 1, 0), axis=0), 0.0)


@triton.jit
def state_kernel(
    x, g, y, start, states, final, sums, spans, scale,
    x_sb, x_st, x_sh, x_sk, g_sb, g_st, g_sh, g_sk, y_sb, y_st, y_sh, y_sv, per_sample, T, H, K, V,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SCALAR: tl.constexpr,
):  # fmt: skip
    """states[chunk] = the state before the chunk; REVERSE: its gradient after the chunk. One span, a tile of the state.

    x is k and y is v; REVERSE: q and do. final gets the state that leaves, sums the sum of the span's gates. The carry is in
    float64: a rounded decay, applied to millions of tokens, would change how long a slow gate remembers.
    """
    i_p = tl.program_id(0)
    num_v = tl.cdiv(V, BV)
    num_k = tl.cdiv(K, BK)
    o_k = (i_p // num_v) % num_k * BK + tl.arange(0, BK)
    o_v = i_p % num_v * BV + tl.arange(0, BV)
    i_n = tl.cast(i_p // num_v // num_k // H, tl.int64)
    i_h = tl.cast(i_p // num_v // num_k % H, tl.int64)
    if spans is None:
        i_b = i_n
        begin = tl.cast(0, tl.int64)
        end = tl.cast(T, tl.int64)
        first = i_b * per_sample
    else:
        i_b = tl.load(spans + i_n * 4)
        begin = tl.load(spans + i_n * 4 + 1)
        end = tl.load(spans + i_n * 4 + 2)
        first = tl.load(spans + i_n * 4 + 3)
    count = ((end - begin + (C - 1)) // C).to(tl.int32)
    p_x = x + i_b * x_sb + i_h * x_sh
    p_g = g + i_b * g_sb + i_h * g_sh
    p_y = y + i_b * y_sb + i_h * y_sh
    o_h = o_k[:, None].to(tl.int64) * V + o_v[None, :]
    m_h = (o_k < K)[:, None] & (o_v < V)[None, :]
    i_s = (i_n * H + i_h) * K * V
    b_h = tl.zeros([BK, BV], dtype=tl.float64)
    b_sum = tl.zeros([BK], dtype=tl.float64)
    if start is not None:
        b_h += tl.load(start + i_s + o_h, mask=m_h, other=0).to(tl.float64)
    o_c = tl.arange(0, C)
    for i in range(count):
        i_c = tl.cast(i, tl.int64)
        if REVERSE:
            i_c = count - 1 - i_c
        if states is not None:
            tl.store(states + ((first + i_c) * H + i_h) * K * V + o_h, b_h.to(states.dtype.element_ty), mask=m_h)
        o_t = begin + i_c * C + o_c
        m_next = (o_t + 1 < end) & (o_c + 1 < C)
        if SCALAR:
            b_g = tl.load(p_g + o_t * g_st, mask=o_t < end, other=0).to(ACC)
            b_next = tl.load(p_g + (o_t + 1) * g_st, mask=m_next, other=0).to(ACC)
        else:
            b_g = load_tile(p_g, o_t, o_k, o_t < end, K, g_st, g_sk, ACC)
            b_next = load_tile(p_g, o_t + 1, o_k, m_next, K, g_st, g_sk, ACC)
        b_total = tl.zeros([BK], dtype=tl.float64) + tl.sum(b_g.to(tl.float64), axis=0)
        b_sum += b_total
        if REVERSE:
            b_factor = tl.exp(tl.cumsum(b_g, axis=0)) * scale
        else:
            b_factor = tl.exp(tl.cumsum(b_next, axis=0, reverse=True))
        if SCALAR:
            b_factor = b_factor[:, None]
        b_x = load_tile(p_x, o_t, o_k, o_t < end, K, x_st, x_sk, ACC) * b_factor
        b_y = load_tile(p_y, o_t, o_v, o_t < end, V, y_st, y_sv, ACC)
        b_h = b_h * tl.exp(b_total)[:, None] + dot(tl.trans(b_x), b_y, PRECISION, ACC).to(tl.float64)
    if final is not None:
        tl.store(final + i_s + o_h, b_h.to(final.dtype.element_ty), mask=m_h)
    if sums is not None:  # equal for all tiles of V: the first writes
        num_g = 1 if SCALAR else K
        tl.store(sums + (i_n * H + i_h) * num_g + o_k, b_sum, mask=o_k < tl.where(i_p % num_v == 0, num_g, 0))


@triton.jit
def join_kernel(
    local, sums, start, starts, final, offsets, per_document, H, K, V,
    REVERSE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SCALAR: tl.constexpr,
):  # fmt: skip
    """starts[segment] = the state before the segment (REVERSE: after it), final = the one that leaves the document."""
    i_p = tl.program_id(0)
    num_v = tl.cdiv(V, BV)
    num_k = tl.cdiv(K, BK)
    o_k = (i_p // num_v) % num_k * BK + tl.arange(0, BK)
    o_g = o_k * 0 if SCALAR else o_k
    o_v = i_p % num_v * BV + tl.arange(0, BV)
    i_n = tl.cast(i_p // num_v // num_k // H, tl.int64)
    i_h = tl.cast(i_p // num_v // num_k % H, tl.int64)
    if offsets is None:
        first = i_n * per_document
        count = per_document
    else:
        first = tl.load(offsets + i_n)
        count = (tl.load(offsets + i_n + 1) - first).to(tl.int32)
    num_g = 1 if SCALAR else K
    o_h = o_k[:, None].to(tl.int64) * V + o_v[None, :]
    m_h = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_h = tl.zeros([BK, BV], dtype=tl.float64)
    if start is not None:
        b_h += tl.load(start + (i_n * H + i_h) * K * V + o_h, mask=m_h, other=0).to(tl.float64)
    for i in range(count):
        i_s = tl.cast(i, tl.int64)
        if REVERSE:
            i_s = count - 1 - i_s
        i_s = (first + i_s) * H + i_h
        tl.store(starts + i_s * K * V + o_h, b_h.to(starts.dtype.element_ty), mask=m_h)
        b_decay = tl.exp(tl.load(sums + i_s * num_g + o_g, mask=o_g < num_g, other=0))
        b_h = b_h * b_decay[:, None] + tl.load(local + i_s * K * V + o_h, mask=m_h, other=0).to(tl.float64)
    tl.store(final + (i_n * H + i_h) * K * V + o_h, b_h.to(final.dtype.element_ty), mask=m_h)


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """Of sums and states: float64 for float64, else float32."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def pick(table: dict[str, Blocks], precision: Precision, dtype: torch.dtype, K: int, V: int) -> Blocks:
    """The blocks of a table, not wider than K and V need."""
    blocks = table["float64" if dtype == torch.float64 else precision]
    widest = [max(16, triton.next_power_of_2(n)) for n in (K, V)]
    return Blocks(min(blocks.BK, widest[0]), min(blocks.BV, widest[1]), blocks.num_warps)


def _documents(chunks: Chunks) -> Spans:
    """A span for each document."""
    if chunks.ends is None or chunks.offsets is None:
        return Spans(None, chunks.sequences, None, 0)
    begins = chunks.ends[:-1]
    table = torch.stack([torch.zeros_like(begins), begins, chunks.ends[1:], chunks.offsets[:-1]], dim=1)
    return Spans(table, chunks.sequences, None, 0)


def _segments(chunks: Chunks, T: int, length: int, device: torch.device) -> Spans:
    """Spans of at most `length` chunks. Those too many have no tokens."""
    if chunks.ends is None or chunks.offsets is None:
        each = triton.cdiv(chunks.per_sample, length)
        i = torch.arange(chunks.sequences * each, device=device)
        sample, place = i // each, i % each * length
        end = ((place + length) * CHUNK).clamp(max=T)
        table = torch.stack([sample, place * CHUNK, end, sample * chunks.per_sample + place], dim=1)
        return Spans(table, table.shape[0], None, each)
    counts = (chunks.offsets.diff() + (length - 1)) // length
    offsets = F.pad(counts.cumsum(0), (1, 0))
    i = torch.arange(chunks.total // length + chunks.sequences, device=device)
    document = (torch.searchsorted(offsets, i, right=True) - 1).clamp(max=chunks.sequences - 1)
    place = (i - offsets[document]) * length
    begin = chunks.ends[document] + place * CHUNK
    end = torch.minimum(begin + length * CHUNK, chunks.ends[document + 1]).maximum(begin)
    table = torch.stack([torch.zeros_like(i), begin, end, chunks.offsets[document] + place], dim=1)
    return Spans(table, table.shape[0], offsets, 0)


def scan_states(
    x: Tensor,
    g: Tensor,
    y: Tensor,
    start: Tensor | None,
    chunks: Chunks,
    scale: float,
    precision: Precision,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """(states [chunks, H, K, V], final [N, H, K, V]) from start [N, H, K, V]; with reverse their gradients, from q and do.

    Shapes:   x [B, T, H, K], y [B, T, H, V], g [B, T, H, K] or [B, T, H, 1], any strides.
    Traffic:  x and g once per tile of V, y once per tile of K, states once. With few and long documents x, g and y twice, and
              some 2000 tiles of states for the starts of segments.
    """
    H, K = x.shape[2:]
    V = y.shape[3]
    dtype = accumulator(x.dtype)[0]
    blocks = pick(STATE_BLOCKS, precision, x.dtype, K, V)
    tiles = H * triton.cdiv(K, blocks.BK) * triton.cdiv(V, blocks.BV)
    states = torch.empty(chunks.total, H, K, V, dtype=dtype, device=x.device)
    final = torch.empty(chunks.sequences, H, K, V, dtype=dtype, device=x.device)
    start = None if start is None else start.contiguous()

    def launch(
        spans: Spans, start: Tensor | None, states: Tensor | None, final: Tensor | None, sums: Tensor | None
    ) -> None:
        state_kernel[(spans.total * tiles,)](
            x, g, y, start, states, final, sums, spans.table, scale,
            *x.stride(), *g.stride(), *y.stride(), chunks.per_sample, x.shape[1], H, K, V,
            REVERSE=reverse, PRECISION=precision, ACC=accumulator(x.dtype)[1],
            C=CHUNK, BK=blocks.BK, BV=blocks.BV, SCALAR=g.shape[3] == 1, num_warps=blocks.num_warps,
        )  # fmt: skip

    length = max(SHORTEST_SEGMENT, triton.cdiv(chunks.total * tiles, WANTED_PROGRAMS))
    if chunks.sequences * tiles >= FEW_PROGRAMS or chunks.total <= 4 * length:
        launch(_documents(chunks), start, states, final, None)
        return states, final
    spans = _segments(chunks, x.shape[1], length, x.device)
    local = torch.empty(spans.total, H, K, V, dtype=dtype, device=x.device)
    sums = torch.empty(spans.total, H, g.shape[3], dtype=torch.float64, device=x.device)
    launch(spans, None, None, local, sums)
    starts = torch.empty_like(local)
    join_kernel[(chunks.sequences * tiles,)](
        local, sums, start, starts, final, spans.offsets, spans.per_document, H, K, V,
        REVERSE=reverse, BK=blocks.BK, BV=blocks.BV, SCALAR=g.shape[3] == 1, num_warps=blocks.num_warps,
    )  # fmt: skip
    launch(spans, starts, states, None, None)
    return states, final
