from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny
import torch
from tiny import LAYERS, WIDTH, direction, prompt
from tokenizers import processors
from torch import Tensor

from trimtab import LM, Add, Pair, Positions, SetProjection, Site, Steering, TrimtabError, load, save
from trimtab.lm import MismatchWarning
from trimtab.methods.instruct import OPERATIONS, POSITIONS, learn_instruct, learn_many, steering_from, steerings_from
from trimtab.methods.words import learn_length, learn_word

QUERIES = [prompt(seed, 4 + seed % 5) for seed in range(10)]
BOS = 85
TEMPLATE = (
    "{{ bos_token }} {% for m in messages %} w81 {{ m.content }} w82 {% endfor %}"
    "{% if add_generation_prompt %} w83 w84 {% endif %}"
)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


def with_template(lm: LM, template: str | None = TEMPLATE) -> LM:
    """The model with a tokenizer that puts a beginning-of-text token before any text, as its template does too."""
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = f"w{BOS}"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"w{BOS} $A", special_tokens=[(f"w{BOS}", BOS)]
    )
    tokenizer.chat_template = template
    return LM(lm.model, tokenizer, name=lm.name)


def pairs_of(*instruction: str, queries: Sequence[str] = QUERIES) -> list[Pair]:
    return [Pair(f"{q} {instruction[i % len(instruction)]}", q, "", "prompts") for i, q in enumerate(queries)]


PAIRS = pairs_of("w70 w71", "w72")


def read(lm: LM, text: str, layer: int) -> Tensor:
    """The last token's activation by a bare pass of the model: `[width]`."""
    rows: list[Tensor] = []
    handle = lm.layout.blocks[layer].register_forward_hook(
        lambda _m, _a, o: rows.append((o if isinstance(o, Tensor) else o[0])[0, -1])
    )
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([lm.encode(text)]), use_cache=False)
    handle.remove()
    return rows[0].double()


def sides(lm: LM, pairs: Sequence[Pair], layer: int) -> tuple[Tensor, Tensor]:
    """`[pairs, width]` with the instruction, and without."""
    return tuple(torch.stack([read(lm, getattr(p, side), layer) for p in pairs]) for side in ("positive", "negative"))  # type: ignore[return-value]


