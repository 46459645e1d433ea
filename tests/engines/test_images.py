"""Prompts with images: what is steered and read is what recomputing gives, and bad images are refused."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from pictured import KINDS, MARK, PARTS_ALONE, image, image_prompt, pictured
from PIL import Image
from tiny import by_transformers, tiny
from torch import Tensor

from trimtab.decoding.rejection import Rejection
from trimtab.engines.images import PromptImages
from trimtab.engines.transformers.images import decodes_from_cache
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Add, Edit, Positions, Site, Steering
from trimtab.steering.gates import Threshold
from trimtab.text.images import ImageLimits, read_image

NEW = 3
pytestmark = pytest.mark.filterwarnings("ignore::trimtab.DoseWarning")


def vector(seed: int) -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recomputed(lm, ids: list[int], images: PromptImages | None, changes: dict[int, Any], site: int | None = None):
    """The last logits of a text read from its start without a cache, and the activations after a block.

    `changes[layer](x, positions)` is what is added after that block.
    """
    row, inputs = torch.tensor([ids]), dict(images.inputs) if images else {}
    for name, value in inputs.items():
        if name.endswith("token_type_ids"):  # what was generated is text
            inputs[name] = torch.cat([value, value.new_zeros(1, len(ids) - value.shape[1])], 1)
        if name == "cross_attention_mask":
            more = len(ids) - value.shape[1]
            inputs[name] = torch.cat([value, value[:, -1:].expand(-1, more, -1, -1)], 1)
    activations = {}

    def hook(layer: int):
        def change(_module, _args, output):
            x = output[0] if isinstance(output, tuple) else output
            if layer in changes:
                x = x + changes[layer]
            activations[layer] = x
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return change

    handles = [block.register_forward_hook(hook(i)) for i, block in enumerate(lm.layout.blocks)]
    with torch.no_grad():
        logits = lm.model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False, **inputs).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits if site is None else activations[site][0]


def check(lm, prompt, answer, steering: Steering | None) -> None:
    """Greedy tokens and their log-probabilities are what recomputing from the start gives at each of them."""
    ids, images = lm.encode_with_images(prompt)
    length = len(ids)
    for token, logprob in zip(answer.token_ids, answer.logprobs, strict=True):
        changes = {}
        for edit in steering.edits if steering else ():
            added = torch.zeros(len(ids), 32, dtype=torch.float64)
            for start, stop in edit.positions.resolve(length, ()):
                added[start : len(ids) if stop is None else stop] = edit.strength * edit.operation.direction
            changes[edit.site.layer] = added
        expected = recomputed(lm, ids, images, changes).log_softmax(-1)
        assert token == int(expected.argmax())
        assert logprob == pytest.approx(float(expected[token]), abs=1e-4)
        ids = [*ids, token]


STEERINGS = [
    Steering((Edit(Site(0), Add(vector(1)), Positions.all()), Edit(Site(3), Add(vector(2)), Positions.generated()))),
    Steering((Edit(Site(1), Add(vector(3)), Positions.from_last_prompt_token()),)),
    None,
    Steering(
        (
            Edit(Site(1), Add(vector(4)), Positions.span(2, 5)),
            Edit(Site(2), Add(vector(5)), Positions.parse("tokens:-3,-2")),
        )
    ),
]
PROMPTS = [
    image_prompt("w10 w11", image(1), "w12 w13"),
    "w20 w21 w22 w23",
    image_prompt(image(2, 30, 40), "w30", image(3), "w31 w32 w33 w34 w35"),
    image_prompt("w40", image(4), "w41 w42"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_recomputing(kind: str) -> None:
    """Images, text alone, steered and not, in one call: by steps, and through transformers' own `generate`."""
    lm = pictured(kind)
    prompts = [*PROMPTS]
    if kind == "mllama":
        prompts[2] = image_prompt(image(2), "w30 w31")
    answers = lm.generate(prompts, STEERINGS, max_new_tokens=NEW, logprobs=True)
    ids, images = lm.encode_with_images(prompts[0])
    assert ids.count(MARK) == {"llava": 4, "gemma3": 4, "qwen2_vl": 6, "idefics3": 1, "mllama": 1}[kind]
    assert decodes_from_cache(lm.model, lm.layout, ids, images) == (kind != "mllama")
    for prompt, answer, steering in zip(prompts, answers, STEERINGS, strict=True):
        assert answer.prompt_tokens == len(lm.encode_with_images(prompt)[0])
        check(lm, prompt, answer, steering)
    (again,) = lm.generate([prompts[0]], STEERINGS[0], max_new_tokens=NEW, logprobs=True, **by_transformers())
    check(lm, prompts[0], again, STEERINGS[0])


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_vl"])
def test_reading_and_what_is_decided_by_it(kind: str) -> None:
    lm = pictured(kind)
    prompt, other = PROMPTS[0], image_prompt("w10 w11", image(9), "w12 w13")
    ids, images = lm.encode_with_images(prompt)
    (read,) = lm.capture([prompt], 2, Positions.all())
    assert torch.allclose(read[Site(2)], recomputed(lm, ids, images, {}, 2), atol=1e-9)
    added = torch.zeros(len(ids), 32, dtype=torch.float64)
    added[1:] = vector(6)
    (steered,) = lm.capture(
        [prompt],
        2,
        Positions.all(),
        steering=Steering((Edit(Site(1), Add(vector(6)), Positions.all_but_first()),)),
    )
    assert torch.allclose(steered[Site(2)], recomputed(lm, ids, images, {1: added}, 2), atol=1e-9)

    direction = vector(7)
    ends = [activations[Site(1)][0] @ direction for activations in lm.capture([prompt, other], 1)]
    gate = Threshold(Site(1), direction, float(sum(ends) / 2), positions=Positions.last_prompt_token())
    push = STEERINGS[1].when(gate)
    answers = lm.generate([prompt, other], push, max_new_tokens=NEW, logprobs=True)
    for each, end, answer in zip((prompt, other), ends, answers, strict=True):
        check(lm, each, answer, STEERINGS[1] if end > sum(ends) / 2 else None)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_emphasis_rejection_and_a_clean_cache(kind: str) -> None:
    lm = pictured(kind)
    for phrase in ("w10 w11", "w12 w13"):
        ((start, stop),) = lm.spans(PROMPTS[0], phrase)
        assert lm.tokenizer.decode(lm.encode_with_images(PROMPTS[0])[0][start:stop]) == phrase
    with pytest.raises(UnsupportedError, match="between two images"):
        lm.spans(image_prompt(image(), "w30", image(), "w31"), "w30")
    push = 3 * STEERINGS[1]
    clean = lm.generate(PROMPTS[:2], push, max_new_tokens=NEW, logprobs=True, clean_cache=True)
    never = lm.generate(
        PROMPTS[:2], push, max_new_tokens=NEW, logprobs=True, rejection=Rejection(0.0, ladder="strength")
    )
    always = lm.generate(
        PROMPTS[:2], push, max_new_tokens=NEW, logprobs=True, rejection=Rejection(1.0, ladder="strength")
    )
    for prompt, cleaned, unrejected, raw in zip(PROMPTS, clean, never, always, strict=False):
        assert cleaned.token_ids == unrejected.token_ids
        check(lm, prompt, raw, None)
    (towards,) = lm.generate([PROMPTS[0]], emphasize=["w12 w13"], max_new_tokens=NEW, logprobs=True, rejection=False)
    (plain,) = lm.generate([PROMPTS[0]], max_new_tokens=NEW, logprobs=True)
    assert towards.logprobs != plain.logprobs


