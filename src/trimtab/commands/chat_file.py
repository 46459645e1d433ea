"""A `trimtab chat` conversation in a file: JSON, written atomically, and validated when it is read."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trimtab.commands.chat_commands import ChatSetup, load_named_steering
from trimtab.commands.chat_state import ChatAnswer, Conversation, NamedSteering, SteeringRecord, Turn, steering_record
from trimtab.engines.answer import Dose
from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import check_target, write_atomically
from trimtab.text.text_files import read_text

KIND, VERSION = "trimtab chat", 1


def save_conversation(path: Path, conversation: Conversation, model: str) -> tuple[Conversation, list[Path]]:
    """Write the conversation, and next to it each steering that is on but in no file yet.

    Such a steering is written as `talk.pirate.safetensors` for `talk.json`. Returns the conversation with these files
    in it, and the files. Raises `TrimtabError` if a file can't be written there.
    """
    check_target(path, ".json")
    files = []
    for steered in conversation.active_steerings:
        if not steered.file:
            file = path.with_name(f"{path.stem}.{steered.name}.safetensors")
            conversation = save_made(file, conversation, steered)
            files.append(file)
    document = {"kind": KIND, "version": VERSION, "model": model, **conversation_document(conversation)}
    text = json.dumps(document, ensure_ascii=False, indent=2, allow_nan=False)
    write_atomically(path, text.encode("utf-8", "backslashreplace") + b"\n")
    return conversation, files


def save_made(path: Path, conversation: Conversation, steered: NamedSteering) -> Conversation:
    """Write a steering that was made, at strength 1; returns the conversation with this file in it.

    Raises `TrimtabError` if the file can't be written there.
    """
    from trimtab.files.steering_file import save_steering

    check_target(path, ".safetensors")
    save_steering(steered.steering, path)
    return conversation.with_saved_file(steered.name, path)


def conversation_document(conversation: Conversation) -> dict[str, Any]:
    """The settings and the turns as a JSON document."""
    settings = {
        "system": conversation.system,
        "steerings": [
            _steering_document(steering_record(steered), steered.layers) for steered in conversation.active_steerings
        ],
        "emphasized": list(conversation.emphasized),
        "compare": conversation.compare,
        "max_tokens": conversation.max_tokens,
        "temperature": conversation.temperature,
        "seed": conversation.seed,
        "asked": conversation.answer_count,
    }
    return {"settings": settings, "turns": [turn_document(turn) for turn in conversation.turns]}


def turn_document(turn: Turn) -> dict[str, Any]:
    """A question, its answer, and the settings under which it was answered."""
    return {
        "question": turn.question,
        "answer": asdict(turn.answer),
        **({} if turn.unsteered is None else {"unsteered": asdict(turn.unsteered)}),
        "system": turn.system,
        "steerings": [_steering_document(on, on.layers) for on in turn.steerings],
        "emphasized": list(turn.emphasized),
        "seed": turn.seed,
        **({"images": list(turn.images)} if turn.images else {}),
    }


def load_conversation(path: Path, setup: ChatSetup) -> tuple[Conversation, list[str]]:
    """Load a conversation, with remarks about changes since: another model, a steering file that has changed.

    Raises `TrimtabError` for a file of another kind or a malformed one, and for a steering that is missing or doesn't
    fit this model.
    """
    try:
        document = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, TrimtabError):
            raise
        raise TrimtabError(f"{path}: not JSON: {error}; give a file that /save wrote") from None
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise TrimtabError(f"{path} doesn't contain a conversation; give a file that /save wrote")
    if document.get("version") != VERSION:
        raise TrimtabError(
            f"{path} is of version {document.get('version')!r}, and this trimtab reads {VERSION}; use a newer one"
        )
    fields = _Fields(path, document, "")
    remarks: list[str] = []
    model = fields.text("model")
    if model != setup.lm.name:
        remarks.append(f"it was held with {model}, not {setup.lm.name}, so the tokens of its answers aren't known")
    settings = fields.part("settings")
    temperature = settings.number("temperature", optional=True)
    if temperature is not None and temperature <= 0:
        raise settings.malformed("temperature", "a number above 0, or null")
    empty = Conversation(
        system=settings.text("system", optional=True),
        emphasized=tuple(settings.texts("emphasized")),
        compare=settings.flag("compare"),
        max_tokens=settings.count("max_tokens", least=1),
        temperature=temperature,
        seed=settings.count("seed", optional=True),
        answer_count=settings.count("asked"),
    )
    for steering_fields in settings.parts("steerings"):
        steered, remark = _read_steering(steering_fields, empty, setup)
        empty = empty.with_steering(steered)
        remarks += [remark] if remark else []
    turns = tuple(_turn(entry, known=model == setup.lm.name) for entry in fields.parts("turns"))
    return replace(empty, turns=turns), remarks


def _read_steering(fields: _Fields, conversation: Conversation, setup: ChatSetup) -> tuple[NamedSteering, str]:
    file = fields.text("file")
    steered = load_named_steering(setup, conversation, Path(file), fields.number("strength"))
    layers = fields.counts("layers", optional=True)
    steered = replace(steered, name=fields.text("name"), layers=layers)
    if layers is not None:
        steered.steering.only(layers)
    changed = steering_record(steered).digest != fields.text("digest")
    return steered, f"{file} has changed since" if changed else ""


def _turn(fields: _Fields, *, known: bool) -> Turn:
    steerings = tuple(
        SteeringRecord(
            entry.text("name"),
            entry.text("file"),
            entry.number("strength"),
            entry.counts("layers") or (),
            entry.text("digest"),
        )
        for entry in fields.parts("steerings")
    )
    return Turn(
        question=fields.text("question"),
        answer=_read_answer(fields.part("answer"), known=known),
        system=fields.text("system", optional=True),
        steerings=steerings,
        emphasized=tuple(fields.texts("emphasized")),
        seed=fields.count("seed", optional=True),
        unsteered=_read_answer(fields.part("unsteered"), known=known) if "unsteered" in fields.values else None,
        images=tuple(fields.texts("images")) if "images" in fields.values else (),
    )


def _steering_document(record: SteeringRecord, layers: tuple[int, ...] | None) -> dict[str, Any]:
    return {**asdict(record), "layers": None if layers is None else list(layers)}


def _read_answer(fields: _Fields, *, known: bool) -> ChatAnswer:
    doses = None
    if fields.values.get("doses") is not None:
        doses = tuple(
            Dose(entry.count("layer"), entry.number("ratio"), entry.count("tokens"), entry.text("kind"))
            for entry in fields.parts("doses")
        )
    ids = fields.counts("token_ids") or ()
    return ChatAnswer(
        fields.text("text"),
        fields.text("finish_reason"),
        fields.count("prompt_tokens"),
        ids if known else (),
        tuple(fields.texts("edits")),
        doses,
    )


class _Fields:
    """The fields of an object in a file; each read raises `TrimtabError` if a field has the wrong type."""

    def __init__(self, path: Path, values: Any, where: str) -> None:
        self.path = path
        self.where = where
        if not isinstance(values, dict):
            raise TrimtabError(
                f"{path}: {where.rstrip('.') or 'the document'} isn't an object; give a file that /save wrote"
            )
        self.values: dict[str, Any] = values

    def malformed(self, name: str, wanted: str) -> TrimtabError:
        return TrimtabError(f"{self.path}: {self.where}{name} isn't {wanted}; give a file that /save wrote")

    def _get(self, name: str, optional: bool, fits: Any, wanted: str) -> Any:
        value = self.values.get(name)
        if (optional and value is None) or fits(value):
            return value
        raise self.malformed(name, wanted + (", or null" if optional else ""))

    def text(self, name: str, *, optional: bool = False) -> Any:
        return self._get(name, optional, lambda value: isinstance(value, str), "a string")

    def number(self, name: str, *, optional: bool = False) -> Any:
        value = self._get(name, optional, _is_number, "a number")
        return None if value is None else float(value)

    def count(self, name: str, *, least: int = 0, optional: bool = False) -> Any:
        return self._get(name, optional, lambda value: _is_count(value, least), f"a whole number from {least}")

    def flag(self, name: str) -> bool:
        return self._get(name, False, lambda value: isinstance(value, bool), "true or false")

    def texts(self, name: str) -> list[str]:
        return self._get(
            name, False, lambda value: _all(value, lambda item: isinstance(item, str)), "a list of strings"
        )

    def counts(self, name: str, *, optional: bool = False) -> tuple[int, ...] | None:
        fits = lambda value: _all(value, lambda item: _is_count(item, 0))  # noqa: E731
        value = self._get(name, optional, fits, "a list of whole numbers")
        return None if value is None else tuple(value)

    def part(self, name: str) -> _Fields:
        return _Fields(self.path, self.values.get(name), f"{self.where}{name}.")

    def parts(self, name: str) -> list[_Fields]:
        values = self._get(name, False, lambda value: isinstance(value, list), "a list")
        return [_Fields(self.path, value, f"{self.where}{name}[{i}].") for i, value in enumerate(values)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _all(value: Any, fits: Any) -> bool:
    return isinstance(value, list) and all(fits(item) for item in value)
