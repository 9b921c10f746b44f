"""The public kernels, and nothing else. Local maths on one device's tensors: no process group, no config, no model."""

from seqengine.kernels.conv.op import long_conv, long_conv_bidirectional, short_conv
from seqengine.kernels.loss.op import linear_cross_entropy
from seqengine.kernels.modal.op import modal_conv, modal_filter

__all__ = ["linear_cross_entropy", "long_conv", "long_conv_bidirectional", "modal_conv", "modal_filter", "short_conv"]
