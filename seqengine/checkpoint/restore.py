"""The model of a checkpoint, verified, on any mesh."""

from seqengine.checkpoint.store import CheckpointStore, Loaded
from seqengine.config.run import RunConfig
from seqengine.errors import InputError
from seqengine.model import LanguageModel, build_model
from seqengine.parallel.mesh import Mesh
from seqengine.rundir import CheckpointTarget


def restore_model(target: CheckpointTarget, config: RunConfig, mesh: Mesh) -> tuple[LanguageModel, Loaded]:
    """A checkpoint's weights in a new model, whatever mesh wrote them, and where they came from. Every rank must call.

    Raises InputError if the checkpoint is damaged, or there is none.
    """
    store = CheckpointStore(target.run.checkpoints, mesh)
    model = build_model(config.model, seed=config.run.seed, params=config.precision.params, device=mesh.device)
    if target.checkpoint is None:
        loaded = store.load_latest(model, None)
        if loaded is None:
            raise InputError(f"{target.run.path}: must hold a checkpoint; it has none yet.")
        return model, loaded
    damage = store.damage(target.checkpoint)
    if damage:
        raise InputError(f"{target.checkpoint}: must be as it was saved; {'; '.join(damage)}.")
    return model, store.load(target.checkpoint, model, None)
