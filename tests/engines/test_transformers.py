from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny import LAYERS, direction, prompt
from torch import nn
from transformers import TextIteratorStreamer

from trimtab import LM, Ablate, Add, DoseWarning, Edit, MismatchWarning, Positions, Site, Steering, TrimtabError
from trimtab.engines.transformers.layout import find_layout
from trimtab.lm import DOSE_WARNING

STEERING = Steering((Edit(Site(1), Add(direction(1, 2.0)), Positions.all()),))
TEXT = prompt(0, 6)


@pytest.fixture
def lm() -> LM:
    return tiny.tiny("llama")


class TestLayout:
    def test_blocks_are_found_without_a_declaration(self, lm: LM) -> None:
        class Undeclared(type(lm.layout.decoder)):  # type: ignore[misc]
            _can_record_outputs = None

        lm.layout.decoder.__class__ = Undeclared
        assert find_layout(lm.model).path == "model.layers"

    def test_two_lists_of_the_same_length_are_not_guessed_between(self, lm: LM) -> None:
        lm.layout.decoder.twins = nn.ModuleList(lm.layout.blocks)
        with pytest.raises(TrimtabError, match=r"2 lists of that length.*layers=.*model\.layers \(4\), model\.twins"):
            find_layout(lm.model)
        assert find_layout(lm.model, "model.layers").blocks == lm.layout.blocks

    def test_a_vision_tower_of_equal_depth_is_no_candidate(self) -> None:
        assert tiny.tiny("gemma3_multimodal").layout.path == "model.language_model.layers"
        assert tiny.tiny("qwen2_vl").layout.path == "model.language_model.layers"

    def test_a_path_that_is_not_there(self, lm: LM) -> None:
        with pytest.raises(TrimtabError, match=r"no 'model.blocks'; its lists of blocks: model.layers \(4\)"):
            find_layout(lm.model, "model.blocks")
        with pytest.raises(TrimtabError, match="not a list of blocks"):
            find_layout(lm.model, "model.norm")

    def test_an_encoder_decoder_is_refused(self) -> None:
        config = transformers.T5Config(vocab_size=90, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8)
        with pytest.raises(TrimtabError, match="encoder-decoder"):
            LM(transformers.T5ForConditionalGeneration(config), None)

    def test_a_shorter_list_of_blocks_is_not_taken(self, lm: LM) -> None:
        lm.layout.decoder.layers = lm.layout.decoder.layers[:3]
        with pytest.raises(TrimtabError, match="0 lists of that length"):
            find_layout(lm.model)


class TestGenerate:
    def test_finish_reasons_and_what_was_applied(self, lm: LM) -> None:
        (endless,) = lm.generate(TEXT, STEERING, max_new_tokens=5)
        assert (endless.finish_reason, len(endless.token_ids), endless.prompt_tokens) == ("length", 5, 6)
        assert endless.applied.edits == ("1 * add @ residual[1] all",)
        assert [dose.layer for dose in endless.applied.doses] == [1]
        assert endless.applied.doses[0].tokens == 6 + 4  # the last token is never fed back
        (longer,) = lm.generate(TEXT, STEERING, max_new_tokens=20)
        assert longer.applied.doses[0].tokens == 6 + 19
        stop = endless.token_ids[2]
        (stopped,) = lm.generate(TEXT, STEERING, max_new_tokens=5, eos_token_id=stop)
        assert stopped.token_ids == endless.token_ids[: endless.token_ids.index(stop) + 1]
        assert stopped.finish_reason == "stop"

    def test_rows_that_end_early_are_cut_and_their_doses_stop(self, lm: LM) -> None:
        texts = [prompt(i, 5) for i in range(6)]
        free = lm.generate(texts, STEERING, max_new_tokens=6)
        end = free[0].token_ids[1]
        answers = lm.generate(texts, STEERING, max_new_tokens=6, eos_token_id=end)
        for answer, whole in zip(answers, free, strict=True):
            assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
            assert (answer.finish_reason == "stop") == (end in whole.token_ids)
            assert answer.applied.doses[0].tokens == answer.prompt_tokens + len(answer.token_ids) - 1

    def test_samples_repeat_with_a_seed(self, lm: LM) -> None:
        options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 12}
        first, again, other = (lm.generate(TEXT, STEERING, seed=s, **options)[0].token_ids for s in (1, 1, 2))
        assert first == again != other

    def test_progress(self, lm: LM) -> None:
        seen: list[tuple[int, int]] = []
        texts = [prompt(i, 4) for i in range(5)]
        lm.generate(texts, batch_size=2, max_new_tokens=1, progress=lambda d, t: seen.append((d, t)))
        assert seen == [(2, 5), (4, 5), (5, 5)]

    def test_a_large_dose_is_warned_about(self, lm: LM) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lm.generate(TEXT, 0.1 * STEERING, max_new_tokens=2)
        with pytest.warns(DoseWarning, match="at layer 1 .* Lower the strength"):
            (answer,) = lm.generate(TEXT, 100 * STEERING, max_new_tokens=2)
        assert answer.applied.overall > DOSE_WARNING

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("inputs_embeds", 1),
            ("attention_mask", 1),
            ("guidance_scale", 2.0),
            ("input_ids", 1),
            ("assistant_model", 1),
        ],
    )
    def test_options_that_cant_be_honoured(self, lm: LM, option: str, value: Any) -> None:
        with pytest.raises(TrimtabError, match=f"can't take {option}"):
            lm.generate(TEXT, STEERING, max_new_tokens=2, **{option: value})

    def test_lengths(self, lm: LM) -> None:
        with pytest.raises(TrimtabError, match="prompt 2 has 129 tokens, the model's context is 128"):
            lm.generate([TEXT, prompt(1, 129)], max_new_tokens=1)
        with pytest.raises(TrimtabError, match="ask for at most 8"):
            lm.generate(prompt(1, 120), max_new_tokens=9)
        for bad in (0, -1, 1.5, True):
            with pytest.raises(TrimtabError, match="max_new_tokens"):
                lm.generate(TEXT, max_new_tokens=bad)  # type: ignore[arg-type]

    def test_a_static_cache(self, lm: LM) -> None:
        """Its masks are four-dimensional, so the pads must be known from elsewhere."""
        texts = [prompt(1, 4), prompt(2, 9)]
        expected = [a.token_ids for a in lm.generate(texts, STEERING, max_new_tokens=5)]
        answers = lm.generate(texts, STEERING, max_new_tokens=5, cache_implementation="static")
        assert [a.token_ids for a in answers] == expected


