"""The model of a checkpoint, verified, on any mesh."""

from seqengine.checkpoint.state import model_tensors
from seqengine.checkpoint.store import CheckpointStore, Found
from seqengine.config.run import RunConfig
from seqengine.ema import PREFIX
from seqengine.errors import InputError
from seqengine.model import LanguageModel, build_model
from seqengine.parallel.mesh import Mesh
from seqengine.rundir import CheckpointTarget


def find_checkpoint(store: CheckpointStore, target: CheckpointTarget) -> Found:
    """The checkpoint that a user means, verified. Raises InputError if it is damaged, or there is none."""
    if target.checkpoint is not None:
        return store.verified(target.checkpoint)
    found = store.newest()
    if found is None:
        raise InputError(f"{target.run.path}: must hold a checkpoint; it has none yet.")
    return found


def restore_model(
    target: CheckpointTarget, config: RunConfig, mesh: Mesh, *, averaged: bool = False
) -> tuple[LanguageModel, Found]:
    """A checkpoint's weights in a new model, whatever mesh wrote them, and where they came from. Every rank must call.

    averaged: the averages of a run with optim.ema, in place of the trained weights.
    Raises InputError if the checkpoint is damaged, there is none, it is not of this model, or has no averages.
    """
    if averaged and not config.optim.ema:
        raise InputError(f"{target.run.path}: must be a run with optim.ema to have averaged weights; it has none.")
    store = CheckpointStore(target.run.checkpoints, mesh)
    found = find_checkpoint(store, target)
    model = build_model(config.model, seed=config.run.seed, params=config.precision.params, device=mesh.device)
    store.load(found.directory, model_tensors(model), prefixes=("model.",))
    if averaged:
        averages = {f"{PREFIX}{name}": parameter.detach() for name, parameter in model.named_parameters()}
        store.load(found.directory, averages, prefixes=(PREFIX,))
    return model, found
