"""Rejection: whether a steered token is believable, and what to fall back on. Functions of logits, with no model."""
