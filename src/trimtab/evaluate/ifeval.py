"""IFEval: instructions that code can check (Zhou et al., 2311.07911), and IFBench's (2507.02833) with the same
functions.

The checkers are those of the package `if-verifiable`, the official ones repackaged. This module changes two things. A
verdict depends only on the instruction and the answer: randomness in the checkers is seeded. And an answer whose
language can't be detected doesn't follow an instruction about language, unless the official rule is requested.

The checkers use randomness in two places. If the letter to be counted isn't a letter (the prompts 1122 and 1129 ask for
"#" and "!"), the official checker draws a random one instead; and langdetect samples the answer.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimtab.errors import TrimtabError
from trimtab.evaluate.punkt import ensure_punkt, has_resource
from trimtab.evaluate.records import ArmPrompt, Record, with_system
from trimtab.steering import Steering
from trimtab.text.columns import unused_prompt_columns
from trimtab.text.tables import parse_json, read_rows

if TYPE_CHECKING:
    from trimtab.engines.transformers.generate import Generation

Detection = Literal["required", "official"]
"""How to score an answer whose language can't be detected: as wrong, or (the official rule) as right."""

HUB = "google/IFEval"
RANDOM_LETTERS = (1122, 1129)
"""The keys of the official prompts whose verdict depends on a letter that the checker draws at random."""

NEEDS_PUNKT = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
CASES: dict[str, Callable[[str], bool]] = {
    "language:response_language": lambda _: True,
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
}
"""The types that check the language, and what else each checks."""

TAGGER = "taggers/averaged_perceptron_tagger_eng"
MORE_DATA = {"words:start_verb": TAGGER, "ratio:stop_words": "corpora/stopwords"}


@dataclass(frozen=True)
class IFEvalItem:
    """A prompt and the instructions in it.

    `item` is its unique name, `key` that of the query it was made from; several items may share a key. `types` and
    `kwargs` are the instructions to be checked, in the same order.
    """

    item: str
    key: str
    prompt: str
    types: tuple[str, ...]
    kwargs: tuple[Mapping[str, Any], ...]
    prompt_without_instruction: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Which instructions an answer follows: as it is (`strict`), or after one of eight lenient edits (`loose`)."""

    types: tuple[str, ...]
    strict: tuple[bool, ...]
    loose: tuple[bool, ...]

    @property
    def scores(self) -> dict[str, float]:
        """`strict` and `loose` for the whole prompt, 1 or 0, and `strict/<number>/<type>` and `loose/…` for each."""
        scores = {"strict": float(all(self.strict)), "loose": float(all(self.loose))}
        for number, kind in enumerate(self.types):
            scores[f"strict/{number}/{kind}"] = float(self.strict[number])
            scores[f"loose/{number}/{kind}"] = float(self.loose[number])
        return scores


# ---- reading -----------------------------------------------------------------------------------------------


def read_ifeval(path: str | Path | None = None, limit: int | None = None) -> list[IFEvalItem]:
    """The items of a file in the official format (JSONL, or as `read_rows` reads it), or of `google/IFEval` on the Hub.

    At most `limit` are taken. A row has `prompt`, `instruction_id_list` and `kwargs` (one per instruction), optionally
    a `key`, and in paired files `prompt_without_instruction`. Any data that the checkers of these instructions need is
    fetched here, before anything is generated.

    Raises `TrimtabError` for a file or a row that can't be read, an unknown type of instruction, arguments that don't
    fit it, or if the package of checkers isn't installed.
    """
    checkers()
    name = HUB if path is None else str(path)
    rows = _from_hub() if path is None else list(read_rows(Path(path), default_suffix=".jsonl"))
    rows = rows if limit is None else rows[:limit]
    if not rows:
        raise TrimtabError(f"{name} has no rows; expected one prompt per line")
    raw = [_item(row, where, number) for number, (where, row) in enumerate(rows, 1)]
    _prepare({kind for item in raw for kind in item.types})
    seen: Counter[str] = Counter()
    items = []
    for item in raw:
        seen[item.key] += 1
        items.append(item if seen[item.key] == 1 else replace(item, item=f"{item.key}.{seen[item.key]}"))
    return items


def _from_hub() -> list[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        return [(f"{HUB}:{number}", row) for number, row in enumerate(load_dataset(HUB, split="train"), 1)]
    except Exception as error:  # offline, gated, moved: each library underneath raises its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrimtabError(f"can't get {HUB} from the Hub: {reason}. Name a file with the same rows instead") from None


def _item(row: Any, where: str, number: int) -> IFEvalItem:
    if not isinstance(row, Mapping):
        raise TrimtabError(f"{where}: an object with prompt, instruction_id_list and kwargs was expected")
    prompt: Any = row.get("prompt")
    types, kwargs = (_list_of(row.get(name), f"{where}: {name}") for name in ("instruction_id_list", "kwargs"))
    bare = row.get("prompt_without_instruction")
    if unsupported_keys := unused_prompt_columns(row, prompt):
        raise TrimtabError(
            f"{where}: {unsupported_keys[0]!r} isn't supported here; write it into the prompt, or remove it"
        )
    for name, text in (("prompt", prompt), ("prompt_without_instruction", "-" if bare is None else bare)):
        if not isinstance(text, str) or not text.strip():
            raise TrimtabError(f"{where}: {name} is empty or not text")
    if not isinstance(kwargs, list) or not kwargs or not all(isinstance(entry, Mapping) for entry in kwargs):
        raise TrimtabError(f"{where}: kwargs must be a list with one object for each instruction")
    if not isinstance(types, list) or len(types) != len(kwargs) or not all(isinstance(entry, str) for entry in types):
        raise TrimtabError(f"{where}: instruction_id_list must be a list of strings, as long as kwargs")
    given_arguments = [{name: value for name, value in entry.items() if value is not None} for entry in kwargs]
    for kind, arguments in zip(types, given_arguments, strict=True):
        try:
            _checker(kind, arguments, prompt)
        except TrimtabError as error:
            raise TrimtabError(f"{where}: {error}") from None
    key = str(row["key"]) if row.get("key") is not None else f"row {number}"
    return IFEvalItem(key, key, prompt, tuple(types), tuple(given_arguments), bare)


def _list_of(value: Any, where: str) -> Any:
    """A list; tables store it as JSON text."""
    return parse_json(value, where) if isinstance(value, str) else value


def _prepare(types: set[str]) -> None:
    """Fetch the data that the checkers of these types read. Raises `TrimtabError` if it isn't available."""
    official, _ = checkers()
    if any(kind in NEEDS_PUNKT or kind not in official for kind in types):
        ensure_punkt()
    for kind in sorted(types & set(MORE_DATA)):
        if not has_resource(MORE_DATA[kind]):
            name = MORE_DATA[kind].rpartition("/")[2]
            raise TrimtabError(f"checking {kind} needs NLTK data; get it with `python -m nltk.downloader {name}`")


