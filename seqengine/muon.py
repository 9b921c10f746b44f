"""Muon: momentum made orthogonal by a few products of matrices.

    m <- m + (1 - mu) (g - m)               momentum
    u = g + mu (m - g)                      Nesterov's look ahead
    X = u / |u|_F;  then k times  A = X X^T,  X <- a X + (b A + c A A) X        Newton-Schulz: X nears U V^T of u = U S V^T
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) X

The factor gives the step the root mean square of a typical one of AdamW, so that one learning rate and one weight decay serve
both. torch.optim.Muon does the iterations in bfloat16 always: two meshes, whose gradients differ in the last digit, would
then part in the third. Here they are done in the dtype of the weights (float32 at least), in bfloat16 only if asked for.

The iterations need the whole matrix. Of a sharded one every rank updates its own rows of the momentum; then the ranks share the
matrices out, each gets the rows of its own from all, iterates, and sends the rows of X back: two exchanges for as many matrices
as there are ranks, and no matrix is worked on twice within a copy of the model.

References: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon (iterations, coefficients, defaults); Liu et al. 2025,
arXiv:2502.16982 (weight decay, the factor, sharding).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from seqengine.errors import InputError
from seqengine.parallel import comm
from seqengine.parallel.ledger import Ledger
from seqengine.parallel.sharded import is_sharded, local_part

COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
"""a, b, c of the iteration: steep at zero, so that few iterations do; singular values end between about 0.7 and 1.2."""
SMALLEST_NORM: Final = 1e-7
RMS_OF_ADAMW: Final = 0.2
Owned = tuple[Tensor, dict[str, Any]]
"""A parameter and its group."""


def orthogonalise(matrix: Tensor, num_steps: int, dtype: torch.dtype) -> Tensor:
    """[R, C] -> the same shape in `dtype`, singular values near 1, singular vectors kept; zeros stay zeros."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype, copy=True)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Muon over matrices, whole or sharded by rows (FSDP2, HSDP).

    params:   matrices, or groups of them with "lr", "weight_decay" and whatever else of their own.
    dtype:    of the iterations; None is that of the weights, and at least float32.
    State:    "momentum_buffer" for each parameter, of its shape, dtype and sharding.
    Traffic:  of sharded matrices, each twice: (P-1)/P of its bytes to the rank that iterates, and as much back.
    Order:    with sharded parameters every rank must call step, with gradients for the same ones.
    Raises:   ValueError for a parameter that is not a matrix; InputError for one that is sharded in another way than by rows.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        num_steps: int = 5,
        dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "num_steps": num_steps}
        super().__init__(params, defaults)
        self._dtype = dtype
        for parameter in self._parameters():
            if parameter.ndim != 2 or parameter.is_complex():
                raise ValueError(
                    f"Muon: parameters must be real matrices; got {parameter.dtype} {tuple(parameter.shape)}."
                )
            _check_placement(parameter)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Muon: step takes no closure; compute the loss and its gradients before it.")
        sharded: list[Owned] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if is_sharded(parameter):
                    sharded.append((parameter, group))
                else:
                    update = orthogonalise(self._direction(parameter, group), group["num_steps"], self._work(parameter))
                    _apply(parameter, parameter.shape, update, group)
        self._step_sharded(sharded)

    def _work(self, parameter: Tensor) -> torch.dtype:
        return self._dtype or torch.promote_types(parameter.dtype, torch.float32)

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The momentum, moved on, with the look ahead: of this rank's rows."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient, momentum = local_part(parameter.grad), local_part(state["momentum_buffer"])
        gradient = gradient.to(momentum.dtype)
        momentum.lerp_(gradient, 1.0 - group["momentum"])
        return gradient.lerp(momentum, group["momentum"])

    def _step_sharded(self, everything: Sequence[Owned]) -> None:
        """Matrices of one mesh and dtype in turns of as many as there are ranks, the largest first: ranks then do alike."""
        kinds: dict[tuple[Any, torch.dtype], list[Owned]] = {}
        for parameter, group in everything:
            assert is_sharded(parameter)
            kinds.setdefault((parameter.device_mesh, parameter.dtype), []).append((parameter, group))
        for (mesh, _), matrices in kinds.items():
            num_ranks = mesh.size(mesh.ndim - 1)
            matrices.sort(key=lambda pair: -pair[0].numel())
            for start in range(0, len(matrices), num_ranks):
                self._turn(matrices[start : start + num_ranks], mesh.get_group(mesh.ndim - 1), mesh.device_type)

    def _turn(self, matrices: Sequence[Owned], group: Any, device_type: str) -> None:
        """Matrix i goes to rank i, which iterates and sends back; at most as many matrices as ranks."""
        rank, ledger = group.rank(), Ledger()
        shapes = [parameter.shape for parameter, _ in matrices]
        parts = [self._direction(parameter, own).to(device_type) for parameter, own in matrices]
        idle = [parts[0].new_empty(0)] * (group.size() - len(matrices))
        mine = [
            _part(shapes[rank], r, group.size()) if rank < len(shapes) else torch.Size([0]) for r in range(group.size())
        ]
        gathered = comm.all_to_all([*parts, *idle], mine, group, ledger, "muon")
        if rank < len(matrices):
            parameter, own = matrices[rank]
            whole = orthogonalise(torch.cat(gathered), own["num_steps"], self._work(parameter)).to(parameter.dtype)
            gathered = list(whole.split([shape[0] for shape in mine]))
        back = [_part(shape, rank, group.size()) for shape in shapes] + [torch.Size([0])] * len(idle)
        updates = comm.all_to_all(gathered, back, group, ledger, "muon")
        for (parameter, own), shape, update in zip(matrices, shapes, updates, strict=False):
            _apply(local_part(parameter), shape, update, own)


def _apply(rows: Tensor, shape: torch.Size, update: Tensor, group: dict[str, Any]) -> None:
    """In place: decay, then the step; shape is that of the whole matrix."""
    rows.mul_(1.0 - group["lr"] * group["weight_decay"])
    rows.add_(update.to(rows), alpha=-group["lr"] * RMS_OF_ADAMW * max(shape) ** 0.5)


def _part(shape: torch.Size, rank: int, num_ranks: int) -> torch.Size:
    """Shape of a rank's rows: as torch.chunk cuts them, which leaves the last ranks fewer or none."""
    most = -(-shape[0] // num_ranks)
    return torch.Size([min(shape[0], (rank + 1) * most) - min(shape[0], rank * most), shape[1]])


def _check_placement(parameter: Tensor) -> None:
    if not is_sharded(parameter):
        return
    from torch.distributed.tensor import Replicate, Shard

    *outer, inner = parameter.placements
    if inner != Shard(0) or any(placement != Replicate() for placement in outer):
        raise InputError(
            f"optim.name = 'muon' needs parameters that are whole or cut by rows; got placements {parameter.placements}; set "
            "optim.name = 'adamw', or another parallel.backend"
        )