class TestChat:
    def test_without_a_template(self, lm: LM) -> None:
        with pytest.raises(TrimtabError, match="no chat template"):
            lm.generate([{"role": "user", "content": "w3"}])
        with pytest.raises(TrimtabError, match="system message needs a chat template"):
            lm.generate("w3", system="w4")

    def test_with_a_template(self, lm: LM) -> None:
        lm.tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'wizard' %}{{ raise_exception('no wizards') }}{% endif %}"
            "{{ {'system': 'w80', 'user': 'w81', 'assistant': 'w82'}[m.role] }}"
            " {{ m.content }} {% endfor %}{% if add_generation_prompt %}w82{% endif %}"
        )
        assert lm.encode("w3 w4") == [81, 3, 4, 82]
        assert lm.encode("w3 w4", chat=False) == [3, 4]
        assert lm.encode("w3", system="w9") == [80, 9, 81, 3, 82]
        turns = [{"role": r, "content": c} for r, c in (("user", "w3"), ("assistant", "w4"), ("user", "w5"))]
        assert lm.encode(turns) == [81, 3, 82, 4, 81, 5, 82]
        assert len(lm.generate([turns, "w7"], max_new_tokens=1)) == 2
        with pytest.raises(TrimtabError, match="a message is"):
            lm.encode([{"role": "user"}])
        with pytest.raises(TrimtabError, match="refuses these messages: no wizards"):
            lm.encode([{"role": "wizard", "content": "w3"}])


