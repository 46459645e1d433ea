"""Bake a steering into a model's weights: the tensors that write to the residual stream, the maps, the files."""
