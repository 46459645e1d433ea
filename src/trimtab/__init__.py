"""trimtab steers language models: it edits their activations while they generate.

The public names are imported on first use, so that `import trimtab` and the command line start without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.baking.bake import bake
    from trimtab.decoding.rejection import Rejection
    from trimtab.errors import TrimtabError, UnsupportedError, UntestedVersionWarning
    from trimtab.evaluate.audit import audit
    from trimtab.files.autoencoder import load_features
    from trimtab.files.export import export
    from trimtab.files.foreign import FormatWarning
    from trimtab.files.hub import from_pretrained, push_to_hub
    from trimtab.files.load import load
    from trimtab.files.objects import from_repeng, from_steering_vectors, to_repeng, to_steering_vectors
    from trimtab.files.steering_file import save_steering as save
    from trimtab.learn.probe import learn_probe
    from trimtab.lm import LM, DoseWarning, MismatchWarning
    from trimtab.making.make import make, make_from_pairs
    from trimtab.methods.actadd import learn_actadd
    from trimtab.methods.bipo import learn_bipo
    from trimtab.methods.caa import learn_caa
    from trimtab.methods.cap import learn_cap
    from trimtab.methods.cast import learn_cast, learn_condition
    from trimtab.methods.directer import directer
    from trimtab.methods.distill import learn_distill
    from trimtab.methods.hpr import learn_hpr
    from trimtab.methods.icv import learn_icv
    from trimtab.methods.inferaligner import learn_inferaligner
    from trimtab.methods.instaboost import instaboost
    from trimtab.methods.instruct import learn_instruct, learn_many, steering_from, steerings_from
    from trimtab.methods.iti import learn_iti
    from trimtab.methods.loreft import learn_loreft
    from trimtab.methods.pasta import pasta
    from trimtab.methods.random import learn_random
    from trimtab.methods.repe import learn_repe
    from trimtab.methods.reps import learn_reps
    from trimtab.methods.sadi import learn_sadi
    from trimtab.methods.safety import learn_safety
    from trimtab.methods.seka import Highlight, learn_seka, seka
    from trimtab.methods.spotlight import spotlight
    from trimtab.methods.steermoe import learn_steermoe
    from trimtab.methods.sttp import learn_sttp
    from trimtab.methods.tda import learn_tda
    from trimtab.methods.word_logit import learn_word_logit
    from trimtab.methods.words import learn_length, learn_word
    from trimtab.steering import (
        Ablate,
        Add,
        AddScaled,
        Always,
        BiasScores,
        Card,
        Edit,
        Gate,
        MaskNeurons,
        Operation,
        Positions,
        ReadWrite,
        Rotate,
        RotateInPlane,
        RotatePredicted,
        RouteExperts,
        ScaleElements,
        ScaleKeys,
        ScaleScores,
        SetProjection,
        Site,
        Steering,
        TargetMass,
        Threshold,
        by_keys,
        directional_ablation,
    )
    from trimtab.steering.monitors import Monitor
    from trimtab.text.pairs import Pair, read_pairs
    from trimtab.text.spans import Part, Pattern, Phrase

__version__ = "0.1.0"

__all__ = [
    "LM",
    "Ablate",
    "Add",
    "AddScaled",
    "Always",
    "BiasScores",
    "Card",
    "DoseWarning",
    "Edit",
    "FormatWarning",
    "Gate",
    "Highlight",
    "MaskNeurons",
    "MismatchWarning",
    "Monitor",
    "Operation",
    "Pair",
    "Part",
    "Pattern",
    "Phrase",
    "Positions",
    "ReadWrite",
    "Rejection",
    "Rotate",
    "RotateInPlane",
    "RotatePredicted",
    "RouteExperts",
    "ScaleElements",
    "ScaleKeys",
    "ScaleScores",
    "SetProjection",
    "Site",
    "Steering",
    "TargetMass",
    "Threshold",
    "TrimtabError",
    "UnsupportedError",
    "UntestedVersionWarning",
    "audit",
    "bake",
    "by_keys",
    "directer",
    "directional_ablation",
    "export",
    "from_pretrained",
    "from_repeng",
    "from_steering_vectors",
    "instaboost",
    "learn_actadd",
    "learn_bipo",
    "learn_caa",
    "learn_cap",
    "learn_cast",
    "learn_condition",
    "learn_distill",
    "learn_hpr",
    "learn_icv",
    "learn_inferaligner",
    "learn_instruct",
    "learn_iti",
    "learn_length",
    "learn_loreft",
    "learn_many",
    "learn_random",
    "learn_probe",
    "learn_repe",
    "learn_reps",
    "learn_sadi",
    "learn_safety",
    "learn_seka",
    "learn_steermoe",
    "learn_sttp",
    "learn_tda",
    "learn_word",
    "learn_word_logit",
    "load",
    "load_features",
    "make",
    "make_from_pairs",
    "pasta",
    "push_to_hub",
    "read_pairs",
    "save",
    "seka",
    "spotlight",
    "steering_from",
    "steerings_from",
    "to_repeng",
    "to_steering_vectors",
]

_NAMES_BY_MODULE = {
    "trimtab.baking.bake": ("bake",),
    "trimtab.decoding.rejection": ("Rejection",),
    "trimtab.errors": ("TrimtabError", "UnsupportedError", "UntestedVersionWarning"),
    "trimtab.evaluate.audit": ("audit",),
    "trimtab.files.autoencoder": ("load_features",),
    "trimtab.files.export": ("export",),
    "trimtab.files.foreign": ("FormatWarning",),
    "trimtab.files.hub": ("from_pretrained", "push_to_hub"),
    "trimtab.files.load": ("load",),
    "trimtab.files.objects": ("from_repeng", "from_steering_vectors", "to_repeng", "to_steering_vectors"),
    "trimtab.learn.probe": ("learn_probe",),
    "trimtab.lm": ("LM", "DoseWarning", "MismatchWarning"),
    "trimtab.making.make": ("make", "make_from_pairs"),
    "trimtab.methods.cast": ("learn_cast", "learn_condition"),
    "trimtab.methods.directer": ("directer",),
    "trimtab.methods.instaboost": ("instaboost",),
    "trimtab.methods.instruct": ("learn_instruct", "learn_many", "steering_from", "steerings_from"),
    "trimtab.methods.pasta": ("pasta",),
    "trimtab.methods.seka": ("Highlight", "learn_seka", "seka"),
    "trimtab.methods.spotlight": ("spotlight",),
    "trimtab.methods.words": ("learn_length", "learn_word"),
    "trimtab.text.spans": ("Part", "Pattern", "Phrase"),
    "trimtab.steering.monitors": ("Monitor",),
    "trimtab.text.pairs": ("Pair", "read_pairs"),
}
_PUBLIC = {name: ("trimtab.steering", name) for name in __all__}  # the default module
_PUBLIC |= {name: (f"trimtab.methods.{name[6:]}", name) for name in __all__ if name.startswith("learn_")}
_PUBLIC |= {name: (home, name) for home, names in _NAMES_BY_MODULE.items() for name in names}
_PUBLIC["save"] = ("trimtab.files.steering_file", "save_steering")


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    home, there = _PUBLIC[name]
    value = globals()[name] = getattr(import_module(home), there)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
