"""Images in requests: read from data: URLs, answered as `lm.generate` answers, bounded, and written down as digests."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from pictured import image, image_prompt, pictured

from trimtab import LM, Add, Card, Edit, Positions, Site, Steering, load, save

CHATS = "/v1/chat/completions"


def url(seed: int = 1) -> str:
    data = BytesIO()
    image(seed).save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def body(*parts: Any, **more: Any) -> dict[str, Any]:
    content = [
        {"type": "image_url", "image_url": {"url": part}} if ":" in part else {"type": "text", "text": part}
        for part in parts
    ]
    messages = [{"role": "user", "content": content}]
    return {"model": "trimtab", "messages": messages, "max_tokens": 4, "temperature": 0, **more}


@pytest.fixture(scope="module")
def sees() -> LM:
    lm = pictured("idefics3")
    lm.model.float()
    return lm


@pytest.fixture
def client(sees: LM, tmp_path: Path, client_of: Callable[..., Any]) -> Iterator[Any]:
    from trimtab.serve.audit import Audit
    from trimtab.serve.library import read_folder
    from trimtab.serve.metrics import Metrics
    from trimtab.serve.policy import Policy
    from trimtab.serve.scheduler import Scheduler
    from trimtab.serve.service import Limits, Service

    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    push = Steering(
        (Edit(Site(1), Add(vector), Positions.from_last_prompt_token()),), Card("manual", model=sees.identity)
    )
    (tmp_path / "steerings").mkdir()
    save(push, tmp_path / "steerings" / "push.safetensors")
    library = read_folder(sees, tmp_path / "steerings")
    audit = Audit(tmp_path / "audit.jsonl", prompts=True)
    limits = Limits(max_tokens=8, images=2)
    service = Service(sees, library, Scheduler(sees), Policy(), audit, Metrics(), limits)
    yield client_of(service)
    service.scheduler.close()


@pytest.mark.filterwarnings("ignore::trimtab.DoseWarning")
def test_answers_are_those_of_generate(client: Any, sees: LM, tmp_path: Path) -> None:
    prompt = image_prompt("w10 w11", image(1), "w12")
    steering = [{"name": "push", "strength": 2}]
    push = 2 * load(tmp_path / "steerings" / "push.safetensors")
    plain, pushed = sees.generate([prompt] * 2, [None, push], max_new_tokens=4)
    for more, expected in (({}, plain), ({"steering": steering}, pushed)):
        answered = client.post(CHATS, json=body("w10 w11", url(), "w12", **more))
        assert answered.status_code == 200, answered.text
        document = answered.json()
        assert document["choices"][0]["message"]["content"] == expected.text
        assert document["usage"]["prompt_tokens"] == expected.prompt_tokens == len(sees.encode_with_images(prompt)[0])
    item = {
        "role": "user",
        "content": [
            {"type": "input_text", "text": "w10 w11"},
            {"type": "input_image", "image_url": url(), "detail": "auto"},
            {"type": "input_text", "text": "w12"},
        ],
    }
    answered = client.post(
        "/v1/responses", json={"model": "trimtab", "input": [item], "max_output_tokens": 4, "temperature": 0}
    )
    assert answered.json()["output"][0]["content"][0]["text"] == plain.text
    log = (tmp_path / "audit.jsonl").read_text()
    assert "sha256:" in log
    assert url()[30:60] not in log


def test_what_cannot_be_read_is_refused(client: Any) -> None:
    by_system = {**body(url())["messages"][0], "role": "system"}
    for request_body, said in (
        (body("w10", "https://example.org/a.png"), "nothing is downloaded"),
        (body("w10", "file:///etc/passwd"), "nothing is downloaded"),
        (body("w10", "data:image/png;base64,AAAA"), "can't be read"),
        (body("w10", url(1), url(2), url(3)), "2 images at most"),
        ({**body(url()), "messages": [by_system]}, "only user messages"),
    ):
        answered = client.post(CHATS, json=request_body)
        assert answered.status_code == 400
        assert said in answered.json()["error"]["message"]


def test_a_model_of_text_alone_says_so(make_service: Callable[..., Any], client_of: Callable[..., Any]) -> None:
    answered = client_of(make_service()).post(CHATS, json=body("Name a fruit.", url()))
    assert answered.status_code == 400
    assert "is a text-only model" in answered.json()["error"]["message"]
