"""The page on baking prints what it says, and its table of families is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch

from trimtab import UnsupportedError
from trimtab.baking.structure import structure_of
from trimtab.steering import Site

PAGE = (Path(__file__).parents[1] / "docs" / "bake.md").read_text()
ROWS = {
    "llama": ({"mlp_bias": True}, {"attention_bias": True}),
    "falcon": ({"bias": True}, {"bias": True}),
    **dict.fromkeys(("gpt2", "gpt_neox", "opt"), ({}, {})),
    **dict.fromkeys(("qwen3", "qwen3_moe", "olmo2", "gemma2", "gemma3"), (None, {"attention_bias": True})),
    **dict.fromkeys(("qwen2", "mistral", "mixtral", "phi3"), (None, None)),
}


@pytest.mark.real
def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/bake.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("family", ROWS)
def test_families(family: str) -> None:
    with torch.device("meta"):
        structure = structure_of(tiny.FAMILIES[family]().config)
    for kind, flags in zip(("mlp", "attention"), ROWS[family], strict=True):
        if flags is not None:
            assert structure.bias_flags([Site(1, kind)])[0] == flags
            continue
        with pytest.raises(UnsupportedError, match=r"no bias|mixture"):
            structure.bias_flags([Site(1, kind)])


def test_links() -> None:
    for target in re.findall(r"\]\(([^)h#][^)#]*)", PAGE):
        assert (Path(__file__).parents[1] / "docs" / target).exists(), target
