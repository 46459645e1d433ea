"""Benchmarks as ratios, from interleaved runs: trimtab against the same engine unsteered, and against peers."""
