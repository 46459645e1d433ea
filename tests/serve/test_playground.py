"""The page's functions in this process: requests, answers side by side, colours, sweeps, lessons, refusals."""

from __future__ import annotations

import ast
import asyncio
import base64
import hashlib
import html
import json
import re
import shlex
import time
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from trimtab.errors import TrimtabError
from trimtab.serve.audit import Audit
from trimtab.serve.playground import show
from trimtab.serve.playground.callers import caller, in_words
from trimtab.serve.playground.choices import (
    AS_LEARNED,
    REJECTIONS,
    SLOTS,
    PanelState,
    panel_state,
    phrases,
    prompt_of,
    reorder_slot_values,
    request,
    span_of,
)
from trimtab.serve.playground.colours import (
    REJECTION,
    coloured,
    compute_cosines,
    display_modes,
    legend_html,
    shared_color_limit,
)
from trimtab.serve.playground.conversation import Conversation, Turn
from trimtab.serve.playground.learn_requests import (
    METHODS,
    LearnResult,
    as_row,
    build_learn_request,
    learn,
    learn_result_html,
)
from trimtab.serve.playground.marks import find_marks
from trimtab.serve.playground.paths import is_page
from trimtab.serve.playground.request_group import RequestGroup, Side
from trimtab.serve.playground.snippets import as_curl, as_python, body_of
from trimtab.serve.playground.sweep import numbers, sweep_of, whole_numbers
from trimtab.serve.policy import ANYBODY, Key, Policy
from trimtab.serve.refusals import Refusal
from trimtab.serve.schema import ChatRequest
from trimtab.text.pairs import digest, pairs_from_rows

TEXT = "The sea is wide and blue."
PAIRS = [{"prompt": f"{ask}?", "positive": "yes yes", "negative": "no no"} for ask in ("What", "Why", "Who")]


@pytest.fixture
def service(make_service: Callable[..., Any]) -> Any:
    made = make_service(learn=True)
    made.scheduler.start()
    return made


def ask(service: Any, *sides: tuple[PanelState, bool], key: Key = ANYBODY, text: str = TEXT) -> list[Side]:
    """The answers to the same text, chosen so, steered or not."""

    async def run() -> list[Side]:
        requests = [
            request(service, choice, prompt_of(service, choice, [], text), steered=steered) for choice, steered in sides
        ]
        asking = RequestGroup(service, key, requests)
        async for _ in asking.run():
            pass
        return asking.sides

    return asyncio.run(run())


class TestChoices:
    def test_the_panel_in_its_order(self) -> None:
        strengths, layers = [1.5, -2, 0, 0], [AS_LEARNED, 3, AS_LEARNED, AS_LEARNED]
        rest = ["wide\n\n wide \nblue", "always", 0.25, " Be brief. ", 20.0, 0.5, 7]
        choice = panel_state([["s0", "s2"], *strengths, *layers, *rest])
        assert choice.steering == (("s0", 1.5, AS_LEARNED), ("s2", -2.0, 3))
        assert (choice.phrases, choice.system, choice.max_tokens, choice.seed) == (("wide", "blue"), "Be brief.", 20, 7)
        assert choice.fields == {
            "steering": [{"name": "s0", "strength": 1.5}, {"name": "s2", "strength": -2.0, "layer": 3}],
            "emphasize": ["wide", "blue"],
            "rejection": {"beta": 0.25},
        }

    @pytest.mark.parametrize(
        ("rejection", "marked", "expected"),
        [
            (REJECTIONS[0], (), None),
            (REJECTIONS[0], ("sea",), {"beta": 0.5}),
            (REJECTIONS[1], (), {"beta": 0.5}),
            (REJECTIONS[2], (), None),
            (REJECTIONS[2], ("sea",), False),
        ],
    )
    def test_rejection(self, rejection: str, marked: tuple[str, ...], expected: Any) -> None:
        assert PanelState(phrases=marked, rejection=rejection).fields.get("rejection") == expected

    def test_slots_keep_their_values_when_others_leave(self) -> None:
        assert reorder_slot_values(["a", "b"], ["b", "c"], [2.0, 3.0, 9, 9], 1.0) == [3.0, 1.0, *[1.0] * (SLOTS - 2)]

    def test_sliders_end_where_the_policy_does(self) -> None:
        assert span_of(-100, 100) == (-4, 4)
        assert span_of(0, 2) == (0, 2)
        assert span_of(10, 20) == (10, 20)

    def test_phrases_are_lines(self) -> None:
        assert phrases(None) == phrases(" \n") == ()
        assert phrases("in one sentence\nno commas") == ("in one sentence", "no commas")


