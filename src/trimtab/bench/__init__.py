"""`trimtab bench`: compares all methods on one model at equal divergence, with the prompt and random directions."""

from trimtab.bench.plan import Plan, Settings, plan
from trimtab.bench.results import Results, results_of
from trimtab.bench.run import bench

__all__ = ["Plan", "Results", "Settings", "bench", "plan", "results_of"]
