"""The public kernels, and nothing else. Local maths on one device's tensors: no process group, no config, no model."""

from seqengine.kernels.attention.op import attention, merge_attention
from seqengine.kernels.conv.op import long_conv, long_conv_bidirectional, short_conv
from seqengine.kernels.conv.sparse import SparseSpectrum
from seqengine.kernels.delta_rule.op import delta_rule
from seqengine.kernels.delta_rule.summary import delta_summary
from seqengine.kernels.linear_attention.op import gla, simple_gla
from seqengine.kernels.loss.op import linear_cross_entropy
from seqengine.kernels.modal.op import modal_conv, modal_filter
from seqengine.kernels.monarch.op import MonarchFactors, dft_factors, inverse_dft_factors, monarch_conv
from seqengine.kernels.rnn.op import rnn

__all__ = [
    "MonarchFactors",
    "SparseSpectrum",
    "attention",
    "delta_rule",
    "delta_summary",
    "dft_factors",
    "gla",
    "inverse_dft_factors",
    "linear_cross_entropy",
    "long_conv",
    "long_conv_bidirectional",
    "merge_attention",
    "modal_conv",
    "modal_filter",
    "monarch_conv",
    "rnn",
    "short_conv",
    "simple_gla",
]