class TestSteered:
    def test_streaming(self, lm: LM) -> None:
        (expected,) = lm.generate(TEXT, STEERING, max_new_tokens=6)
        inputs = lm.tokenizer(TEXT, return_tensors="pt")
        streamer = TextIteratorStreamer(lm.tokenizer, skip_prompt=True)
        with lm.steered(STEERING):
            options = {**inputs, "streamer": streamer, "max_new_tokens": 6, "do_sample": False}
            options.pop("token_type_ids", None)
            thread = threading.Thread(target=lm.model.generate, kwargs=options)
            thread.start()
            pieces = list(streamer)
            thread.join()
        assert "".join(pieces).split() == expected.text.split()

    def test_many_rows_and_right_padding(self, lm: LM) -> None:
        """Scoring pads on the right; positions are still those of each text."""
        ids = [lm.encode(prompt(i, n)) for i, n in enumerate((3, 7))]
        padded = torch.tensor([ids[0] + [0] * 4, ids[1]])
        mask = torch.tensor([[1] * 3 + [0] * 4, [1] * 7])
        steering = STEERING.at(Positions.last_prompt_token())
        with lm.steered([steering, None]) as session, torch.no_grad():
            together = lm.model(input_ids=padded, attention_mask=mask).logits
            assert [len(session.doses(row)) for row in (0, 1)] == [1, 0]
            assert session.doses(0)[0].tokens == 1
        with lm.steered(steering), torch.no_grad():
            alone = lm.model(input_ids=torch.tensor([ids[0]])).logits
        assert torch.allclose(together[0, :3], alone[0], atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(together[1], lm.model(input_ids=torch.tensor([ids[1]])).logits[0], atol=1e-5)

    def test_gradients_flow(self, lm: LM) -> None:
        """With gradients on, nothing is edited in place."""
        ids = torch.tensor([lm.encode(TEXT)])
        with lm.steered(STEERING):
            lm.model(input_ids=ids, labels=ids).loss.backward()
        assert lm.layout.blocks[0].mlp.down_proj.weight.grad.norm() > 0

    def test_generate_with_rows_but_no_mask(self, lm: LM) -> None:
        with lm.steered(STEERING), pytest.raises(TrimtabError, match="attention_mask"):
            lm.model.generate(torch.ones(2, 3, dtype=torch.long), max_new_tokens=1)

    def test_two_threads_take_turns(self, lm: LM) -> None:
        texts = [prompt(i, 5) for i in range(4)]
        steerings = [STEERING, None, -1 * STEERING, 0.5 * STEERING]
        expected = [lm.generate(t, s, max_new_tokens=5)[0].token_ids for t, s in zip(texts, steerings, strict=True)]
        answers: dict[int, tuple[int, ...]] = {}

        def work(i: int) -> None:
            for _ in range(3):
                answers[i] = lm.generate(texts[i], steerings[i], max_new_tokens=5)[0].token_ids

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answers[i] for i in range(4)] == expected

    def test_a_peft_model(self) -> None:
        base = tiny.tiny("llama", dtype=torch.float32)
        adapted = get_peft_model(base.model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
        lm = LM(adapted, base.tokenizer, name="tiny-lora")
        assert lm.layout.layers == LAYERS
        plain, steered = (lm.generate(TEXT, s, max_new_tokens=6)[0] for s in (None, 5 * STEERING))
        assert plain.token_ids != steered.token_ids
        assert steered.applied.doses[0].tokens == 6 + 5


class TestIdentity:
    def learned(self, lm: LM) -> Steering:
        from trimtab.methods.instruct import learn_instruct
        from trimtab.text.pairs import Pair

        return learn_instruct(lm, [Pair(f"{prompt(i, 4)} w70", prompt(i, 4), "", "prompts") for i in range(3)], 1)

    def test_other_weights_of_the_same_shape(self, lm: LM) -> None:
        other = LM(tiny.tiny("llama", seed=5).model, lm.tokenizer, name="another")
        with pytest.raises(
            TrimtabError, match=r"learned on tiny-llama, this is another \(same shape, different weights"
        ):
            other.generate(TEXT, self.learned(lm))
        other.generate(TEXT, self.learned(lm), transfer=True, max_new_tokens=1)

    def test_a_renamed_or_recast_copy_is_the_same_model(self, lm: LM) -> None:
        learned = self.learned(lm)
        renamed = LM(lm.model.float(), lm.tokenizer, name="elsewhere")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            renamed.check(learned)

    def test_another_family(self, lm: LM) -> None:
        with pytest.raises(TrimtabError, match="family llama instead of gpt2"):
            tiny.tiny("gpt2").check(self.learned(lm))

    def test_another_template_is_warned_about(self, lm: LM) -> None:
        learned = self.learned(lm)
        copy = tiny.tiny("llama")
        copy.tokenizer.chat_template = "{{ messages }}"
        with pytest.warns(MismatchWarning, match="a different chat template"):
            copy.check(learned)

    def test_another_width_fails_even_as_transfer(self, lm: LM) -> None:
        wide = Steering((Edit(Site(0), Ablate(torch.eye(64)[0])),))
        with pytest.raises(TrimtabError, match="width is 64"):
            lm.check(wide, transfer=True)


class TestLoad:
    def test_a_folder(self, lm: LM, tmp_path: Path) -> None:
        lm.model.save_pretrained(tmp_path / "m")
        lm.tokenizer.save_pretrained(tmp_path / "m")
        loaded = LM.load(tmp_path / "m", dtype="fp64", device="cpu")
        assert (loaded.name, loaded.model.dtype) == ("m", torch.float64)
        assert loaded.generate(TEXT, STEERING, max_new_tokens=4) == lm.generate(TEXT, STEERING, max_new_tokens=4)

    @pytest.mark.parametrize(
        ("name", "message"),
        [("no/such-model-anywhere", "can't load the model"), ("missing.gguf", "there is no file missing.gguf")],
    )
    def test_what_is_not_there(self, name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(TrimtabError, match=message):
            LM.load(name)

    def test_files_that_are_no_models(self, tmp_path: Path) -> None:
        (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(64))
        with pytest.raises(TrimtabError, match="can't read the GGUF file"):
            LM.load(tmp_path / "bad.gguf")
        with pytest.raises(TrimtabError, match="isn't a model folder"):
            LM.load(tmp_path)
        with pytest.raises(TrimtabError, match="unknown dtype 'int3'"):
            LM.load(tmp_path, dtype="int3")
        with pytest.raises(TrimtabError, match="can't use the device 'toaster'"):
            LM.load(tmp_path, device="toaster")
