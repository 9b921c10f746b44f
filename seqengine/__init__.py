"""seqengine: a training engine for very long sequences.

Four floors, imports point down only: launch -> seqengine -> parallel -> kernels.
"""

__version__ = "0.1.0"
