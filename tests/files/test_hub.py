"""Pushing to, listing and fetching from a stand-in of the Hub, and folders."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_server
import numpy as np
import pytest
import torch
import yaml
from hub_server import TOKEN, Hub

from trimtab import Add, Card, Edit, Positions, Site, Steering, TrimtabError, from_pretrained, load, push_to_hub
from trimtab.files.hub import FILE, list_steerings, save_folder
from trimtab.files.page import steering_page
from trimtab.files.steering_file import steering_digest
from trimtab.steering import ModelId

MODEL = ModelId("org/Tiny-1B-Instruct", "abc123", "llama", 4, 8, "f" * 16, None)
MEASURED = {
    "pairs": 32,
    "agreement": {"3": 0.51234567},
    "tuning": {
        "held_out": {"items": 64, "steered": 0.75, "unsteered": 0.5, "cost": {"tokens": 900}},
        "table": [1] * 40,
    },
}


def steering(scale: float = 1.0, model: ModelId | None = MODEL) -> Steering:
    options = {"instruction": "Answer | in `capitals`.\n# Now", "layers": [3]}
    card = Card("instruct", model, "d" * 16, options, MEASURED, {"torch": "2.13"})
    return Steering((Edit(Site(3), Add(scale * torch.ones(4)), Positions.all(), 1.5),), card)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    from huggingface_hub import constants

    with hub_server.running() as running:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        template = f"{running.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running


def test_there_and_back(hub):
    address = push_to_hub(steering(), "me/capitals", token=TOKEN, license="cc-by-4.0")
    (commit,) = hub.repos["me/capitals"].commits
    assert address.endswith(commit)
    back = from_pretrained("me/capitals")
    assert back == steering()
    assert back.card == steering().card
    assert set(hub.repos["me/capitals"].commits[commit]) == {FILE, "README.md"}
    assert hub.header("me/capitals") == {
        "library_name": "trimtab",
        "pipeline_tag": "text-generation",
        "tags": ["activation-steering", "steering-vector", "instruct"],
        "base_model": "org/Tiny-1B-Instruct",
        "license": "cc-by-4.0",
    }


def test_as_methods(hub, tmp_path):
    """The same, typed on the steering itself."""
    first = steering().push_to_hub("me/capitals", token=TOKEN).rpartition("/")[2]
    assert Steering.from_pretrained("me/capitals", revision=first) == steering()
    assert steering().save(tmp_path / "s.safetensors") == steering_digest(steering())
    assert Steering.load(tmp_path / "s.safetensors") == steering()


def test_revisions(hub):
    first = push_to_hub(steering(), "me/capitals", token=TOKEN).rpartition("/")[2]
    second = push_to_hub(steering(2.0), "me/capitals", token=TOKEN).rpartition("/")[2]
    assert first != second
    assert from_pretrained("me/capitals") == steering(2.0)
    assert from_pretrained("me/capitals", revision=first) == steering()
    assert from_pretrained("me/capitals", revision="main") == steering(2.0)
    repo = hub.repos["me/capitals"]
    repo.branches["old"] = first
    push_to_hub(steering(3.0), "me/capitals", token=TOKEN, revision="old")
    assert from_pretrained("me/capitals", revision="old") == steering(3.0)
    assert from_pretrained("me/capitals") == steering(2.0)


def test_what_the_hub_refuses(hub):
    def refused(words, call, *arguments, **more):
        with pytest.raises(TrimtabError, match=words) as caught:
            call(*arguments, **more)
        assert "\n" not in str(caught.value)

    push_to_hub(steering(), "me/capitals", token=TOKEN, private=True)
    refused("as me/other: .*401", push_to_hub, steering(), "me/other", token="hf_wrong")
    refused("get steering.safetensors of me/nothing from the Hub: Repo", from_pretrained, "me/nothing")
    refused("me/capitals from the Hub: Repo", from_pretrained, "me/capitals")
    refused("Revision", from_pretrained, "me/capitals", revision="v9", token=TOKEN)
    refused("get x.gguf of me/capitals", from_pretrained, "me/capitals", file="x.gguf", token=TOKEN)
    refused("Revision", push_to_hub, steering(), "me/capitals", token=TOKEN, revision="nowhere")
    for name in ("capitals", "me/../capitals/x", "https://elsewhere/me", "me/cap itals", ""):
        refused("nor a name on the Hub", push_to_hub, steering(), name)
    refused("nor a name on the Hub", from_pretrained, "capitals")
    refused("no edits", push_to_hub, Steering(), "me/empty", token=TOKEN)
    assert set(hub.repos) == {"me/capitals"}


@pytest.mark.long  # the client asks again and again for a while
def test_a_hub_that_is_down(hub):
    hub.broken = True
    with pytest.raises(TrimtabError, match=r"list the steerings of me on the Hub: .*50"):
        list_steerings("me")


def test_without_a_network(monkeypatch):
    """As the tests run by default: offline."""
    with pytest.raises(TrimtabError, match=r"get steering\.safetensors of me/capitals from the Hub"):
        from_pretrained("me/capitals")


def test_another_programs_file(hub, tmp_path):
    from files.test_foreign_files import gguf_file

    push_to_hub(steering(), "me/vectors", token=TOKEN)
    (commit,) = hub.repos["me/vectors"].commits
    there = gguf_file(tmp_path / "v.gguf", {2: np.ones(4, dtype=np.float32)}, signed=True)
    hub.repos["me/vectors"].commits[commit]["happy.gguf"] = there.read_bytes()
    assert from_pretrained("me/vectors", file="happy.gguf", layer_offset=-1).layers == (1,)


def test_listing(hub, tmp_path):
    push_to_hub(steering(), "me/capitals", token=TOKEN, license="mit")
    push_to_hub(steering(model=None), "me/lower", token=TOKEN)
    push_to_hub(steering(), "you/capitals", token=TOKEN)
    capitals, lower = list_steerings("me")
    assert (capitals.name, capitals.models) == ("me/capitals", ("org/Tiny-1B-Instruct",))
    assert capitals.tags == ("activation-steering", "steering-vector", "instruct")
    assert capitals.modified == "2026-01-02"
    assert (lower.name, lower.models) == ("me/lower", ())
    assert [listed_file.name for listed_file in list_steerings("me/low")] == ["me/lower"]
    assert [listed_file.name for listed_file in list_steerings("me", limit=1)] == ["me/capitals"]
    assert any("filter=trimtab" in request for request in hub.requests)
    with pytest.raises(TrimtabError, match="neither a folder nor a name"):
        list_steerings("me/a/b")


def test_folders(tmp_path):
    folder = tmp_path / "all" / "capitals"
    save_folder(steering(), folder)
    assert {path.name for path in folder.iterdir()} == {FILE, "README.md"}
    assert from_pretrained(folder) == steering() == load(folder / FILE)
    save_folder(steering(2.0), folder)
    assert from_pretrained(str(folder)) == steering(2.0)
    (folder.parent / "weights.safetensors").write_bytes(b"not a steering")
    (entry,) = list_steerings(folder.parent)
    assert (entry.name, entry.models, entry.tags) == (str(folder / FILE), ("org/Tiny-1B-Instruct",), ("instruct",))
    with pytest.raises(TrimtabError, match="has no revisions"):
        from_pretrained(folder, revision="main")
    with pytest.raises(TrimtabError, match="there is no file"):
        from_pretrained(folder.parent)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrimtabError, match="can't make the folder"):
        save_folder(steering(), tmp_path / "file" / "x")


def test_the_page():
    page = steering_page(steering(), "me/capitals", file=FILE, license="mit")
    header = yaml.safe_load(page.split("---\n")[1])
    assert header["license"] == "mit"
    lines = page.splitlines()
    assert "# me/capitals" in lines
    assert "| 3 | residual | add | all | 1.5 | 2 |" in lines
    assert "| tuning, held out, steered | 0.75 |" in lines
    assert "| tuning, held out, cost, tokens | 900 |" in lines
    assert "| agreement, 3 | 0.5123 |" in lines
    assert "| tuning, table | 40 items |" in lines
    assert f"| digest | {steering_digest(steering())} |" in lines
    assert "| instruction | Answer \\| in \\`capitals\\`. \\# Now |" in lines
    assert 'steering = from_pretrained("me/capitals")' in lines
    assert not any(line.startswith("# Now") for line in lines)
    total = steering_page(steering() + steering(model=None), "x", file=FILE, base_model="a/b")
    assert yaml.safe_load(total.split("---\n")[1])["base_model"] == "a/b"
    assert total.count("| method | instruct |") == 2


def test_a_page_whose_card_means_harm():
    """Names and texts of a card can't add headers, rows or tags."""
    from dataclasses import replace

    bad = "x\n---\nlicense: mit\n---\n<script> | [a](b)"
    made = replace(steering(), card=Card(bad, replace(MODEL, name=bad), options={bad: bad}, measured={bad: [bad] * 2}))
    page = steering_page(made, "me/x", file=FILE)
    assert page.count("\n---\n") == 1
    header = yaml.safe_load(page[4 : page.index("\n---\n", 4)])
    assert "license" not in header
    body = page[page.index("\n---\n", 4) :]
    assert "<script>" not in body.replace("\\<script\\>", "")
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") in (3, 7) for line in rows)


