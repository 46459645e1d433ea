"""vLLM, unmodified: per-request steering under continuous batching, as an ordinary plugin of it.

A request for steering is checked and resolved in the front end (`frontend`), keeps apart what it must in the prefix
cache and waits for room in the engine core (`core`), and acts in the workers (`rig`), through an operator in the
compiled graph that reads buffers filled before each step.
"""
