"""Sharded, hashed checkpoints."""
