"""Causal convolutions: short (depthwise, a few taps) and long (as long as the sequence)."""