def test_the_command_line(hub, trimtab, tmp_path, monkeypatch):
    from trimtab import save

    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.chdir(tmp_path)
    save(steering(), "capitals.safetensors")
    pushed = trimtab("push", "capitals.safetensors", "me/capitals", "--license", "mit", "--json")
    assert pushed.code == 0, pushed.err
    assert pushed.json["commit"].startswith(hub.address)
    listed = trimtab("list", "me", "--json")
    assert [entry["name"] for entry in listed.json] == ["me/capitals"]
    assert "me/capitals" in trimtab("list", "me").out
    assert "no steerings found for you" in trimtab("list", "you").out
    Path("capitals.safetensors").unlink()
    pulled = trimtab("pull", "me/capitals", "--json")
    assert pulled.json == {
        "name": "me/capitals",
        "file": "capitals.safetensors",
        "digest": steering_digest(steering()),
        "layers": [3],
    }
    assert load("capitals.safetensors") == steering()
    assert trimtab("pull", "me/capitals", "--out", "x.safetensors", "--revision", "main").code == 0
    assert [Path(entry["name"]).name for entry in trimtab("list", tmp_path, "--json").json] == [
        "capitals.safetensors",
        "x.safetensors",
    ]
    gone = trimtab("pull", "me/nothing")
    assert gone.code == 2
    assert gone.err.startswith("error: can't get steering.safetensors of me/nothing")
    assert trimtab("pull", "me/capitals", "--out", "x.pt").code == 2
    assert not Path("nothing.safetensors").exists()


@pytest.mark.long
def test_in_a_process_of_its_own(tmp_path):
    """By the environment alone, as users set it."""
    with hub_server.running() as hub:
        path = tmp_path / "s.safetensors"
        from trimtab import save

        save(steering(), path)
        own = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        for command in (
            ["push", str(path), "me/mine"],
            ["pull", "me/mine", "--out", str(tmp_path / "back.safetensors")],
        ):
            program = [sys.executable, "-m", "trimtab", *map(str, command)]
            done = subprocess.run(program, env={**os.environ, **own}, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    assert load(tmp_path / "back.safetensors") == steering()
