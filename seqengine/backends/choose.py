"""parallel.backend, made ready for a model on a mesh."""

from seqengine.backends.backend import Backend
from seqengine.backends.ddp import DataParallel
from seqengine.backends.fsdp2 import FullySharded
from seqengine.config.run import RunConfig
from seqengine.model import LanguageModel
from seqengine.parallel.mesh import Mesh


def make_backend(model: LanguageModel, config: RunConfig, mesh: Mesh) -> Backend:
    """Cut the model as parallel.backend says, compile its blocks if compile.enable says so, and make the optimiser.

    In a single process there is nothing to cut or to sum: every backend is the plain one. Every rank must call.
    """
    model.save_memory(config.activation.checkpoint, offload=config.activation.offload)
    if config.compile.enable:
        for block in model.each_block():
            block.compile(backend=config.compile.backend)
    name = config.parallel.backend
    if mesh.world is None or name == "none":
        return Backend(model, config, mesh)
    if name == "deepspeed":
        from seqengine.backends.zero import Zero

        return Zero(model, config, mesh)
    return {"ddp": DataParallel, "fsdp2": FullySharded}[name](model, config, mesh)