class TestAnswers:
    def test_both_sides_are_what_the_library_gives(self, service: Any, tiny_lm: Any, steerings: Path) -> None:
        from trimtab import load

        choice = PanelState((("s0", 1.5, AS_LEARNED), ("s2", 1.0, AS_LEARNED)), max_tokens=12)
        plain, steered = ask(service, (choice, False), (choice, True))
        total = 1.5 * load(steerings / "s0.safetensors") + load(steerings / "s2.safetensors")
        prompt = [{"role": "user", "content": TEXT}]
        (a,), (b,) = tiny_lm.generate(prompt, max_new_tokens=12), tiny_lm.generate(prompt, total, max_new_tokens=12)
        assert (plain.text, steered.text) == (a.text, b.text)
        assert a.text != b.text
        assert steered.ids == b.token_ids
        assert steered.done is not None
        assert steered.done.applied.dose == pytest.approx(b.applied.dose, rel=0.1)
        assert [(steering.name, steering.strength) for steering in steered.steerings] == [("s0", 1.5), ("s2", 1.0)]
        assert plain.steerings == ()

    def test_at_another_layer(self, service: Any, tiny_lm: Any, steerings: Path) -> None:
        from trimtab import load

        (own,), (moved,) = (
            ask(service, (PanelState((("s0", 2.0, layer),), max_tokens=8), True)) for layer in (AS_LEARNED, 3)
        )
        steering = 2.0 * load(steerings / "s0.safetensors").at_layer(3)
        (answer,) = tiny_lm.generate([{"role": "user", "content": TEXT}], steering, max_new_tokens=8)
        assert moved.ids == answer.token_ids != own.ids
        assert moved.steerings[0].layer == 3
        with pytest.raises(Refusal, match="layers 0 to 3"):
            ask(service, (PanelState((("s0", 2.0, 9),)), True))

    def test_only_what_acts_at_one_layer_moves(self, service: Any, tiny_lm: Any) -> None:
        from tiny import direction

        from trimtab import Add, Edit, Site, Steering

        both = Steering(tuple(Edit(Site(layer), Add(direction(1)[:32])) for layer in (0, 1)))
        service.library.add("both", both, "learned")
        with pytest.raises(Refusal, match="acts at 0, 1"):
            ask(service, (PanelState((("both", 1.0, 2),)), True))
        with pytest.raises(TrimtabError, match="acts at none"):
            Steering().at_layer(1)

    def test_a_model_without_a_template_continues_texts(
        self, service: Any, tiny_lm: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tiny_lm.tokenizer, "chat_template", None)
        choice = PanelState(phrases=("wide",), rejection=REJECTIONS[2], max_tokens=6)
        chat = request(service, choice, prompt_of(service, choice, [{"role": "user", "content": "Who?"}], TEXT))
        assert as_curl(chat, "http://x", keys=False).startswith("curl http://x/v1/completions ")
        plain, steered = ask(service, (choice, False), (choice, True))
        (a,) = tiny_lm.generate(TEXT, max_new_tokens=6)
        (b,) = tiny_lm.generate([TEXT], emphasize=["wide"], rejection=False, max_new_tokens=6)
        assert (plain.ids, steered.ids) == (a.token_ids, b.token_ids)

    def test_they_go_on_from_their_own_words(self, service: Any) -> None:
        talk = Conversation()
        choice = PanelState((("s0", 3.0, AS_LEARNED),), system="Be kind.", max_tokens=6)
        talk.turns.append(Turn("Why?", (), *ask(service, (choice, False), (choice, True), text="Why?")))
        plain, steered = (prompt_of(service, choice, talk.history(steered=s), "Who?") for s in (False, True))
        assert [m["role"] for m in plain] == ["system", "user", "assistant", "user"]
        assert plain[2]["content"] == talk.turns[0].plain.text != talk.turns[0].steered.text == steered[2]["content"]

    def test_stopping_frees_the_rows_and_is_written_down(
        self, make_service: Callable[..., Any], tmp_path: Path
    ) -> None:
        log = tmp_path / "audit.jsonl"
        service = make_service(audit=Audit(log))
        service.scheduler.start()
        choice = PanelState((("s0", 1.0, AS_LEARNED),), max_tokens=64)

        async def run() -> RequestGroup:
            requests = [
                request(service, choice, prompt_of(service, choice, [], TEXT), steered=s) for s in (False, True)
            ]
            asking = RequestGroup(service, ANYBODY, requests)
            async for sides in asking.run():
                if len(sides[1].ids) > 2:
                    asking.stop()
            return asking

        asking = asyncio.run(run())
        assert 2 < len(asking.sides[1].ids) < 64
        until = time.monotonic() + 30
        while service.scheduler.running and time.monotonic() < until:
            time.sleep(0.01)
        assert service.scheduler.running == service.scheduler.queued == 0
        until = time.monotonic() + 30
        while len(log.read_text().splitlines()) < 4 and time.monotonic() < until:
            time.sleep(0.01)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert [line["event"] for line in lines] == ["begun"] * 2 + ["ended"] * 2
        lines = lines[2:]
        assert all(line["tokens"][0] > 2 for line in lines)
        assert [(line["key"], line["route"], line["outcome"]) for line in lines] == [("anybody", "/", "cancelled")] * 2
        assert [steering["name"] for steering in lines[1]["steering"]] == ["s0"]
        assert lines[0]["steering"] == []
        assert "prompt" not in lines[0]


