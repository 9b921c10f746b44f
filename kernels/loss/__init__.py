"""Losses that never hold the whole logits."""
