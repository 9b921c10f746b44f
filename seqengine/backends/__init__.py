"""Who holds which weights: the same step on replicated and on sharded models."""