class TestPolicy:
    @pytest.fixture
    def guarded(self, make_service: Callable[..., Any]) -> Any:
        digest = lambda name: hashlib.sha256(name.encode()).digest()  # noqa: E731
        alice = Key("alice", digest("alice"), frozenset({"s0"}), (0, 2), add=False)
        bob = Key("bob", digest("bob"), add=True)
        service = make_service(policy=Policy((alice, bob), (("s7", 1.0),), (-3, 3)), learn=True)
        service.scheduler.start()
        return service

    def test_who_has_no_key_gets_nothing(self, guarded: Any) -> None:
        for secret in (None, "", " "):
            with pytest.raises(Refusal, match="enter your API key"):
                caller(guarded, secret)
        with pytest.raises(Refusal, match="isn't known"):
            caller(guarded, "eve")
        assert caller(guarded, " alice ").name == "alice"

    def test_a_key_has_its_steerings_and_its_range(self, guarded: Any) -> None:
        alice = caller(guarded, "alice")
        (side,) = ask(guarded, (PanelState((("s0", 2.0, AS_LEARNED),), max_tokens=4), True), key=alice)
        assert [(steering.name, steering.always) for steering in side.steerings] == [("s7", True), ("s0", False)]
        for name, strength, words in (("s1", 1.0, "no steering 's1'"), ("s0", 2.5, "from 0 to 2")):
            with pytest.raises(Refusal, match=words):
                ask(guarded, (PanelState(((name, strength, AS_LEARNED),)), True), key=alice)
        assert {value.partition("@")[0] for _, value in display_modes(guarded, alice)[3:]} == {"s0", "s7"}
        with pytest.raises(Refusal, match="no steering 's1'"):
            asyncio.run(compute_cosines(guarded, alice, [side], "s1@1"))

    def test_what_is_always_on_is_not_rejected(self, guarded: Any) -> None:
        with pytest.raises(Refusal, match="always on can't be rejected"):
            ask(guarded, (PanelState(phrases=("sea",), max_tokens=4), True), key=caller(guarded, "bob"))

    def test_learning_is_for_keys_that_may_add(self, guarded: Any) -> None:
        lesson = build_learn_request("mine", "caa", "\n".join(map(json.dumps, PAIRS)), "1")
        with pytest.raises(Refusal, match="may not add"):
            study(guarded, caller(guarded, "alice"), lesson)
        assert study(guarded, caller(guarded, "bob"), lesson)[-1].loaded.name == "mine"

    def test_nothing_on_the_page_answers_without_a_key(self, guarded: Any) -> None:
        pytest.importorskip("gradio", reason="the page needs gradio: pip install 'trimtab[serve]'")
        from trimtab.serve.playground.page import make_blocks

        panel = [["s0"], *[1.0] * SLOTS, *[AS_LEARNED] * SLOTS, "", REJECTIONS[2], 0.5, "", 8, 0.0, 0]
        talk = Conversation([Turn(TEXT)])
        inputs = {
            "speak": (TEXT, talk, "nothing", *panel),
            "regenerate": (1, talk, "nothing", True, *panel),
            "request_snippets": (None, TEXT, talk, *panel),
            "tinted": (talk, "s0@0"),
            "find_phrases": (TEXT, talk, *panel),
            "run": ("s0", "0, 1", "", TEXT, Conversation(), *panel),
            "study": ("\n".join(map(json.dumps, PAIRS)), "mine", METHODS[0], ""),
            "create": ("talk like a pirate", "", "", "mine", True),
            "choose": (["s0"], [], *panel[1 : 2 * SLOTS + 1]),
            "arrive": (Conversation(), ["s0"], [], *panel[1 : 2 * SLOTS + 1]),
            "admit": (Conversation(), "mine", ["s0"], [], *panel[1 : 2 * SLOTS + 1]),
        }
        inputs["pick"] = ([], *panel[1 : 2 * SLOTS + 1])
        harmless = {"halt", "forget", "append", "<lambda>"}
        functions = {
            function.name: function.fn for function in make_blocks(guarded).fns.values() if function.fn is not None
        }
        assert set(functions) == set(inputs) | harmless

        async def answer_to(name: str) -> Any:
            outcome = functions[name]("eve", *inputs[name])
            if hasattr(outcome, "__aiter__"):
                return [step async for step in outcome][-1]
            return await outcome if asyncio.iscoroutine(outcome) else outcome

        for name in inputs:
            assert "API key isn't known" in html.unescape("".join(map(str, asyncio.run(answer_to(name))))), name
        assert guarded.scheduler.steps == 0
        assert guarded.library.get("mine") is None


