"""The public functions on sharded sequences, and nothing else."""

from seqengine.parallel.attention import attention
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.conv import long_conv, long_conv_bidirectional, short_conv
from seqengine.parallel.delta_rule import delta_rule
from seqengine.parallel.exchange.halo import halo
from seqengine.parallel.exchange.pipeline import pipeline
from seqengine.parallel.exchange.relayout import relayout
from seqengine.parallel.exchange.ring import ring
from seqengine.parallel.exchange.scan import scan
from seqengine.parallel.exchange.transpose import transpose
from seqengine.parallel.linear_attention import gla, simple_gla
from seqengine.parallel.loss import linear_cross_entropy
from seqengine.parallel.modal import modal_conv
from seqengine.parallel.rnn import rnn

__all__ = [
    "SequenceContext",
    "attention",
    "delta_rule",
    "gla",
    "halo",
    "linear_cross_entropy",
    "long_conv",
    "long_conv_bidirectional",
    "modal_conv",
    "pipeline",
    "relayout",
    "ring",
    "rnn",
    "scan",
    "short_conv",
    "simple_gla",
    "transpose",
]
