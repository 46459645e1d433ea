"""What Inspect (inspect_ai) loads through the entry point `inspect_ai`: the provider `trimtab/MODEL`, and a solver.

Inspect imports this module for every run, whatever the models, so nothing heavy is imported before a model is created.
"""

from __future__ import annotations

from trimtab.errors import TrimtabError

try:
    from inspect_ai.model import ModelAPI, modelapi
    from inspect_ai.solver import Generate, Solver, TaskState, solver
except ImportError as error:
    raise TrimtabError(f"Inspect isn't installed ({error}): pip install 'trimtab[inspect]'") from None


@modelapi(name="trimtab")
def trimtab() -> type[ModelAPI]:
    """The provider, for Inspect's registry."""
    from trimtab.evaluate.inspect_provider import SteeredModel

    return SteeredModel


@solver
def steered(key: str = "steer") -> Solver:
    """Generate under the steering that the sample's metadata names under `key` (`FILE[@LAYERS][:STRENGTH]`).

    A sample without that key gets the model's own steering; one with null isn't steered.
    """

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        if key not in (state.metadata or {}):
            return await generate(state)
        return await generate(state, extra_body={"steer": state.metadata[key]})

    return solve