class TestMoves:
    def test_the_last_move_is_answered_whatever_arrives_last(self, service: Any) -> None:
        pytest.importorskip("gradio", reason="the page needs gradio: pip install 'trimtab[serve]'")
        from trimtab.serve.playground.page import make_blocks

        again = next(function.fn for function in make_blocks(service).fns.values() if function.name == "regenerate")
        assert again is not None

        def move(talk: Conversation, number: int, strength: float) -> Any:
            rest = ("", REJECTIONS[2], 0.5, "", 8, 0.0, 0)
            return again("", number, talk, "nothing", True, ["s0"], *[strength] * SLOTS, *[AS_LEARNED] * SLOTS, *rest)

        async def answered(talk: Conversation, *moves: tuple[int, float]) -> None:
            async def moved(number: int, strength: float) -> None:
                async for _ in move(talk, number, strength):
                    pass

            await asyncio.gather(*(moved(*arguments) for arguments in moves))

        for order in permutations([(1, 0.6), (2, 0.5), (3, 0.4)]):
            talk = Conversation([Turn(TEXT)])
            asyncio.run(answered(talk, *order))
            assert [steering.strength for steering in talk.turns[-1].steered.steerings] == [0.4], order
            assert talk.number == 1, order  # and the others weren't asked
            before = talk.turns[-1].steered
            asyncio.run(answered(talk, (2, 0.5)))  # long after it
            assert talk.turns[-1].steered is before


