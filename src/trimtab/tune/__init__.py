"""Chooses a steering's strength and layer: a search whose answer can be "don't steer"."""

from trimtab.tune.candidates import Candidate, Setting, default_layers, grid
from trimtab.tune.dose import Dosed, at_dose
from trimtab.tune.feasibility import BudgetWarning
from trimtab.tune.guard import Guard
from trimtab.tune.learned import learn_operations
from trimtab.tune.letters import tune_letters
from trimtab.tune.nats import AtNats, InexactWarning, NotMonotoneWarning, at_nats
from trimtab.tune.split import Split, split_by_query
from trimtab.tune.sweep import Sweep
from trimtab.tune.tune import Tuned, tune

__all__ = [
    "AtNats",
    "BudgetWarning",
    "Candidate",
    "Dosed",
    "Guard",
    "InexactWarning",
    "NotMonotoneWarning",
    "Setting",
    "Split",
    "Sweep",
    "Tuned",
    "at_dose",
    "at_nats",
    "default_layers",
    "grid",
    "learn_operations",
    "split_by_query",
    "tune",
    "tune_letters",
]
