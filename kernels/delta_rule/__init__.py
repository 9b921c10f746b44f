"""Linear recurrences whose state is corrected, not only added to: DeltaNet and Gated DeltaNet."""