class TestEmphasis:
    def test_phrases_are_looked_for(self, service: Any) -> None:
        prompt = prompt_of(service, PanelState(), [], TEXT)
        there, missing = find_marks(service, prompt, ("wide and blue", "wide and red"), chat=True)
        assert there.tokens > 0
        assert not there.error
        assert "'wide and red' isn't in the prompt" in missing.error
        shown = show.marks([there, missing])
        assert "found" in shown
        assert "tt-missing" in shown

    def test_an_answer_with_a_trace_is_coloured_by_it(self, service: Any) -> None:
        choice = PanelState((("s0", 2.0, AS_LEARNED),), ("wide and blue",), max_tokens=10)
        plain, steered = ask(service, (choice, False), (choice, True))
        assert plain.done is not None
        assert plain.done.trace is None
        assert steered.done is not None
        assert steered.done.trace is not None
        shown = coloured(service, steered, REJECTION, 1.0)
        opened = [step for step in steered.done.trace.steps if step.open]
        assert shown.count("<span class=") == len(opened) > 0
        assert (
            re.sub("<[^>]*>", "", shown)
            .replace("&lt;", "<")
            .replace("&gt;", ">")
            .replace("&#x27;", "'")
            .replace("&quot;", '"')
            .replace("&amp;", "&")
            == steered.text
        )
        assert "steered" in legend_html([plain, steered], REJECTION, 1.0)
        assert "No answer here" in legend_html([plain], REJECTION, 1.0)

    def test_a_phrase_that_is_missing_asks_nothing(self, service: Any) -> None:
        choice = PanelState(phrases=("purple",), max_tokens=4)
        with pytest.raises(Refusal, match="isn't in the prompt"):
            ask(service, (choice, False), (choice, True))
        assert service.scheduler.running == service.scheduler.queued == 0


class TestColours:
    def test_cosines_are_those_of_the_tokens_in_their_place(self, service: Any, tiny_lm: Any, steerings: Path) -> None:
        import torch

        from trimtab import load

        (side,) = ask(service, (PanelState((("s1", 1.0, AS_LEARNED),), max_tokens=6), True))
        (colour,) = [value for _, value in display_modes(service, ANYBODY) if value.startswith("s1@")]
        asyncio.run(compute_cosines(service, ANYBODY, [side], colour))
        cosines = side.cosines[colour]
        with torch.no_grad():
            hidden = tiny_lm.model(torch.tensor([[*side.prompt, *side.ids]]), output_hidden_states=True).hidden_states
        direction = load(steerings / "s1.safetensors").edits[0].operation.direction
        expected = torch.cosine_similarity(hidden[cosines.layer + 1][0, len(side.prompt) :], direction[None], dim=-1)
        assert cosines.cosines == pytest.approx(expected.tolist(), abs=1e-5)
        assert "".join(cosines.pieces) == side.text
        full = shared_color_limit([side], colour)
        assert coloured(service, side, colour, full).count("<span") == sum(bool(piece) for piece in cosines.pieces)
        assert f"{full:+.2f}" in legend_html([side], colour, full)


