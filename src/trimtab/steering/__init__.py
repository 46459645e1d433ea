"""Steerings as plain data, independent of any model or engine."""

from trimtab.steering.ablation import directional_ablation
from trimtab.steering.attention import BiasScores, ScaleScores, ScoreOperation, TargetMass
from trimtab.steering.card import Adapter, Card, ModelId
from trimtab.steering.elements import HoldElements, MaskNeurons, ScaleElements
from trimtab.steering.emphasis import emphasis
from trimtab.steering.gates import Always, Gate, Threshold
from trimtab.steering.keys import ScaleKeys, by_keys
from trimtab.steering.operations import Ablate, Add, Directed, Operation, SetProjection
from trimtab.steering.positions import Positions
from trimtab.steering.read_write import ReadWrite
from trimtab.steering.rotations import Rotate, RotateInPlane, RotatePredicted
from trimtab.steering.routing import RouteExperts
from trimtab.steering.scaled import AddScaled
from trimtab.steering.site import Site
from trimtab.steering.steering import Edit, Steering

__all__ = [
    "Ablate",
    "Add",
    "AddScaled",
    "Always",
    "BiasScores",
    "Card",
    "Directed",
    "Edit",
    "Gate",
    "HoldElements",
    "Adapter",
    "ModelId",
    "MaskNeurons",
    "Operation",
    "Positions",
    "ReadWrite",
    "Rotate",
    "RotateInPlane",
    "RotatePredicted",
    "RouteExperts",
    "ScaleElements",
    "ScaleKeys",
    "ScaleScores",
    "ScoreOperation",
    "SetProjection",
    "Site",
    "Steering",
    "TargetMass",
    "Threshold",
    "by_keys",
    "directional_ablation",
    "emphasis",
]
