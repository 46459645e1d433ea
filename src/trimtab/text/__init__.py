"""Words to token positions."""
