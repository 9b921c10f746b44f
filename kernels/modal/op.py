"""The public face of the modal filters: checks, choice of backend, empty inputs and single tokens."""

from typing import Literal

import torch
from torch import Tensor

from seqengine.kernels.checks import check
from seqengine.kernels.modal import ops, reference
from seqengine.kernels.modal.filter import powers, real_dtype, to_double

Backend = Literal["auto", "torch", "reference"]
"""auto: torch on every device. torch: chunks and states by matrix products. reference: the recurrence, step by step."""
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}  # torch.dtype.to_complex is not traced


def _check_parameters(name: str, log_poles: Tensor, residues: Tensor) -> None:
    check(name, log_poles.ndim == 2 and log_poles.shape[1] >= 1, "log_poles must be [D, N], N >= 1", log_poles.shape)
    must = "residues must have log_poles' shape {}"
    check(name, residues.shape == log_poles.shape, must, residues.shape, tuple(log_poles.shape))
    dtypes = (torch.float32, torch.float64, torch.complex64, torch.complex128)
    for what, x in (("log_poles", log_poles), ("residues", residues)):
        check(name, x.dtype in dtypes, "{} must be float32, float64, complex64 or complex128", x.dtype, what)


def _check_conv(
    name: str,
    u: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    check(name, u.ndim == 3, "u must be [B, D, T]", u.shape)
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    check(name, u.dtype in dtypes, "u must be float64, float32, bfloat16 or float16", u.dtype)
    _check_parameters(name, log_poles, residues)
    B, D, _ = u.shape
    check(name, log_poles.shape[0] == D, "log_poles must be [D, N] with D={}", log_poles.shape, D)
    for what, x, shape, letters in (
        ("skip", skip, (D,), "[D]"),
        ("pre_gate", pre_gate, u.shape, "[B, D, T]"),
        ("post_gate", post_gate, u.shape, "[B, D, T]"),
        ("initial_state", initial_state, (B, D, log_poles.shape[1]), "[B, D, N]"),
    ):
        if x is not None:
            check(name, x.shape == shape, "{} must be {} = {}", x.shape, what, letters, tuple(shape))
            may_be_complex = what == "initial_state" and log_poles.is_complex()
            check(name, may_be_complex or not x.is_complex(), "{} must be real here", x.dtype, what)


def _same_kind(log_poles: Tensor, residues: Tensor) -> Tensor:
    """residues complex exactly if log_poles are: of real poles only the real part of a residue reaches the filter."""
    if log_poles.is_complex() == residues.is_complex():
        return residues
    return residues.real if residues.is_complex() else residues.to(_COMPLEX[residues.dtype])


def modal_filter(log_poles: Tensor, residues: Tensor, length: int) -> Tensor:
    """The filter k[d, t] = Re sum_n residues[d, n] exp(log_poles[d, n] t) for t = 0 .. length-1.

    Shapes:   log_poles, residues [D, N], N >= 1; returns [D, length]. A conjugate pair of modes is one mode, twice its residue.
    Dtypes:   float32, float64, complex64 or complex128; returns float64 if either is double, else float32. Exponents are
              always multiplied out in float64.
    Memory:   k and, block of channels by block, tables of N sqrt(length) numbers a channel; saves log_poles and residues. Any
              order of derivative; torch.compile traces it whole.
    Exact to: reference.modal_filter within 1e-12 relative in float64. float32, length 2^20, |lambda| = 1 - 1e-6, N = 16:
              1.2e-7 relative rms, gradients 7e-7.
    Poles:    a real part of -inf gives exp = 1 at lag 0 and 0 after it, with zero gradient. Positive real parts may overflow.
    Raises:   ValueError if shapes disagree, a dtype is not supported, or length is negative.
    References: S4D, Gu et al. 2022, arXiv:2206.11893; Hyena-LI, Ku et al. 2025, arXiv:2503.01868.
    """
    name = "modal_filter"
    _check_parameters(name, log_poles, residues)
    check(name, isinstance(length, int) and length >= 0, "length must be an int >= 0", length)
    residues = _same_kind(log_poles, residues)
    if length == 0 or log_poles.shape[0] == 0:
        return reference.modal_filter(log_poles, residues, length).to(real_dtype(log_poles, residues))
    k: Tensor = ops.modal_filter(log_poles, residues, length)
    return k


def modal_conv(
    u: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Gated convolution with a modal filter: y = post_gate * (k (*) x + skip * x), x = pre_gate * u, k = modal_filter(...).

    Shapes:   u, pre_gate, post_gate [B, D, T]; log_poles, residues [D, N]; skip [D]; state [B, D, N].
              Returns (y [B, D, T], state or None). Any T >= 0.
    Dtypes:   u float64, float32, bfloat16 or float16; log_poles, residues float32, float64, complex64 or complex128.
              Arithmetic and state are double if u or a parameter is, else single; the state is complex if log_poles are.
              y in u.dtype.
    State:    s = sum_tau exp(log_poles)^(T-1-tau) x[tau] + exp(log_poles)^T initial_state: after the last token, so that the
              next output is Re sum_n residues (exp(log_poles) s + x) + skip x. Cutting T anywhere gives the uncut result.
    Memory:   saves the arguments and one state for many chunks; the backward computes the chunks' states again. Any order of
              derivative: beyond the first they keep a few times u and N / C states a token. torch.compile traces it whole.
              Time: O(C + N) a token for chunks of C <= 64, and O(N) for T = 1, where nothing longer than N is built.
    Exact to: reference.modal_conv within 1e-12 relative in float64. float32, T = 2^20, |lambda| = 1 - 1e-6, N = 16:
              y, state and gradients 6e-7 relative rms at most.
    Poles:    a real part of -inf forgets everything at each token, with zero gradient. Positive real parts may overflow.
    Raises:   ValueError if shapes disagree, a dtype is not supported, or the backend is unknown.
    References: H3, Fu et al. 2022, arXiv:2212.14052; S4D, Gu et al. 2022, arXiv:2206.11893; Hyena-LI, Ku et al. 2025,
              arXiv:2503.01868.
    """
    name = "modal_conv"
    check(name, backend in ("auto", "torch", "reference"), "backend must be 'auto', 'torch' or 'reference'", backend)
    _check_conv(name, u, log_poles, residues, skip, pre_gate, post_gate, initial_state)
    residues = _same_kind(log_poles, residues)
    dtype = real_dtype(u, log_poles, residues)
    state_dtype = _COMPLEX[dtype] if log_poles.is_complex() else dtype
    if initial_state is None:
        state = torch.zeros(u.shape[0], *log_poles.shape, dtype=state_dtype, device=u.device)
    else:
        state = initial_state.to(state_dtype)
    if u.numel() == 0:
        y, final = _no_token(u, log_poles, residues, skip, pre_gate, post_gate), state
    elif backend == "reference":
        y, final = reference.modal_conv(u, log_poles, residues, skip, pre_gate, post_gate, state)
    elif u.shape[-1] == 1:
        y, final = _one_token(u, log_poles, residues, skip, pre_gate, post_gate, state)
    else:
        y, final, _ = ops.modal_conv(u, log_poles, residues, skip, pre_gate, post_gate, state)
    return y, (final.to(state_dtype) if output_final_state else None)


def _no_token(u: Tensor, *parameters: Tensor | None) -> Tensor:
    """An output without elements that still depends on every argument, so that their gradients are zero, not None."""
    y = u * 1
    for x in parameters:
        if x is not None:
            y = y + (x.real.sum() * 0).to(u.dtype)
    return y


def _one_token(
    u: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """T = 1 in O(N) a channel. In float64: a pole rounded to float32 would decay wrongly over a million such calls."""
    x = u.to(torch.float64)
    if pre_gate is not None:
        x = x * pre_gate
    poles = powers(log_poles, torch.ones(1, device=u.device))[..., 0]
    after = poles * to_double(state) + x
    weighted = to_double(residues) * after
    y = (weighted.real if weighted.is_complex() else weighted).sum(dim=-1, keepdim=True)
    if skip is not None:
        y = y + skip[:, None] * x
    if post_gate is not None:
        y = y * post_gate
    return y.to(u.dtype), after.to(state.dtype)