class TestSweep:
    def test_a_grid_is_row_by_row(self, service: Any) -> None:
        sweep = sweep_of("s0", "-1, 0 2", "1; 2")
        requests = sweep.requests(service, PanelState(max_tokens=4), TEXT)
        points = [[(edit.layer, edit.strength) for edit in each.steering] for each in requests]
        assert points == [[(1, -1)], [], [(1, 2)], [(2, -1)], [], [(2, 2)]]
        assert sweep.rows() == ["layer 1", "layer 2"]
        assert sweep_of("s0", "1", "").rows() == [""]

    def test_what_makes_no_sweep(self, service: Any) -> None:
        for name, strengths, layers, words in (
            (None, "1", "", "choose a steering"),
            ("s0", " ", "", "type the strengths"),
            ("s0", "1, two", "", "'two' isn't a number"),
            ("s0", "1", "1.5", "whole number"),
            ("s0", "1", "-1", "whole number"),
            ("s0", "1", "inf", "'inf' isn't a number"),
            ("s0", "nan", "1", "'nan' isn't a number"),
        ):
            with pytest.raises(TrimtabError, match=words):
                sweep_of(name, strengths, layers)
        many = sweep_of("s0", " ".join(map(str, range(17))), "")
        with pytest.raises(TrimtabError, match="17 answers; at most 16"):
            many.requests(service, PanelState(), TEXT)
        with pytest.raises(ValidationError):
            sweep_of("s0", "1e9", "").requests(service, PanelState(), TEXT)
        with pytest.raises(TrimtabError, match="32,000 characters"):
            prompt_of(service, PanelState(), [], "x" * 32_001)
        assert numbers("\N{MINUS SIGN}1, 1,1", "strengths") == (-1, 1)
        assert whole_numbers("") == ()


def study(service: Any, key: Key, lesson: Any) -> list[Any]:
    async def run() -> list[Any]:
        return [step async for step in learn(service, key, lesson)]

    return asyncio.run(run())


class TestLearning:
    @pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
    def test_pairs_in_any_form(self, service: Any, kind: str) -> None:
        text = {
            "jsonl": "\n".join(map(json.dumps, PAIRS)),
            "json": json.dumps(PAIRS),
            "csv": "prompt,positive,negative\r\n" + "".join(f"{p['prompt']},yes yes,no no\r\n" for p in PAIRS),
        }[kind]
        *steps, lesson = study(service, ANYBODY, build_learn_request(f"by-{kind}", METHODS[0], text, "1, 2"))
        assert steps[0] == (0, 3)
        assert steps[-1] == (3, 3)
        assert isinstance(lesson, LearnResult)
        assert lesson.loaded.steering.layers == (1, 2)
        assert lesson.loaded.steering.card.method == "caa"
        assert service.library.get(f"by-{kind}") is lesson.loaded
        (side,) = ask(service, (PanelState(((f"by-{kind}", 1.0, AS_LEARNED),), max_tokens=4), True))
        assert side.steerings[0].digest == lesson.loaded.digest

    def test_the_file_to_save_is_the_steering(self, service: Any, tmp_path: Path) -> None:
        from trimtab import load

        rows = [{"prompt": f"{ask}? Shout!", "prompt_without_instruction": f"{ask}?"} for ask in ("What", "Why", "Who")]
        lesson = study(service, ANYBODY, build_learn_request("loud", METHODS[0], "\n".join(map(json.dumps, rows)), ""))[
            -1
        ]
        assert lesson.loaded.steering.card.method == "instruct"
        page = learn_result_html(lesson)
        (data,) = re.findall(r'href="data:application/octet-stream;base64,([^"]+)"', page)
        assert 'download="loud.safetensors"' in page
        path = tmp_path / "loud.safetensors"
        path.write_bytes(base64.b64decode(data))
        assert load(path) == lesson.loaded.steering

    def test_what_cannot_be_learned(self, service: Any, make_service: Callable[..., Any]) -> None:
        text = "\n".join(map(json.dumps, PAIRS))
        for name, pairs, layers, words in (
            ("", text, "", "give the steering a name"),
            ("x", "", "", "pairs is empty"),
            ("x", "prompt,positive,negative\n", "", "has no rows"),
            ("x", '{"prompt": "a"', "", "pairs:1: not JSON"),
            ("x", f'{text}\n{{"positive": "a"}}', "", "pairs:4: not a pair"),
            ("x", "positive,negative\na\n", "", "2 columns expected"),
            ("x", text, "one", "'one' isn't a number"),
        ):
            with pytest.raises(TrimtabError, match=words):
                build_learn_request(name, METHODS[0], pairs, layers)
        with pytest.raises(ValidationError):
            build_learn_request("../x", METHODS[0], text, "")
        with pytest.raises(TrimtabError, match=r"layer 99|layers 0 to 3"):
            study(service, ANYBODY, build_learn_request("x", "caa", text, "99"))
        with pytest.raises(Refusal, match="already"):
            study(service, ANYBODY, build_learn_request("s0", "caa", text, ""))
        with pytest.raises(TrimtabError, match="for the method caa"):
            study(service, ANYBODY, build_learn_request("x", "instruct", text, ""))
        with pytest.raises(Refusal, match="trimtab serve --learn"):
            study(make_service(), ANYBODY, build_learn_request("x", "caa", text, ""))

    def test_messages_and_system_prompts_are_learned_from(self, service: Any) -> None:
        talk = [{"role": "user", "content": "Why?"}]
        rows = [{"system": "Be kind.", "prompt": talk, "positive": "yes yes", "negative": "no", "id": 7, "seen": None}]
        study_request = build_learn_request("spoken", METHODS[0], "\n".join(map(json.dumps, rows)), "1")
        lesson = study(service, ANYBODY, study_request)[-1]
        assert lesson.loaded.steering.card.data == digest(pairs_from_rows(rows))
        with pytest.raises(TrimtabError, match="bare texts have none"):
            build_learn_request("x", METHODS[0], '{"positive": "a", "negative": "b", "system": "Be kind."}', "")

    def test_a_typed_pair_is_a_row(self) -> None:
        assert json.loads(as_row(" Hi ", "yes", "no")) == {"prompt": "Hi", "positive": "yes", "negative": "no"}
        assert "prompt" not in json.loads(as_row("", "yes", "no"))
        with pytest.raises(TrimtabError, match="needs both"):
            as_row("Hi", "yes", " ")