class TestTheFormulas:
    @pytest.mark.parametrize("layer", [0, LAYERS - 1])
    def test_each_operation_is_the_papers(self, lm: LM, layer: int) -> None:
        positive, negative = sides(lm, PAIRS, layer)
        mean = (positive - negative).mean(0)
        made = {name: learn_instruct(lm, PAIRS, layer, operation=name).edits for name in OPERATIONS}
        for name, (edit,) in made.items():
            assert (edit.site, edit.strength, edit.positions) == (Site(layer), 1.0, POSITIONS[name])
        clamp = made["project"][0].operation
        assert isinstance(clamp, SetProjection)
        assert not clamp.one_sided
        assert torch.allclose(clamp.direction.double(), mean / mean.norm(), atol=1e-5)
        assert clamp.target == pytest.approx(float((positive @ (mean / mean.norm())).mean()), rel=1e-4, abs=1e-4)
        assert torch.allclose(made["add"][0].operation.direction.double(), mean, atol=1e-4)
        assert torch.allclose(made["unit"][0].operation.direction.double(), mean / mean.norm(), atol=1e-5)

    def test_the_target_is_the_length_of_the_difference_away(self, lm: LM) -> None:
        """t - mean(x-.u) = |m|."""
        (edit,) = learn_instruct(lm, PAIRS, 2).edits
        _, negative = sides(lm, PAIRS, 2)
        gap = edit.operation.target - float((negative @ edit.operation.direction.double()).mean())
        shift = learn_instruct(lm, PAIRS, 2).card.measured["shift"]["2"]
        assert gap == pytest.approx(shift, rel=1e-4)
        assert gap == pytest.approx(
            float(learn_instruct(lm, PAIRS, 2, operation="add").edits[0].operation.direction.norm()), rel=1e-4
        )

    def test_swapped_pairs_negate(self, lm: LM) -> None:
        swapped = [Pair(p.negative, p.positive, "", p.shape) for p in PAIRS]
        for name in OPERATIONS:
            mine, theirs = (learn_instruct(lm, p, 1, operation=name).edits[0].operation for p in (PAIRS, swapped))
            assert torch.allclose(mine.direction, -theirs.direction, atol=1e-5)

    def test_order_and_repetition_of_pairs_dont_matter(self, lm: LM) -> None:
        reference = learn_instruct(lm, PAIRS, 2).edits[0].operation
        for other in (PAIRS[::-1], PAIRS * 2, PAIRS[5:] + PAIRS[:5]):
            operation = learn_instruct(lm, other, 2).edits[0].operation
            assert torch.allclose(operation.direction, reference.direction, atol=1e-5)
            assert operation.target == pytest.approx(reference.target, rel=1e-4, abs=1e-4)

    def test_a_planted_direction_is_recovered(self, lm: LM) -> None:
        """A block that adds a direction after one word, long beside what the word itself does: it is what is found."""
        planted = direction(9, 200.0)
        word, block = 70, lm.layout.blocks[1]
        seen: list[Tensor] = []
        before = lm.layout.decoder.register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append(kwargs.get("input_ids", args[0] if args else None)), with_kwargs=True
        )

        def plant(_m: object, _a: object, output: object) -> object:
            x = output if isinstance(output, Tensor) else output[0]  # type: ignore[index]
            x = x + (seen[-1] == word)[..., None] * planted.to(x.dtype)
            return x if isinstance(output, Tensor) else (x, *output[1:])  # type: ignore[index]

        after = block.register_forward_hook(plant)
        try:
            many = [prompt(seed, 6) for seed in range(100, 300)]
            planted_pairs = [Pair(f"{q} w70", f"{q} w{7 + i % 50}", "", "prompts") for i, q in enumerate(many)]
            (edit,) = learn_instruct(lm, planted_pairs, 1).edits
        finally:
            before.remove()
            after.remove()
        assert torch.cosine_similarity(edit.operation.direction.double(), planted, dim=0) > 0.99

    def test_where_and_how_far_can_be_said(self, lm: LM) -> None:
        (edit,) = learn_instruct(lm, PAIRS, 1, positions=Positions.generated(), one_sided=True).edits
        assert edit.positions == Positions.generated()
        assert edit.operation.one_sided
        assert learn_instruct(lm, PAIRS).layers == (round(0.6 * LAYERS),)
        assert learn_instruct(lm, PAIRS, [3, 1]).layers == (1, 3)


