"""The layer in front of vLLM's own server: API keys, a policy, an audit log, and reports of what steered an answer."""
