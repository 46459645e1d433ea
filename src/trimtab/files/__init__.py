"""File formats: trimtab's own and those of other programs."""
