"""The default engine: any causal language model that transformers loads."""
