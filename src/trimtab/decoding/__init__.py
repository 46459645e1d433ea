"""Decoding: rejection of implausible steered tokens, as functions of logits without a model; and grammars."""
