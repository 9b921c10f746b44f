"""Sequence mixers: (inputs, state) -> (outputs, state), one file each."""
