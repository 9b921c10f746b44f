"""The public functions on sharded sequences, and nothing else."""

from seqengine.parallel.context import SequenceContext
from seqengine.parallel.conv import long_conv, short_conv
from seqengine.parallel.exchange.halo import halo
from seqengine.parallel.exchange.scan import scan
from seqengine.parallel.exchange.transpose import transpose
from seqengine.parallel.loss import linear_cross_entropy
from seqengine.parallel.modal import modal_conv

__all__ = [
    "SequenceContext",
    "halo",
    "linear_cross_entropy",
    "long_conv",
    "modal_conv",
    "scan",
    "short_conv",
    "transpose",
]