class TestWhatIsRead:
    @pytest.mark.parametrize("chat", [True, False])
    def test_both_arms_end_alike_and_begin_once(self, lm: LM, chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a template the last token is the same in both arms; there is one beginning-of-text token."""
        read_texts: list = []
        original = LM.read
        monkeypatch.setattr(
            LM,
            "read",
            lambda lm, groups, sites, **o: (read_texts.extend(groups), original(lm, groups, sites, **o))[1],
        )
        templated = with_template(lm, TEMPLATE if chat else None)
        learn_instruct(templated, PAIRS, 1)
        learn_many(templated, {"a": PAIRS}, 1)
        assert len(read_texts) == 2 * len(PAIRS)
        for group in read_texts:
            for text in group:
                assert list(text.positions) == [len(text.ids) - 1]
                assert list(text.ids).count(BOS) == 1
                assert text.ids[0] == BOS
            if chat:
                assert {text.ids[-1] for text in group} == {84}


SETS = {"a": PAIRS, "b": pairs_of("w75"), "c": pairs_of("w76 w77 w78", queries=QUERIES[:4])}


class TestManyAtOnce:
    def test_equal_each_alone(self, lm: LM) -> None:
        moments = learn_many(lm, SETS, [1, 3])
        assert {name: set(moment) for name, moment in moments.items()} == {name: {1, 3} for name in SETS}
        for operation in OPERATIONS:
            for name, steering in steerings_from(moments, operation=operation).items():
                alone = learn_instruct(lm, SETS[name], [1, 3], operation=operation)
                assert steering.layers == alone.layers
                for mine, theirs in zip(steering.edits, alone.edits, strict=True):
                    assert torch.allclose(mine.operation.direction, theirs.operation.direction, atol=1e-4)
                    assert mine.positions == theirs.positions

    def test_a_steering_for_some_layers_without_the_model(self, lm: LM) -> None:
        moments = learn_many(lm, SETS, [0, 1, 3])["b"]
        steering = steering_from(moments, 3, operation="add", positions=Positions.prompt())
        (edit,) = steering.edits
        assert (edit.site, edit.positions) == (Site(3), Positions.prompt())
        assert steering.card.options["layers"] == [3]
        assert steering_from(moments, [1, 0]).layers == (0, 1)
        with pytest.raises(
            TrimtabError, match="no activations were read at layer 2; the layers that were read are 0, 1, 3"
        ):
            steering_from(moments, 2)

    def test_each_query_is_read_once(self, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
        count: list[int] = []
        original = LM.read

        def counted(lm, groups, sites, **options):
            count.append(sum(len(group) for group in groups))
            return original(lm, groups, sites, **options)

        monkeypatch.setattr(LM, "read", counted)
        learn_many(lm, SETS, [1])
        assert count == [len(QUERIES) + sum(len(pairs) for pairs in SETS.values())]


class TestTheCard:
    def test_says_what_was_done_and_survives_a_file(self, lm: LM, tmp_path) -> None:
        steering = learn_instruct(lm, PAIRS, [1, 2], one_sided=True, options={"instruction": "w70", "queries": "learn"})
        card = steering.card
        assert (card.method, card.model, card.measured["pairs"]) == ("instruct", lm.identity, len(PAIRS))
        assert card.options["operation"] == "project"
        assert card.options["one_sided"] is True
        assert card.options["instruction"] == "w70"
        assert card.measured["target"]["2"] == pytest.approx(steering.edits[1].operation.target, abs=1e-6)
        save(steering, tmp_path / "s.safetensors")
        assert load(tmp_path / "s.safetensors") == steering
        assert load(tmp_path / "s.safetensors").card == card

    def test_the_same_pairs_give_the_same_bytes(self, lm: LM, tmp_path) -> None:
        for name in ("a", "b"):
            save(learn_instruct(lm, PAIRS, [1, 2]), tmp_path / f"{name}.safetensors")
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


class TestWordsAndLengths:
    BASE = ("w10 w11 w12", "w13 w14", "w15 w16 w17 w18", "w19 w20")

    def test_keeping_out_is_subtracting(self, lm: LM) -> None:
        """Exclusion at c is inclusion at -c."""
        inside = learn_word(lm, "w70", 1, base=self.BASE, weight=3.0)
        outside = learn_word(lm, "w70", 1, base=self.BASE, weight=3.0, exclude=True)
        assert outside == -1.0 * inside
        assert outside.edits[0].strength == -3.0
        assert float(outside.edits[0].operation.direction.norm()) == pytest.approx(1, abs=1e-5)
        assert outside.card.options["exclude"] is True
        assert outside.card.options["word"] == "w70"
        with lm.steered(inside + outside):
            (both,) = lm.capture(self.BASE[0], [1], Positions.all())
        (bare,) = lm.capture(self.BASE[0], [1], Positions.all())
        assert torch.allclose(both[Site(1)], bare[Site(1)], atol=1e-5)

    def test_without_a_weight_it_is_the_whole_difference(self, lm: LM) -> None:
        """The tiny tokenizer knows no English, so that the word itself makes the difference."""
        (edit,) = learn_word(lm, "w70", 2, base=self.BASE).edits
        assert isinstance(edit.operation, Add)
        assert edit.positions == Positions.all_but_first()
        weighted = learn_word(lm, "w70", 2, base=self.BASE, weight=float(edit.operation.direction.norm()))
        scaled = weighted.edits[0].strength * weighted.edits[0].operation.direction
        assert torch.allclose(scaled, edit.operation.direction, atol=1e-4)

    def test_other_words_other_vectors(self, lm: LM) -> None:
        # the sentence has to have the word as a token of its own
        operation, other_operation = (
            learn_word(lm, f'" {w} "', 2, base=self.BASE).edits[0].operation for w in ("w70", "w30")
        )
        assert torch.cosine_similarity(operation.direction, other_operation.direction, dim=0) < 0.999

    def test_lengths(self, lm: LM) -> None:
        short = learn_length(lm, "concise", 2, base=self.BASE, weight=20.0)
        assert short.edits[0].strength == 20.0
        assert short.card.options["length"] == "concise"

    def test_bad_input(self, lm: LM) -> None:
        with pytest.raises(TrimtabError, match="can't be empty"):
            learn_word(lm, "  ", base=self.BASE)
        with pytest.raises(TrimtabError, match="lengths: concise, verbose"):
            learn_length(lm, "middling", base=self.BASE)


class TestTransfer:
    """A vector learned on one model, used on another of the same width."""

    @pytest.fixture
    def tuned(self) -> LM:
        return with_template(tiny.tiny("llama", seed=1))

    @pytest.fixture
    def bare(self) -> LM:
        return LM(tiny.tiny("llama", seed=2).model, tiny.tokenizer(), name="tiny-base")

    def steering(self, lm: LM) -> Steering:
        return learn_instruct(lm, PAIRS, 2)

    def test_it_must_be_allowed_and_then_works_with_a_warning(self, tuned: LM, bare: LM) -> None:
        steering = self.steering(tuned)
        with pytest.raises(TrimtabError, match="allow transfer"):
            bare.generate(QUERIES[0], steering, max_new_tokens=2)
        plain = bare.generate(QUERIES[0], max_new_tokens=6, logprobs=True)[0]
        with pytest.warns(MismatchWarning, match="a different chat template"):
            (answer,) = bare.generate(QUERIES[0], steering, max_new_tokens=6, transfer=True, logprobs=True)
        assert answer.applied.dose > 0
        assert answer.logprobs != plain.logprobs
        clamp = steering.edits[0].operation
        with lm_steered(bare, steering):
            (activations,) = bare.capture(QUERIES[0], [2], Positions.all_but_first())
        landed = activations[Site(2)].double() @ clamp.direction.double()
        assert torch.allclose(landed, torch.full_like(landed, clamp.target), atol=1e-4)

    def test_the_same_template_warns_of_nothing(self, tuned: LM, recwarn: pytest.WarningsRecorder) -> None:
        other = with_template(tiny.tiny("llama", seed=3))
        other.generate(QUERIES[0], self.steering(tuned), max_new_tokens=2, transfer=True)
        assert not [w for w in recwarn if issubclass(w.category, MismatchWarning)]

    def test_another_width_is_refused(self, tuned: LM) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {**tiny.SIZES, "hidden_size": 2 * WIDTH}
        wide = LM(LlamaForCausalLM(LlamaConfig(**sizes)), tiny.tokenizer(), name="tiny-wide")
        with pytest.raises(TrimtabError, match="width 32 instead of 64"):
            wide.generate(QUERIES[0], self.steering(tuned), max_new_tokens=2, transfer=True)


def lm_steered(lm: LM, steering: Steering):
    """`lm.steered` with the steering's own model forgotten, as transfer allows."""
    return lm.steered(Steering(steering.edits))


def test_bad_input(lm: LM) -> None:
    with pytest.raises(TrimtabError, match="operations: project, add, unit"):
        learn_instruct(lm, PAIRS, operation="rotate")
    with pytest.raises(TrimtabError, match="one_sided is for projections"):
        learn_instruct(lm, PAIRS, operation="add", one_sided=True)
    with pytest.raises(TrimtabError, match="no pairs"):
        learn_instruct(lm, [])
    with pytest.raises(TrimtabError, match="no pairs to learn 'b' from"):
        learn_many(lm, {"a": PAIRS, "b": []})
    with pytest.raises(TrimtabError, match="are for the method caa"):
        learn_many(lm, {"a": [Pair("(A)", "(B)", "is it", "letters")]})
    with pytest.raises(TrimtabError, match="no layer 9"):
        learn_many(lm, {"a": PAIRS}, [9])
    same = [Pair(q, q, "", "prompts") for q in QUERIES]
    with pytest.raises(TrimtabError, match="don't differ"):
        learn_instruct(lm, same, 1)
