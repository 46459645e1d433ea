"""Per-request steering on an unmodified vLLM, with continuous batching, as an ordinary vLLM plugin.

A request's steering is checked and resolved in the front end (`frontend`). In the engine core (`core`) it separates
prefix cache blocks where necessary, and the request waits for free slots. In the workers (`steering_manager`) it acts
through an operator in the compiled graph, which reads buffers that are filled before each step.
"""
