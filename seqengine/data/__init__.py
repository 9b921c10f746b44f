"""From FASTA to the slice of a window that a rank reads."""
