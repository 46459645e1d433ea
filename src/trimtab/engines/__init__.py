"""Where steerings run."""
