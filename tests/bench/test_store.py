"""The folder of a run: which runs may be resumed in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_equal_nats import planned
from tiny import tiny

from trimtab.bench import bench, store
from trimtab.bench.page import write_page
from trimtab.bench.store import HEAD, Store, code_digest
from trimtab.errors import TrimtabError


def test_the_digest_covers_every_source_and_data_file(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for name in ("a.py", "data/b.json"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(store, "PACKAGE", tmp_path)
    compute = code_digest.__wrapped__
    digests = [compute()]
    (tmp_path / "a.pyc").write_text("compiled")
    assert compute() == digests[0]
    (tmp_path / "data" / "b.json").write_text("2")
    digests.append(compute())
    (tmp_path / "a.py").rename(tmp_path / "c.py")
    digests.append(compute())
    (tmp_path / "c.py").write_text("")
    digests.append(compute())
    assert len(set(digests)) == 4
    monkeypatch.undo()
    assert (store.PACKAGE / "bench" / "store.py").samefile(Path(store.__file__))


def head_of(folder):
    return json.loads((folder / HEAD).read_text())


def test_a_run_of_other_code_is_resumed_only_on_request(tmp_path):
    def head(code, seed=0):
        return {"settings": {"seed": seed}, "code": [code]}

    Store(tmp_path, head("aa"))
    Store(tmp_path, head("aa"))
    with pytest.raises(TrimtabError, match=r"other code of trimtab began \(digest aa, and bb now\): .* --mix-code"):
        Store(tmp_path, head("bb"))
    assert head_of(tmp_path)["code"] == ["aa"]
    with pytest.raises(TrimtabError, match="other settings"):
        Store(tmp_path, head("bb", 1), mix_code=True)
    Store(tmp_path, head("bb"), mix_code=True)
    assert head_of(tmp_path)["code"] == ["aa", "bb"]
    Store(tmp_path, head("bb"))
    Store(tmp_path, head_of(tmp_path))  # as results_of opens it
    with pytest.raises(TrimtabError, match="digest aa, bb, and aa now"):
        Store(tmp_path, head("aa"))


def test_a_run_from_before_digests_counts_as_other_code(tmp_path):
    Store(tmp_path, {"settings": {}})
    with pytest.raises(TrimtabError, match="digest unknown, and aa now"):
        Store(tmp_path, {"settings": {}, "code": ["aa"]})
    Store(tmp_path, {"settings": {}, "code": ["aa"]}, mix_code=True)
    assert head_of(tmp_path)["code"] == ["unknown", "aa"]


def test_the_results_of_mixed_code_say_so(tmp_path):
    lm, settings = tiny("llama"), planned(("random", "planted"), (1.0,))
    (outline,) = settings.outlines
    unmixed = bench(lm, settings, tmp_path)
    assert head_of(tmp_path)["code"] == [code_digest()]
    assert not any("different code" in line for line in unmixed.words())
    (tmp_path / HEAD).write_bytes(store.canonical({**head_of(tmp_path), "code": ["0123"]}))
    with pytest.raises(TrimtabError, match="other code"):
        bench(lm, replace(settings, outlines=(outline,)), tmp_path)
    mixed = bench(lm, settings, tmp_path, mix_code=True)
    assert f"its parts were computed by different code (digests 0123, {code_digest()})" in mixed.words()
    write_page(tmp_path / "page.html", mixed)
    assert f"code 0123, {code_digest()}" in (tmp_path / "page.html").read_text()