class TestSnippets:
    TRICKY = 'It\'s "quoted" $HOME `id` \\ {{x}} ${y}\nand 💥'

    def tricky_request(self, service: Any) -> Any:
        choice = PanelState((("s0", 1.5, 2),), ("quoted",), max_tokens=9)
        return request(service, choice, prompt_of(service, choice, [], self.TRICKY))

    def test_curl_is_the_request(self, service: Any) -> None:
        chat = self.tricky_request(service)
        words = shlex.split(as_curl(chat, "http://localhost:8000", keys=True).replace("\\\n", " "))
        assert words[:2] == ["curl", "http://localhost:8000/v1/chat/completions"]
        assert "Authorization: Bearer $TRIMTAB_API_KEY" in words
        body = json.loads(words[words.index("-d") + 1])
        assert ChatRequest.model_validate(body) == chat
        assert body["messages"][0]["content"] == self.TRICKY
        assert "Authorization" not in as_curl(chat, "http://localhost:8000", keys=False)

    def test_python_is_the_request(self, service: Any) -> None:
        chat = self.tricky_request(service)
        tree = ast.parse(as_python(chat, "http://localhost:8000", keys=False))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.keywords]
        (call,) = [node for node in calls if any(keyword.arg == "messages" for keyword in node.keywords)]
        arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        assert arguments.pop("extra_body") | arguments == body_of(chat)
        assert "TRIMTAB_API_KEY" in as_python(chat, "http://localhost:8000", keys=True)