def test_where_rows_cannot_join_what_needs_that_is_refused() -> None:
    lm = pictured("mllama")
    with pytest.raises(UnsupportedError, match="at every decode step"):
        lm.generate([PROMPTS[0]], STEERINGS[1], rejection=True, max_new_tokens=NEW)


def test_models_and_readings_of_text_alone_refuse_images() -> None:
    with pytest.raises(UnsupportedError, match="is a text-only model"):
        tiny("llama").generate([PROMPTS[0]])
    lm = pictured("llava")
    with pytest.raises(TrimtabError, match="only text is supported here"):
        lm.encode(PROMPTS[0])
    lm._processor = None
    with pytest.raises(TrimtabError, match="processor=processor"):
        lm.generate([PROMPTS[0]])


def test_a_template_of_parts_alone_loses_no_text() -> None:
    lm = pictured("idefics3")
    expected = lm.encode("w10 w11")
    lm.processor.chat_template = lm.tokenizer.chat_template = PARTS_ALONE.replace("IMAGE", "<image>")
    assert lm.encode("w10 w11") == expected
    assert lm.encode(image_prompt("w10 w11")) == expected
    ids, _ = lm.encode_with_images(image_prompt("w12", image()), system="w9")
    assert ids[:5] == lm.encode(image_prompt("w12"), system="w9")[:5]


def encoded(made: Any, kind: str = "PNG", **options: Any) -> bytes:
    data = BytesIO()
    made.save(data, kind, **options)
    return data.getvalue()


def test_an_image_in_all_its_forms(tmp_path: Path) -> None:
    made = image()
    data = encoded(made)
    (tmp_path / "one.png").write_bytes(data)
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    lm = pictured("llava")
    expected = lm.encode_with_images(image_prompt(made))[1].inputs["pixel_values"]
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": data},
        {"type": "image", "path": str(tmp_path / "one.png")},
        {"type": "image", "image": tmp_path / "one.png"},
        {"type": "image", "base64": base64.b64encode(data).decode()},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_image", "image_url": url},
    ]
    for part in parts:
        _, images = lm.encode_with_images([{"role": "user", "content": [part]}])
        assert torch.equal(images.inputs["pixel_values"], expected)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("https://example.org/a.png", "nothing is downloaded"),
        ("/no/such/file.png", "no file"),
        (encoded(image())[:60], "can't be read"),
        (b"%PDF-1.4", "can't be read"),
        ("data:image/png,abc", "base64"),
        ("data:image/png;base64,a*b", "isn't base64"),
        (encoded(image(), "GIF", save_all=True, append_images=[image(1)]), "animation of 2 frames"),
        (encoded(Image.new("1", (9000, 9000))), "40000000 pixels"),
        (encoded(Image.new("1", (30000, 30000))), "40000000 pixels"),
        (7, "got int"),
    ],
)
def test_what_is_no_image_is_refused(source: Any, said: str) -> None:
    with pytest.raises(TrimtabError, match=said):
        read_image(source)


def test_bounds() -> None:
    with pytest.raises(TrimtabError, match="bytes"):
        read_image(encoded(image()), ImageLimits(bytes=100))
    with pytest.raises(TrimtabError, match="isn't a data: URL"):
        read_image("one.png", ImageLimits(local=False))
    with pytest.raises(TrimtabError, match="1 images at most"):
        pictured("llava").encode_with_images(image_prompt(image(), image()), bounds=ImageLimits(images=1))
