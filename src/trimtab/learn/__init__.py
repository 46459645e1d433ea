"""Activations to directions."""
