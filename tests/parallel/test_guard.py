"""Guards: a mixer on a shard without its context, ranks that disagree, a rank that fails alone."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from seqengine.parallel.context import SequenceContext
from seqengine.parallel.guard import agree, check_together, guard_sequence_mixers
from seqengine.parallel.mesh import Mesh
from tests.parallel.hybrid import D, hybrid
from tests.ranks import run_ranks

CPU = torch.device("cpu")


class Mixer(nn.Module):
    """Runs whatever it is given, so that only the guard can object."""

    mixes_sequence = True

    def forward(self, x, ctx=None):
        return x.cumsum(1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer, self.plain = Mixer(), nn.Linear(D, D)

    def forward(self, x, **more):
        return self.plain(self.mixer(x, **more))


def some_mesh(group=None, size=2):
    """A mesh without processes."""
    return Mesh(0, size, 0, 1, None, group, CPU)


X = torch.ones(1, 4, D)


def test_a_mixer_on_a_shard_without_a_context_raises_until_the_guard_is_removed():
    model = Model()
    guard = guard_sequence_mixers(model, some_mesh())
    assert guard.names == ("mixer",)
    for more in ({}, {"ctx": None}):
        with pytest.raises(ValueError, match=r"mixer \(Mixer\): .* SequenceContext of its 2 ranks; got none"):
            model(X, **more)
    with pytest.raises(ValueError, match="one of the mesh's 2 sequence ranks; got one of 1"):
        model(X, ctx=SequenceContext.single(4))
    with pytest.raises(ValueError, match="got one of 3"):
        model.mixer(X, SequenceContext(None, 0, (0, 1, 2, 4)))
    guard.remove()
    guard.remove()
    assert model(X).shape == X.shape


def test_whole_sequences_need_no_context_and_take_none_of_several_ranks():
    model = Model()
    guard_sequence_mixers(model, Mesh.single(CPU))
    assert model(X).shape == X.shape
    assert model(X, ctx=SequenceContext.single(4)).shape == X.shape
    with pytest.raises(ValueError, match="1 sequence ranks; got one of 2"):
        model(X, ctx=SequenceContext(None, 0, (0, 2, 4)))


def test_modules_that_nobody_marked_can_be_named():
    model = nn.Sequential(nn.Linear(D, D), nn.GRU(D, D, batch_first=True))
    with pytest.raises(ValueError, match="Sequential must have a sequence mixer; got none"):
        guard_sequence_mixers(model, some_mesh())
    with pytest.raises(ValueError, match="mixers must be parts of the model; got 1 that are not"):
        guard_sequence_mixers(model, some_mesh(), mixers=[nn.GRU(D, D)])
    assert guard_sequence_mixers(model, some_mesh(), mixers=[model[1]]).names == ("1",)
    with pytest.raises(ValueError, match=r"1 \(GRU\): "):
        model(X)


def test_every_mixer_of_a_model_is_guarded():
    model = hybrid()
    assert len(guard_sequence_mixers(model, some_mesh()).names) == len(model.blocks)


def said(function):
    try:
        function()
    except Exception as error:  # noqa: BLE001  what it is, the test compares
        return f"{type(error).__name__}: {error}"
    return None


def _four_ranks(group):
    rank, mesh = group.rank(), Mesh.create(2, 2, CPU)
    pairs = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3], [0, 1], [2, 3])]
    across, again = pairs[rank % 2], pairs[2 + rank // 2]
    model = Model()
    guard_sequence_mixers(model, mesh)

    def run_with(sequence):
        return said(lambda: model(X, ctx=SequenceContext.even(sequence, 8)))

    def fails_on(ranks):
        def check():
            if rank in ranks:
                raise FileNotFoundError(f"no file {rank}")

        return check

    common = {"lr": 0.1, "layers": [1, 2], "dtype": torch.float32, "nothing": None}
    return {
        "own": run_with(mesh.sequence),
        "again": run_with(again),
        "across": run_with(across),
        "agree": said(lambda: agree(common, mesh, "config")),
        "differ": said(
            lambda: agree({**common, "lr": 0.1 + (rank == 2), **({"new": 1} if rank == 1 else {})}, mesh, "config")
        ),
        "fine": said(lambda: check_together(fails_on([]), mesh)),
        "fail": said(lambda: check_together(fails_on([1, 3]), mesh)),
        "after": mesh.sum(1.0)[0],
    }


def test_ranks_agree_on_contexts_configurations_and_failures_or_all_raise():
    for rank, found in enumerate(run_ranks(4, _four_ranks)):
        mine = [rank // 2 * 2, rank // 2 * 2 + 1]
        assert found["own"] is None
        assert found["again"] is None, "another group of the same ranks is as good"
        assert f"group, ranks {mine}; got one of ranks {[rank % 2, rank % 2 + 2]}." in found["across"]
        assert found["agree"] is None
        assert found["differ"] == (
            "ValueError: config must be the same on every rank; "
            "got rank 1: new = 1, not nothing; rank 2: lr = 1.1, not 0.1."
        )
        assert found["fine"] is None
        assert found["fail"] == "ValueError: rank 1: FileNotFoundError: no file 1; rank 3: FileNotFoundError: no file 3"
        assert found["after"] == 4.0, "no collective was left half done"


def test_one_process_agrees_with_itself_and_raises_what_is_raised():
    agree({"a": 1}, Mesh.single(CPU), "config")
    check_together(lambda: None, Mesh.single(CPU))
    with pytest.raises(KeyError, match="gone"):
        check_together(lambda: {}["gone"], Mesh.single(CPU))


def test_values_whose_text_differs_between_processes_are_refused():
    with pytest.raises(TypeError, match="got Linear"):
        agree({"layer": nn.Linear(1, 1)}, Mesh.single(CPU), "config")
