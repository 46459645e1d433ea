from __future__ import annotations

import json

import pytest

from trimtab.evaluate import CONSTRAINTS, repeated_share
from trimtab.evaluate.constraints import (
    GERMAN_WORDS,
    OTHER_WORDS,
    has_title,
    is_bullets,
    is_capitals,
    is_german,
    is_json,
    is_sentence,
)

GOOD = {
    is_json: [
        '{"a": 1}',
        "[1, 2]",
        "{}",
        ' \n{"a": [null, true, -1.5e3, "}"]}\n',
        '```json\n{"a": "b"}\n```',
        '```\n["a"]\n```  ',
        '```JSON\n{"code": "x"}\n```',
        '{"text": "he said \\"no\\" {["}',
    ],
    has_title: ["<<A title>>\nText", "Text, and at its end <<a title>>", "<<<>>> <<yes>>", "<<Ä>>"],
    is_german: [
        "Der Himmel ist blau, weil die Luft das Licht der Sonne streut.",
        "Ja.",
        "Hier sind drei Tipps:\n1. Trinken Sie vor dem Schlafen keinen Kaffee.\n2. Lüften Sie das Zimmer.",
        "Ich empfehle dir das Buch „The Hound of the Baskervilles“, denn es ist spannend und nicht zu lang.",
    ],
    is_bullets: [
        "* one\n* two",
        "- one\n\n- two\n",
        "• one\n• two",
        "* one\n  and its second line\n* two",
        "- one\n    - nested\n- two",
        "* **Bold**: text\n* __more__",
    ],
    is_sentence: [
        "Cats purr because they are content.",
        "It costs 3.5 euros, e.g. at Mr. Smith's shop in St. Ives!",
        'She said: "No."',
        "Why not?",
        "J. R. R. Tolkien wrote it.",
    ],
    is_capitals: ["ALL OF IT, 3 TIMES!", "ÄÖ"],
}

BAD = {
    is_json: [
        "",
        "null",
        "3",
        '"a"',
        'Sure! {"a": 1}',
        '{"a": 1} I hope this helps.',
        '```json\n{"a": 1}\n```\nThis is JSON.',
        "{'a': 1}",
        '{"a": 1,}',
        '{"a": NaN}',
        '{"a": 1',
        '```json\n{"a": 1}',
        '```python\n{"a": 1}\n```'.replace("{", "x = {"),
        '```json\n{"a": 1}\n```\n```json\n{"b": 1}\n```',
        "[1}",
    ],
    has_title: ["", "Title: x", "<title>", "<<>>", "<<  >>", "<<a\nb>>", "<< open", "«Titel»", "<<<<<<<<<<"],
    is_german: [
        "",
        "!!!",
        "The sky is blue because the air scatters the light of the sun.",
        "I am in an old house, so was also an alter ego.",
        "De lucht is blauw omdat het licht van de zon wordt verstrooid.",
        "Le ciel est bleu parce que la lumière du soleil est diffusée.",
        "El cielo es azul porque la luz del sol se dispersa en la atmósfera.",
        'In German, "the sky is blue" is "Der Himmel ist blau".',
    ],
    is_bullets: [
        "",
        "* one",
        "Sure:\n* one\n* two",
        "* one\n* two\n\nI hope this helps.",
        "1. one\n2. two",
        "*one*\n*two*",
        "* * *\n* * *",
        "* *1. *\n* *2. *",
        "**\n* one\n* two",
        "-5 degrees\n-6 degrees",
        "  indented\n* one\n* two",
        "---\n---",
    ],
    is_sentence: ["", "One. Two.", "No end", "One\ntwo.", "Really?! Yes.", "It costs 3. Then 5."],
    is_capitals: ["", "123", "MOSTLY caps"],
}


@pytest.mark.parametrize(("check", "answer"), [(check, answer) for check, some in GOOD.items() for answer in some])
def test_accepts(check, answer):
    assert check(answer)


@pytest.mark.parametrize(("check", "answer"), [(check, answer) for check, some in BAD.items() for answer in some])
def test_refuses(check, answer):
    assert not check(answer)


def test_every_check_is_tried_and_none_takes_nothing_for_an_answer():
    assert set(CONSTRAINTS.values()) == set(GOOD) == set(BAD)
    assert not any(check("", cut=True) or check("  \n", cut=True) for check in CONSTRAINTS.values())


DOCUMENTS = [
    {"a": [1, -2.5e-3, {"b": None, "c": [True, False, []]}], "d": 'x\\ "y" \u00e9 {[', "": {}},
    [[], [[1], "a,b"], {"k": ":"}],
]


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"ensure_ascii": False}])
@pytest.mark.parametrize("fence", ["", "```json\n"])
def test_json_cut_anywhere_is_the_beginning_of_json(document, options, fence):
    text = json.dumps(document, **options)
    for end in range(1, len(text)):
        assert is_json(fence + text[:end], cut=True), text[:end]
        assert not is_json(fence + text[:end])


@pytest.mark.parametrize(
    "answer",
    [
        '{"a": 1} and',
        "{'a",
        "{a",
        '{"a" 1',
        '{"a": b',
        '{"a": 1, 2',
        "[1}",
        '{"a": `x',
        "Sure",
        '```json\n{"a": 1}\n``` I',
        '{"a": 1,}, {',
        '{"a": tru3',
        '"text',
        '{"a": "new\nline',
    ],
)
def test_what_no_continuation_can_save_is_not_json(answer):
    assert not is_json(answer, cut=True)


def test_a_cut_list_is_judged_by_what_is_there():
    assert is_bullets("* one and a ha", cut=True)
    assert is_bullets("* one\n*", cut=True)
    assert not is_bullets("*", cut=True)
    assert not is_bullets("Sure:\n* one", cut=True)


def test_a_cut_sentence_is_none():
    assert not is_sentence("It ends here.", cut=True)


def test_no_word_speaks_for_two_languages():
    assert not GERMAN_WORDS & OTHER_WORDS


def test_repeated_share():
    assert repeated_share("") == repeated_share("one two three") == 0
    assert repeated_share("one two three four five six seven") == 0
    assert repeated_share("a b c d a b c d") == pytest.approx(1 / 5)
    assert repeated_share("No no, NO! " * 20) > 0.9
    assert repeated_share("👏" * 20) > 0.9
    assert repeated_share("1 2 1 2 1 2 1 2") == pytest.approx(3 / 5)
    assert repeated_share("one two one two one two", n=2) == pytest.approx(3 / 5)
