"""A steering put into a model's weights: what writes to the residual stream, what an edit makes of it, the files."""