class TestShown:
    NASTY = "<script>alert(1)</script>"

    def test_nothing_that_was_written_is_markup(self, service: Any) -> None:
        choice = PanelState((("s0", 1.0, AS_LEARNED),), max_tokens=4)
        plain, steered = ask(service, (choice, False), (choice, True), text=self.NASTY)
        plain.collected.text = steered.error = self.NASTY
        page = show.conversation_html(service, Conversation([Turn(self.NASTY, (self.NASTY,), plain, steered)]))
        page += show.error(self.NASTY) + show.note(self.NASTY) + show.grid([(self.NASTY, [(self.NASTY, plain)])])
        assert "<script" not in page
        assert page.count("&lt;script&gt;") >= 6
        assert "<mark>&lt;script" in page

    @pytest.mark.parametrize(
        ("names", "keys", "learns", "says"),
        [
            (None, False, True, "Loading the steerings"),
            (None, True, True, "Enter your API key"),
            (("s0",), True, False, "A steering is selected"),
            ((), False, True, "on the <b>Learn</b> tab"),
            ((), False, False, "There is no steering to choose yet: start the server"),
        ],
    )
    def test_an_empty_chat_says_what_can_be_chosen(
        self, make_service: Callable[..., Any], names: tuple[str, ...] | None, keys: bool, learns: bool, says: str
    ) -> None:
        policy = Policy((Key("bob", b"bob"),)) if keys else Policy()
        shown = show.conversation_html(make_service(policy=policy, learn=learns), Conversation(names=names))
        assert says in shown
        assert ("is selected" in shown) == bool(names)

    def test_errors_are_words(self, caplog: pytest.LogCaptureFixture) -> None:
        assert in_words(Refusal(403, "not for you")) == "not for you"
        with pytest.raises(ValidationError) as caught:
            ChatRequest.model_validate({"model": "trimtab", "messages": []})
        assert in_words(caught.value).startswith("messages: ")
        assert in_words(KeyError("/home/x/secret")) == "something went wrong inside the server; see its log"
        assert "secret" in caplog.text


class TestPaths:
    @pytest.mark.parametrize("path", ["/", "/config", "/assets/index-1.js", "/gradio_api/queue/join", "/theme.css"])
    def test_the_page_has_what_it_needs(self, path: str) -> None:
        assert is_page(path)

    @pytest.mark.parametrize(
        "path",
        [
            "/gradio_api/file=/etc/passwd", "/gradio_api/upload", "/gradio_api/proxy=http://x", "/v1/models", "/docs",
            "/assets/../x", "/assets/.hidden", "/assets//etc/passwd", "/gradio_api/call/x", "/monitoring", "/login",
            "/gradio_api/run/predict", "/gradio_api/component_server", "/gradio_api/stream/x", "//", "/metrics",
        ],
    )  # fmt: skip
    def test_and_nothing_else(self, path: str) -> None:
        assert not is_page(path)


class TestMounted:
    @pytest.fixture
    def client(self, make_service: Callable[..., Any]) -> Any:
        pytest.importorskip("gradio", reason="the page needs gradio: pip install 'trimtab[serve]'")
        from starlette.testclient import TestClient

        from trimtab.serve.app import make_app

        key = Key("alice", hashlib.sha256(b"alice").digest())
        with TestClient(make_app(make_service(policy=Policy((key,))), playground=True)) as client:
            yield client

    def test_the_page_is_open_and_tells_nothing(self, client: Any) -> None:
        page = client.get("/")
        assert page.status_code == 200
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        for secret in ("tiny", "s0", "alice"):
            assert not re.search(rf"\b{secret}\b", page.text), secret
        for path in ("/v1/models", "/docs", "/metrics", "/v1/nothing", "/gradio_api/file=/etc/passwd"):
            assert client.get(path).status_code == 401, path
        headers = {"Authorization": "Bearer alice"}
        assert client.get("/v1/models", headers=headers).status_code == 200
        for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/upload_progress", "/monitoring", "/nothing"):
            assert client.get(path, headers=headers).status_code == 404, path
        assert client.post("/gradio_api/upload", headers=headers).status_code == 404
        assert 'trimtab_requests_total{route="playground",status="200"}' in client.get("/metrics", headers=headers).text
