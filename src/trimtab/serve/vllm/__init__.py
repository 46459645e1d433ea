"""The door in front of vLLM's own server: keys, a policy, an audit log, and what answers say of their steering."""
