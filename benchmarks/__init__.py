"""Ratios, measured side by side: trimtab against the same engine unsteered, and against its peers."""
