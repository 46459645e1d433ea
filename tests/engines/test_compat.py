"""The one file that knows transformers' names: its window of versions, and caches by what they are."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path
from typing import Any

import faults
import pytest
import tiny
import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from tiny import direction, prompt
from transformers import DynamicCache, StaticCache

import trimtab
from trimtab import Add, Edit, Positions, Site, Steering, TrimtabError, UnsupportedError
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.decode import GenerationBatch, GenerationRequest
from trimtab.engines.transformers.sampling import GREEDY
from trimtab.errors import UntestedVersionWarning

SOURCE = Path(trimtab.__file__).parent
MAY_CHANGE = {
    *compat.CACHE_NAMES[1:],
    "_update_model_kwargs_for_generation",
    "_prepare_generation_config",
    "_prepare_special_tokens",
    "_get_logits_processor",
    "_pad_token_tensor",
    "_attn_implementation",
    "_global_mapping",
    "_can_record_outputs",
    "altup_active_idx",
    "ALL_ATTENTION_FUNCTIONS",
    "_is_stateful",
    "_model_mapping",
    "prepare_inputs_for_generation",
    "eager_attention_forward",
}
PUBLIC = {  # what transformers documents for everybody to import
    "LlamaConfig",
    "LlamaForCausalLM",
    "AutoConfig",
    "PreTrainedModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoTokenizer",
    "GenerationConfig",
    "GgufConfig",
    "PreTrainedTokenizerFast",
    "logging",
}
GENERATED = Steering((Edit(Site(1), Add(direction(1, 3.0)), Positions.generated()),))


class TestTheWindow:
    def test_older_is_refused(self) -> None:
        with pytest.raises(TrimtabError, match=r"5\.15\.1 is too old: trimtab needs 5\.16 or newer"):
            compat.check_version("5.15.1")

    def test_newer_warns_once_in_words(self) -> None:
        compat._warn_untested.cache_clear()
        with pytest.warns(UntestedVersionWarning, match=r"5\.99\.0 is newer than 5\.24, the newest release"):
            compat.check_version("5.99.0")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compat.check_version("5.99.0")
        compat._warn_untested.cache_clear()

    @pytest.mark.parametrize("version", ["5.16.0", "5.20.1", "5.24.0", "5.24.3"])
    def test_what_was_tested_is_silent(self, version: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compat.check_version(version)

    def test_a_model_is_checked_when_it_is_wrapped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compat.transformers, "__version__", "4.57.0")
        with pytest.raises(TrimtabError, match="too old"):
            tiny.tiny("llama")

    def test_the_package_asks_for_the_same_window(self) -> None:
        text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
        range_of_versions = re.search(r'^ *"transformers([^"]*)"', text, re.MULTILINE)
        assert range_of_versions is not None
        window = SpecifierSet(range_of_versions.group(1))
        oldest, newest = Version(compat.OLDEST), Version(compat.NEWEST)
        assert Version(f"{oldest}.0") in window
        assert Version(f"{newest}.9") in window
        assert Version(f"{newest.major}.{newest.minor + 1}.0") not in window
        assert Version(f"{oldest.major}.{oldest.minor - 1}.9") not in window


class TestNamesStandInOnePlace:
    """No other file names what transformers may rename."""

    @pytest.mark.parametrize("folder", ["src", "benchmarks"])
    def test_nobody_else_names_them(self, folder: str) -> None:
        root = SOURCE if folder == "src" else Path(__file__).parents[2] / folder
        for path in sorted(root.rglob("*.py")):
            if path.name == "compat.py" or "vllm" in path.parts:  # vLLM brings a transformers of its own
                continue
            text = path.read_text()
            if "transformers" not in text and not any(name in text for name in MAY_CHANGE):
                continue  # to parse everything takes seconds
            named: set[Any] = set()
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Attribute):
                    named.add(node.attr)
                elif isinstance(node, ast.keyword):
                    named.add(node.arg)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    named.add(node.value)
                elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
                    assert {alias.name for alias in node.names} <= PUBLIC, path
            assert not named & MAY_CHANGE, path


class TestCaches:
    @pytest.mark.parametrize("name", ["cache", "past_key_values", "kv", "whatever_comes_next"])
    def test_found_under_any_name(self, name: str) -> None:
        cache = DynamicCache()
        assert compat.cache_of({"input_ids": torch.ones(1, 2), "use_cache": True, name: cache}, "Model") is cache

    def test_none_is_none(self) -> None:
        arguments = {"input_ids": torch.ones(1, 2), "cache": None, "position_embeddings": (torch.ones(1),), "mode": "x"}
        assert compat.cache_of(arguments, "Model") is None

    @pytest.mark.parametrize("name", ["cache", "past_key_values", "memory"])
    def test_another_kind_of_past_is_refused(self, name: str) -> None:
        with pytest.raises(UnsupportedError, match=f"Model was given {name}, a Memory, which trimtab doesn't know"):
            compat.cache_of({name: faults.Memory(None)}, "Model")

    def test_a_tuple_of_tensors_for_a_cache_is_refused(self) -> None:
        with pytest.raises(UnsupportedError, match="was given past_key_values, a tuple"):
            compat.cache_of({"past_key_values": ((torch.ones(1), torch.ones(1)),)}, "Model")

    def test_two_are_refused(self) -> None:
        with pytest.raises(UnsupportedError, match="2 caches"):
            compat.cache_of({"a": DynamicCache(), "b": DynamicCache()}, "Model")

    def test_one_under_two_names_is_one(self) -> None:
        cache = DynamicCache()
        assert compat.cache_of({"cache": cache, "past_key_values": cache}, "Model") is cache

    def test_what_says_how_long_it_is_is_one(self) -> None:
        class Own:
            def get_seq_length(self) -> int:
                return 7

        own = Own()
        assert compat.cache_of({"state": own}, "Model") is own
        assert compat.past_length(own) == 7

    def test_a_static_cache_says_how_much_it_holds(self) -> None:
        lm = tiny.tiny("llama")
        cache = StaticCache(config=lm.model.config, max_cache_len=32)
        with torch.no_grad():
            lm.model(**compat.with_cache(lm.model, {"input_ids": torch.ones(1, 5, dtype=torch.long)}, cache))
        assert compat.past_length(cache) == 5

    @pytest.mark.parametrize("family", tiny.FAMILIES)
    def test_every_family_declares_its_parameter(self, family: str) -> None:
        lm = tiny.tiny(family)
        for module in (lm.model, lm.layout.decoder):
            assert compat.cache_name(module) in compat.CACHE_NAMES

    def test_a_model_without_one_is_an_error_and_not_a_model_without_a_cache(self) -> None:
        class Odd(torch.nn.Module):
            def forward(self, ids: Any, memory: Any = None) -> None: ...

        with pytest.raises(UnsupportedError, match="no parameter for a cache that trimtab knows; it takes ids, memory"):
            compat.cache_name(Odd())


class TestARenamedArgument:
    """The next release's name for the cache, whatever it is: steered right, or an error; never unsteered."""

    PROMPTS = (prompt(1, 5), prompt(2, 9))

    def test_is_steered_as_before(self) -> None:
        lm = tiny.tiny("llama")
        plain = [answer.token_ids for answer in lm.generate(self.PROMPTS, None, max_new_tokens=6)]
        wanted = [lm.generate(text, GENERATED, max_new_tokens=6)[0].token_ids for text in self.PROMPTS]
        assert wanted != plain
        with faults.renamed_cache(lm.model):
            assert compat.cache_name(lm.layout.decoder) == "kv"
            assert [lm.generate(text, GENERATED, max_new_tokens=6)[0].token_ids for text in self.PROMPTS] == wanted
            with lm.steered(GENERATED):
                ids = torch.tensor([lm.encode(self.PROMPTS[0])])
                out = lm.model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
            assert tuple(out[0, ids.shape[1] :].tolist()) == wanted[0]
            batch = GenerationBatch(lm.model, lm.tokenizer, lm.layout)
            batch.insert(GenerationRequest(tuple(lm.encode(self.PROMPTS[0])), GENERATED, 6, GREEDY))
            assert tuple(batch.step()[0].token for _ in range(6)) == wanted[0]

    def test_reading_shares_prefixes_as_before(self) -> None:
        lm = tiny.tiny("llama")
        many = [f"{prompt(3, 12)} {prompt(seed, 3)}" for seed in range(4)]
        wanted = [activations[Site(2)] for activations in lm.capture(many, [2])]
        with faults.renamed_cache(lm.model):
            for x, y in zip(lm.capture(many, [2]), wanted, strict=True):
                assert torch.allclose(x[Site(2)], y)

    def test_and_a_past_of_a_new_kind_is_an_error(self) -> None:
        lm = tiny.tiny("llama")
        with faults.renamed_cache(lm.model, wrapped=True):
            with pytest.raises(UnsupportedError, match="was given kv, a Memory"):
                lm.generate(self.PROMPTS[0], GENERATED, max_new_tokens=6)
            ids = torch.tensor([lm.encode(self.PROMPTS[0])])
            with lm.steered(GENERATED), pytest.raises(UnsupportedError, match="was given kv, a Memory"):
                lm.model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