# ---- judging -----------------------------------------------------------------------------------------------


def judge(item: IFEvalItem, answer: str, *, detection: Detection = "required") -> Verdict:
    """Which of the item's instructions the answer follows. An empty answer follows none.

    Raises `TrimtabError` if the package of checkers, or data that they need, is missing.
    """
    strict, loose = [], []
    for kind, arguments in zip(item.types, item.kwargs, strict=True):
        with _seeded(kind, arguments):
            checker = _checker(kind, arguments, item.prompt)
            strict.append(_follows(checker, kind, answer, detection))
            loose.append(strict[-1] or any(_follows(checker, kind, text, detection) for text in _variants(answer)))
    return Verdict(item.types, tuple(strict), tuple(loose))


def follows(
    instruction_id: str,
    kwargs: Mapping[str, Any],
    answer: str,
    *,
    loose: bool = True,
    prompt: str = "",
    detection: Detection = "required",
) -> bool:
    """Whether an answer follows one instruction, as decided by `judge`.

    `prompt` matters only to the few IFBench types that read it. Raises `TrimtabError` for an unknown type, or arguments
    that don't fit it.
    """
    _prepare({instruction_id})
    given_arguments = {name: value for name, value in kwargs.items() if value is not None}
    item = IFEvalItem("", "", prompt, (instruction_id,), (given_arguments,))
    verdict = judge(item, answer, detection=detection)
    return (verdict.loose if loose else verdict.strict)[0]


def instruction_text(item: IFEvalItem) -> str:
    """The item's instructions in the benchmark's own words, joined by spaces."""
    descriptions = []
    for kind, arguments in zip(item.types, item.kwargs, strict=True):
        with _seeded(kind, arguments):
            descriptions.append(str(_build(_checker_class(kind)(kind), kind, arguments)).strip())
    return " ".join(descriptions)


