"""The 25 types of instructions that IFEval checks (Zhou et al., arXiv 2311.07911), with phrasings written for this
package: some to learn from, others to test with.

A type may have parameters, such as a number of bullet points, which phrasings contain as placeholders in braces.
`values` maps parameters to their values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.data.read import read_json
from trimtab.errors import TrimtabError

Value = str | int
Values = Mapping[str, Value]

KINDS = ("format", "length", "words")
SIDES = ("learn", "test")

LANGUAGES = {
    "Arabic": "ar",
    "Bengali": "bn",
    "Bulgarian": "bg",
    "Chinese": "zh-cn",
    "Dutch": "nl",
    "English": "en",
    "Finnish": "fi",
    "French": "fr",
    "German": "de",
    "Gujarati": "gu",
    "Hindi": "hi",
    "Italian": "it",
    "Japanese": "ja",
    "Kannada": "kn",
    "Korean": "ko",
    "Marathi": "mr",
    "Nepali": "ne",
    "Persian": "fa",
    "Polish": "pl",
    "Portuguese": "pt",
    "Punjabi": "pa",
    "Russian": "ru",
    "Spanish": "es",
    "Swahili": "sw",
    "Swedish": "sv",
    "Tamil": "ta",
    "Telugu": "te",
    "Thai": "th",
    "Turkish": "tr",
    "Ukrainian": "uk",
    "Urdu": "ur",
    "Vietnamese": "vi",
}
"""The codes of languages, as used by language detectors, by name."""

COMMON_LANGUAGES = (
    "German",
    "French",
    "Spanish",
    "Italian",
    "Portuguese",
    "Russian",
    "Arabic",
    "Hindi",
    "Chinese",
    "Japanese",
)

ALIASES: dict[str, tuple[str, dict[str, Value]]] = {
    "json": ("detectable_format:json_format", {}),
    "title": ("detectable_format:title", {}),
    "bullets": ("detectable_format:number_bullet_lists", {}),
    "sentence": ("length_constraints:number_sentences", {"relation": "less than", "n": 2}),
    "german": ("language:response_language", {"language": "German"}),
    "capitals": ("change_case:english_capital", {}),
}
"""The types of the instructions of `instructions()`, with the values of their parameters."""


@dataclass(frozen=True)
class Parameter:
    """A parameter: IFEval's name for it, its kind (text, number, relation, letter, language), and example values."""

    name: str
    argument: str
    kind: str
    values: tuple[Value, ...]
    is_list: bool

    def as_argument(self, value: Value) -> Any:
        """The value as an argument for IFEval's checkers. Raises `TrimtabError` for an unknown language."""
        if self.kind == "language":
            if value not in LANGUAGES:
                raise TrimtabError(f"{value!r} isn't a known language; known: {', '.join(LANGUAGES)}")
            return LANGUAGES[str(value)]
        return [value] if self.is_list else value


@dataclass(frozen=True)
class InstructionType:
    """One type: IFEval's name for it, its kind (one of `KINDS`), its parameters and its phrasings."""

    name: str
    kind: str
    parameters: tuple[Parameter, ...]
    learn: tuple[str, ...]
    test: tuple[str, ...]

    def phrasings(self, side: str, values: Values | None = None) -> list[str]:
        """The phrasings of one of `SIDES`, filled in.

        A parameter without an entry in `values` cycles through its example values, so the phrasings are repeated as
        often as the longest list of values. Raises `TrimtabError` for a parameter that the type doesn't have.
        """
        set_values = dict(values or {})
        if unknown := sorted(set(set_values) - {p.name for p in self.parameters}):
            parameter_names = ", ".join(p.name for p in self.parameters) or "none"
            raise TrimtabError(f"{self.name} has no parameter {unknown[0]!r}; parameters: {parameter_names}")
        templates: tuple[str, ...] = {"learn": self.learn, "test": self.test}[side]
        unset_parameters = [p for p in self.parameters if p.name not in set_values]
        rounds = max((len(p.values) for p in unset_parameters), default=1)
        filled = []
        for round_index in range(rounds):
            for i, template in enumerate(templates):
                example_values = {p.name: p.values[(round_index + i) % len(p.values)] for p in unset_parameters}
                filled.append(template.format(**{**example_values, **set_values}))
        return filled

    def arguments(self, values: Values, query: str | None = None) -> dict[str, Any]:
        """The arguments for IFEval's checkers, for these values.

        The type that repeats the prompt needs the `query`. Raises `TrimtabError` for a missing value.
        """
        if self.name == "combination:repeat_prompt":
            if query is None:
                raise TrimtabError(f"{self.name} is checked against the query; pass the query")
            return {"prompt_to_repeat": query}
        if missing := [p.name for p in self.parameters if p.name not in values]:
            raise TrimtabError(f"{self.name} needs a value for {', '.join(missing)}")
        return {p.argument: p.as_argument(values[p.name]) for p in self.parameters}


def instruction_types() -> dict[str, InstructionType]:
    """The 25 types by their IFEval names."""
    return {name: _type(name, stored) for name, stored in read_json("types.json").items()}


def instruction_type(name: str) -> InstructionType:
    """The type of that name (IFEval's, or one of `ALIASES`). Raises `TrimtabError` if there is none."""
    types = instruction_types()
    name = ALIASES[name][0] if name in ALIASES else name
    if name not in types:
        raise TrimtabError(f"there is no type of instructions {name!r}; types: {', '.join(types)}")
    return types[name]


def length_phrasings(length: str) -> Sequence[str]:
    """Phrasings that ask for `"concise"` or `"verbose"` answers. Raises `KeyError` for anything else."""
    phrasings: dict[str, list[str]] = read_json("lengths.json")
    return tuple(phrasings[length])


def _type(name: str, stored: dict[str, Any]) -> InstructionType:
    parameters = tuple(
        Parameter(key, entry["argument"], entry.get("kind", "text"), tuple(entry["values"]), bool(entry.get("list")))
        for key, entry in stored["parameters"].items()
    )
    return InstructionType(name, stored["kind"], parameters, tuple(stored["learn"]), tuple(stored["test"]))
