"""Diagonal state-space models: s' = A s + B x, y = Re(C s), one system per head, with A a diagonal of complex poles.

Sampled at steps of dt a system is a modal filter k[t] = scale * Re sum_n C_n B_n g_n exp(p_n t), which `modal_conv` runs:

    zoh        p = dt A                                    g = (exp(dt A) - 1) / A
    bilinear   p = log((1 + dt A / 2) / (1 - dt A / 2))    g = dt / (1 - dt A / 2)

Gu et al. 2022, arXiv:2206.11893 (S4D: the parametrisation and its initialisations Lin, Inv and LegS).
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from seqengine.kernels.api import modal_filter
from seqengine.mixers.mixer import ParameterRule

Discretisation = Literal["zoh", "bilinear"]
Initialisation = Literal["lin", "inv", "legs"]
LR_MOST = 1e-3
"""Largest learning rate of poles, steps and B, as published."""
SMALLEST_DECAY = 1e-4
"""Initial poles have real parts of at most minus this."""
COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def hippo_legs(size: int) -> tuple[Tensor, Tensor]:
    """(A [N, N], B [N]) of HiPPO-LegS in float64: the coefficients of the past in scaled Legendre polynomials.

    References: Gu et al. 2020, arXiv:2008.07669.
    """
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    root = (2 * n + 1).sqrt()
    below = torch.tril(root[:, None] * root, diagonal=-1)
    return -(below + torch.diag(n + 1)), root


def initial_poles(kind: Initialisation, size: int) -> Tensor:
    """The N / 2 poles with positive frequency, complex128: real parts -1/2, frequencies by kind.

    lin   pi n
    inv   (N / pi) (N / (2 n + 1) - 1)
    legs  of the normal part of HiPPO-LegS, A + B B^T / 2, largest first
    """
    n = torch.arange(size // 2, dtype=torch.float64, device="cpu")
    if kind == "lin":
        frequency = math.pi * n
    elif kind == "inv":
        frequency = size / math.pi * (size / (2 * n + 1) - 1)
    else:
        A, B = hippo_legs(size)
        skew = A + 0.5 * B[:, None] * B + 0.5 * torch.eye(size, dtype=torch.float64, device="cpu")
        frequency = torch.linalg.eigvalsh(-1j * skew).flip(0)[: size // 2]
    return torch.complex(torch.full_like(frequency, -0.5), frequency)


class DiagonalSSM(nn.Module):
    """H systems of M complex modes each, as modal filters.

    halves: the modes stand for conjugate pairs, and count twice; else each counts once and only its real part is heard.
    Parameters: log_step [H] (dt); log_decay, frequency [H, M] (A = -exp(log_decay) + i frequency); B, C [H, M, 2].
    Initially A is `poles` in every head, B is one or `B`, C is complex normal times B, and dt log-uniform between the bounds.
    two_sided: also C_backward [H, M, 2], begun as C, which reads the same systems running backwards. As in S4's code (Gu et al.
    2022, arXiv:2111.00396) dt, A and B are those of both. A given C is then [2, H, M], that of each direction.
    """

    def __init__(
        self,
        heads: int,
        poles: Tensor,
        *,
        discretisation: Discretisation,
        step_min: float,
        step_max: float,
        halves: bool = True,
        two_sided: bool = False,
        B: Tensor | None = None,
        C: Tensor | None = None,
    ) -> None:
        super().__init__()
        modes = poles.shape[0]
        self.discretisation, self.scale = discretisation, 2.0 if halves else 1.0
        low, high = math.log(step_min), math.log(step_max)
        self.log_step = nn.Parameter(torch.rand(heads) * (high - low) + low)
        self.log_decay = nn.Parameter(torch.empty(heads, modes))
        self.frequency = nn.Parameter(torch.empty(heads, modes))
        self.B = nn.Parameter(torch.empty(heads, modes, 2))
        self.C = nn.Parameter(torch.empty(heads, modes, 2))
        self.C_backward = nn.Parameter(torch.empty(heads, modes, 2)) if two_sided else None
        with torch.no_grad():
            self.log_decay.copy_((-poles.real).clamp(min=SMALLEST_DECAY).log())
            self.frequency.copy_(poles.imag)
            gain = torch.ones_like(poles) if B is None else B
            self.B.copy_(torch.view_as_real(gain))
            if C is None:
                C = gain.conj() * torch.randn(1 + two_sided, heads, modes, dtype=poles.dtype, device="cpu")
            readings = torch.view_as_real(C.resolve_conj()).reshape(-1, heads, modes, 2)
            self.C.copy_(readings[0])
            if self.C_backward is not None:
                self.C_backward.copy_(readings[1])

    def modes(self) -> tuple[Tensor, Tensor]:
        """(log_poles, residues) [H, M] for `modal_conv`, complex64 or complex128 as the weights are."""
        log_poles, residues = self._modes(self.C)
        return log_poles, residues

    def filters(self, length: int, length_backward: int) -> tuple[Tensor, Tensor]:
        """The taps [H, length], and those for what follows [H, length_backward]."""
        assert self.C_backward is not None
        log_poles, forward, backward = self._modes(self.C, self.C_backward)
        return modal_filter(log_poles, forward, length), modal_filter(log_poles, backward, length_backward)

    def _modes(self, *readings: Tensor) -> list[Tensor]:
        """log_poles, then the residues of each C.

        Computed in float64: in float32 the logarithm of a pole near 1 would lose what decides over thousands of steps.
        """
        step = self.log_step.double().exp()[:, None]
        A = torch.complex(-self.log_decay.double().exp(), self.frequency.double())
        z = step * A
        if self.discretisation == "zoh":
            log_poles, gain = z, (torch.exp(z) - 1) / A
        else:
            log_poles, gain = torch.log((1 + z / 2) / (1 - z / 2)), step / (1 - z / 2)
        gain = self.scale * torch.view_as_complex(self.B.double()) * gain
        dtype = COMPLEX[self.log_step.dtype]
        residues = [(gain * torch.view_as_complex(C.double())).to(dtype) for C in readings]
        return [log_poles.to(dtype), *residues]


def diagonal_rules(prefix: str) -> dict[str, ParameterRule]:
    """As published: steps, poles and B do not decay and learn slowly; C is like other weights."""
    rule = ParameterRule(weight_decay=0.0, lr_most=LR_MOST)
    return {f"{prefix}.{name}": rule for name in ("log_step", "log_decay", "frequency", "B")}
