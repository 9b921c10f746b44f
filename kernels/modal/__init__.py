"""Modal (diagonal state-space) filters: sums of exponentials, and convolution with them through an N-number state."""
