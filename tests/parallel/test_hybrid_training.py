"""A hybrid of all mixers trains the same on every mesh: losses, gradient norms and parameters of 20 steps."""

import pytest
import torch

from seqengine.parallel.mesh import Mesh, reduce_gradients
from tests.parallel.hybrid import History, hybrid, train
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CPU, STEPS = torch.device("cpu"), 20


def norm_of(model):
    return torch.stack([p.grad.norm() for p in model.parameters()]).norm()


def trained_on(mesh):
    return train(hybrid(), mesh, STEPS, reduce=lambda model: reduce_gradients(model, mesh), norm_of=norm_of)


def _train_on(group, shapes):
    return [trained_on(Mesh.create(*shape, CPU)) for shape in shapes]


@pytest.fixture(scope="module")
def one_process():
    return trained_on(Mesh.single(CPU))


def assert_same_run(actual: History, expected: History, what: str) -> None:
    for name in ("losses", "norms"):
        found, wanted = torch.tensor(getattr(actual, name)).double(), torch.tensor(getattr(expected, name)).double()
        worst = float(((found - wanted).abs() / wanted.abs()).max())
        assert worst <= 1e-10, f"{what}: {name} differ by {worst:.1e}"
    for name, parameter in expected.parameters.items():
        assert_close(actual.parameters[name], parameter, f"{what}: {name}", tolerance=1e-10)


@pytest.mark.parametrize(("ranks", "shapes"), [(8, [(8, 1), (4, 2)]), (8, [(2, 4), (1, 8)]), (3, [(1, 3)])], ids=str)
def test_every_mesh_trains_the_same_run(one_process, ranks, shapes):
    assert one_process.losses[-1] < one_process.losses[0]
    for rank, runs in enumerate(run_ranks(ranks, _train_on, shapes)):
        for shape, run in zip(shapes, runs, strict=True):
            assert_same_run(run, one_process, f"rank {rank} of {shape}")
