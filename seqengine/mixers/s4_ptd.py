"""S4-PTD: diagonal state-space models that begin as HiPPO, by perturb-then-diagonalize. Yu et al. 2023, arXiv:2310.01698.

The eigenvectors of the HiPPO-LegS matrix A are so nearly parallel that no computer can diagonalise it. S4D takes the normal
matrix A + B B^T / 2 instead, whose transfer function is far from that of A at some frequencies. Between them, A + E for a
small E has eigenvectors V of moderate condition number, and a transfer function within O(|E|) of that of A everywhere on the
imaginary axis: it is that of a system near A, however sensitive the poles themselves are. The paper finds E by gradient
descent on cond(V) + gamma |E|. Here E = epsilon (B B^T / 2 + R), R random of norm 1: for N = 2 .. 128 states cond(V) is at most
2 / epsilon, and the largest error of the transfer function about epsilon of its largest value. R alone would have to be so
large for that condition number that the error were above 1.
"""

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from seqengine.mixers.diagonal import DiagonalSSM, hippo_legs
from seqengine.mixers.mixer import Place
from seqengine.mixers.s4d import DiagonalConfig, DiagonalLayer


class S4PTDConfig(DiagonalConfig):
    """[model.mixers.s4_ptd]: diagonal state-space models from a perturbed HiPPO-LegS matrix."""

    FORGOTTEN = DiagonalConfig.FORGOTTEN | {"perturbation"}

    d_state: Annotated[int, Field(ge=2)] = 64
    """States of each channel's system, all of them complex modes: the perturbed poles are no conjugate pairs."""
    perturbation: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.1
    """epsilon, how far from HiPPO towards a normal matrix: smaller is closer to HiPPO and worse conditioned."""


class Diagonalised(NamedTuple):
    """A + E = V diag(poles) V^-1, in complex128."""

    poles: Tensor
    """[N]"""
    V: Tensor
    """[N, N]: columns of norm 1."""
    B: Tensor
    """[N]: V^-1 times the B of HiPPO."""


def perturb_then_diagonalise(size: int, perturbation: float) -> Diagonalised:
    """A + E for A, B of HiPPO-LegS and E = perturbation (B B^T / 2 + R), R complex normal of spectral norm 1.

    R is drawn from torch's generator. The poles are stable: A + A^T = -I - B B^T, so that without R their real parts are at
    most -1/2, and R moves the numerical range by at most the perturbation.
    """
    A, B = hippo_legs(size)
    R = torch.randn(size, size, dtype=torch.complex128, device="cpu")
    E = perturbation * (0.5 * B[:, None] * B + R / torch.linalg.matrix_norm(R, ord=2))
    poles, V = torch.linalg.eig(A + E)
    return Diagonalised(poles, V, torch.linalg.solve(V, B.to(V.dtype)))


class S4PTD(DiagonalLayer):
    """y = GLU(W gelu(k (*) x + skip * x)), k[t] = Re sum_n C_n B_n g_n exp(p_n t) with d_state modes a channel.

    All channels begin with the poles and B of one perturbed HiPPO matrix, each with a real normal C of its own.

    Without causality, as in the code of S4: a second C, real and normal as the first, makes the filter for the tokens that
    follow, from the same steps, poles and B.

    Shapes: x [B, T, D] -> y [B, T, D]; with ctx, T is this rank's part and the result is this rank's part.
    State:  ModalState, O(d_state D) numbers a sample, whatever came before.
    Raises: ValueError for a state without causality.
    """

    def __init__(self, config: S4PTDConfig, place: Place) -> None:
        start = perturb_then_diagonalise(config.d_state, config.perturbation)
        shape = (1 if place.causal else 2, place.d_model, config.d_state)
        C = torch.randn(shape, dtype=torch.float64, device="cpu").to(start.V.dtype) @ start.V
        ssm = DiagonalSSM(
            place.d_model,
            start.poles,
            discretisation=config.discretisation,
            step_min=config.step_min,
            step_max=config.step_max,
            halves=False,
            two_sided=not place.causal,
            B=start.B,
            C=C,
        )
        super().__init__(ssm, place)
