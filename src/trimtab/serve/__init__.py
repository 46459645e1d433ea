"""Steered generation for other programs, over HTTP."""