@cache
def checkers() -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The checker classes by type of instruction: IFEval's, and IFBench's.

    Raises `TrimtabError` if the package isn't installed.
    """
    state = random.getstate()
    try:
        import nltk

        original_download = nltk.download
        nltk.download = lambda *_, **__: False  # importing IFBench's would download data
        try:
            from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT as IFBENCH
            from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT as IFEVAL
        finally:
            nltk.download = original_download
    except ImportError as error:
        raise TrimtabError(
            f"the checkers of IFEval aren't installed ({error}); get them, for Python 3.11 and later, with"
            ' pip install "trimtab[eval]"'
        ) from None
    finally:
        random.setstate(state)  # these imports use the random generator
    return IFEVAL, IFBENCH


def _checker_class(kind: str) -> Any:
    official, more = checkers()
    if kind not in official and kind not in more:
        alike = [name for name in (*official, *more) if name.partition(":")[0] == kind.partition(":")[0]]
        raise TrimtabError(f"unknown type of instruction {kind!r}; known: {', '.join(alike or official)}")
    return official.get(kind) or more[kind]


def _checker(kind: str, arguments: Mapping[str, Any], prompt: str) -> Any:
    """A checker for one instruction. Raises `TrimtabError` for arguments that are unknown or missing."""
    checker = _checker_class(kind)(kind)
    with _seeded(kind, arguments):
        _build(checker, kind, arguments)
        official, _ = checkers()
        lacking = set(checker.get_instruction_args_keys()) - set(arguments) if kind in official else set()
        if lacking:  # the checker would draw it at random
            raise TrimtabError(f"{kind} needs {', '.join(sorted(lacking))}")
        if "prompt" in (checker.get_instruction_args() or {}):
            _build(checker, kind, {"prompt": prompt})
    return checker


def _build(checker: Any, kind: str, arguments: Mapping[str, Any]) -> Any:
    try:
        return checker.build_description(**arguments)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise TrimtabError(f"{kind} can't take {json.dumps(dict(arguments), default=str)}: {error}") from None


def _follows(checker: Any, kind: str, text: str, detection: Detection) -> bool:
    if not text.strip():
        return False
    if kind in CASES and not _has_language(text):
        return detection == "official" and CASES[kind](text)
    official, _ = checkers()
    try:
        return bool(checker.check_following(text))
    except Exception:
        if kind in official:
            raise
        return False  # some of IFBench's checkers index parts that the answer doesn't have


def _has_language(text: str) -> bool:
    import langdetect

    try:
        langdetect.detect(text)
    except langdetect.LangDetectException:
        return False
    return True


def _variants(answer: str) -> list[str]:
    from if_verifiable.common import get_loose_transformations

    return get_loose_transformations(answer)


@contextmanager
def _seeded(kind: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Seed the random generators by the instruction, and restore their state afterwards."""
    from langdetect import DetectorFactory

    state, seed = random.getstate(), DetectorFactory.seed
    random.seed(json.dumps([kind, dict(arguments)], sort_keys=True, default=str))
    DetectorFactory.seed = 0
    try:
        yield
    finally:
        random.setstate(state)
        DetectorFactory.seed = seed


# ---- in an evaluation --------------------------------------------------------------------------------------


def ifeval_requests(
    items: Sequence[IFEvalItem],
    arms: Mapping[str, Steering | None],
    systems: Mapping[str, str] | None = None,
    *,
    without_instruction: bool = False,
) -> list[ArmPrompt]:
    """One request per item and arm. `systems[arm]` is the arm's system message.

    Raises `TrimtabError` if `without_instruction` is set and an item has no such prompt.
    """
    systems = systems or {}
    requests = []
    for item in items:
        prompt = item.prompt_without_instruction if without_instruction else item.prompt
        if prompt is None:
            raise TrimtabError(
                f"item {item.item} has no prompt_without_instruction; use a file with one, or keep the instruction"
            )
        requests += [
            ArmPrompt(arm, item.item, with_system(prompt, systems.get(arm)), steering, item.key)
            for arm, steering in arms.items()
        ]
    return requests


def with_repeated_instructions(items: Sequence[IFEvalItem]) -> list[IFEvalItem]:
    """The items with their instructions repeated at the end: how far wording alone goes."""
    return [replace(item, prompt=f"{item.prompt}\n\n{instruction_text(item)}") for item in items]


def scorer(
    items: Sequence[IFEvalItem], *, detection: Detection = "required"
) -> Callable[[ArmPrompt, Generation], dict[str, float]]:
    """The scoring function for `answer`: `Verdict.scores` of the request's item."""
    by_name = {item.item: item for item in items}
    return lambda request, answer: judge(by_name[request.item], answer.text, detection=detection).scores


def by_instruction(records: Sequence[Record]) -> list[Record]:
    """One record for each instruction of each record, with its own `strict` and `loose`.

    The means over these are the benchmark's instruction-level accuracies. The instructions of one query form a group.
    """
    expanded = []
    for record in records:
        for name, value in record.scores.items():
            kind, _, rest = name.partition("/")
            if kind == "strict" and rest:
                scores = {"strict": value, "loose": record.scores[f"loose/{rest}"]}
                group = record.item if record.group is None else record.group
                expanded.append(replace(record, item=f"{record.item}/{rest}", scores=scores, group=group))
    return expanded


def type_of(record: Record) -> str:
    """The type of instruction of a record from `by_instruction`."""
    return record.item.rpartition("/")[2]
