"""The forecast of `trimtab learn --forecast` for a direction, before any generation: works, unlikely, or can't say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError
from trimtab.text.pairs import Pair, as_prompt

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.steering import Steering

MOST_PROMPTS = 6


def forecast_report(lm: LM, pairs: Sequence[Pair], steering: Steering) -> tuple[str, dict[str, Any] | None]:
    """The forecast as a line and as values; if it can't be made, the reason and `None`.

    Args:
        lm: The model.
        pairs: The pairs that the steering was learned from.
        steering: The learned steering, a mean difference.
    """
    from trimtab.tune.forecast import forecast, predictors

    try:
        prediction = forecast(predictors(lm, pairs, steering, _own_prompts(pairs)))
    except TrimtabError as error:
        return f"forecast: can't say ({error})", None
    return str(prediction), {
        "verdict": prediction.verdict,
        "chance": prediction.chance,
        "trusted": prediction.trusted,
        "auc": prediction.auc,
        "results": prediction.results,
        "worked": prediction.worked,
        "predictors": asdict(prediction.predictors),
    }


def _own_prompts(pairs: Sequence[Pair]) -> list[Any]:
    """Some of the pairs' own prompts, without what is learned; the package's queries if they have none."""
    from trimtab.data import queries

    own = [pair.negative if pair.shape == "prompts" else pair.prompt for pair in pairs if pair.shape != "texts"]
    return [as_prompt(words) for words in dict.fromkeys(own) if words][:MOST_PROMPTS] or list(
        queries("tune")[:MOST_PROMPTS]
    )
