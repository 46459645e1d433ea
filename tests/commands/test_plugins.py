"""Methods and engines of other distributions: installed, found by their entry points, listed, run; and broken ones."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from trimtab import Ablate, Edit, Positions, Site, Steering, TrimtabError, UnsupportedError, load
from trimtab.engines import engine
from trimtab.methods.recipe import Recipe, find_recipe, recipes
from trimtab.plugins import ENGINES, METHODS, PluginWarning

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "trimtab-doubled"
version = "0.3"

[project.entry-points."trimtab.methods"]
doubled = "trimtab_doubled:RECIPE"

[project.entry-points."trimtab.engines"]
theirs = "trimtab_doubled:Theirs"

[tool.hatch.build]
include = ["trimtab_doubled.py"]
"""
MODULE = '''
"""A method that adds a multiple of the mean difference (nobody, 2026), and an engine of two random blocks."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from trimtab import Add, UnsupportedError, learn_caa
from trimtab.engines.answer import Applied, Generation
from trimtab.engines.contract import FEATURES, Sizes
from trimtab.engines.language_model import LanguageModel
from trimtab.engines.request import Batch, NextToken
from trimtab.methods.recipe import Option, Recipe
from trimtab.steering import ModelId
from trimtab.steering.gates import ALWAYS
from trimtab.steering.identity import check_learned_on, fingerprint, sampled_rows

RECIPE = Recipe(
    name="doubled",
    title="a doubled difference",
    paper="nobody, 2026",
    shapes=("answers", "texts"),
    data="answers",
    reads="the last token",
    acts="adds",
    function="trimtab_doubled:learn_doubled",
    options=(
        Option("times", "float", 2.0, "How much of it."),
        Option("norm", "str", "raw", "Which norm.", ("raw", "unit")),
        Option("positions", "positions", None, "Where."),
    ),
)


def learn_doubled(lm, pairs, layers=None, *, times=2.0, norm="raw", positions=None, progress=None):
    return times * learn_caa(lm, pairs, layers, norm=norm, positions=positions, progress=progress)


class Theirs(LanguageModel):
    engine = "theirs"
    cannot = dict.fromkeys(FEATURES, "it only adds after blocks")

    def __init__(self, name, tokenizer):
        self.name, self.tokenizer, self.layout = name, tokenizer, Sizes(layers=3, width=16, context=None)
        random = torch.Generator().manual_seed(0)
        self.embeddings = torch.randn(len(tokenizer), 16, generator=random)
        self.blocks = torch.randn(3, 16, 16, generator=random)

    @classmethod
    def load(cls, name, *, layers=None, device=None, dtype="auto", revision=None):
        return cls(Path(name).name, AutoTokenizer.from_pretrained(name))

    @property
    def identity(self):
        rows = self.embeddings[sampled_rows(len(self.embeddings))]
        return ModelId(self.name, None, "theirs", 16, 3, fingerprint("theirs", self.embeddings.shape, rows))

    @property
    def runs_in(self):
        return {"dtype": "float32", "device": "cpu"}

    def check(self, steering, *, transfer=False):
        check_learned_on(steering, self.identity, transfer=transfer)
        self.check_sites([edit.site for edit in steering.edits])
        for edit in steering.edits:
            if type(edit.operation) is not Add or edit.operation.keep_norm or edit.gate != ALWAYS:
                raise UnsupportedError(f"the theirs engine only adds, and always: it can't run {edit}")

    def check_sites(self, sites):
        for site in sites:
            if site.kind != "residual" or not 0 <= site.layer < 3:
                raise UnsupportedError(f"the theirs engine has the residual stream after blocks 0 to 2, and not {site}")

    def admit(self, requests, decoding):
        if decoding.options:
            raise UnsupportedError(f"the theirs engine is greedy and can't take {', '.join(decoding.options)}")
        return decoding

    def run(self, requests, decoding):
        return [[self._answer(request, decoding)] for request in requests]

    def answer_nlls(self, texts):
        self.require("perplexity")

    def _answer_logits(self, texts, steerings):
        self.require("logits")

    def _answer(self, request, decoding):
        ids, logprobs = list(request.ids), []
        for _ in range(decoding.max_new_tokens):
            scores = self._logprobs(ids, len(request.ids), request.steering)
            ids.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
        new = tuple(ids[len(request.ids) :])
        return Generation(
            self.tokenizer.decode(new, skip_special_tokens=True), new, "length", len(request.ids),
            _applied(request.steering), tuple(logprobs) if decoding.logprobs else None,
        )

    def _read(self, groups, sites, tokens, steering):
        for number, group in enumerate(groups):
            after = [self._run(text.ids, len(text.ids), steering) for text in group]
            values = {s: [[x[s.layer][list(t.positions)] for x, t in zip(after, group)]] for s in sites}
            yield Batch([number], values)

    def _next_logprobs(self, choices, steerings, batch_size, progress):
        read = []
        for choice, steering in zip(choices, steerings):
            scores = self._logprobs(choice.ids, choice.prompt_length, steering)
            read.append(NextToken(tuple(float(scores[token]) for token in choice.candidates), _applied(steering)))
        return read

    def _logprobs(self, ids, prompt_length, steering):
        return (self._run(ids, prompt_length, steering)[-1][-1] @ self.embeddings.T).log_softmax(-1)

    def _run(self, ids, prompt_length, steering):
        """The residual stream `[tokens, width]` after each block; a token sees the mean of those up to itself."""
        x, after = self.embeddings[list(ids)], []
        for layer, block in enumerate(self.blocks):
            x = x + torch.tanh(x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None] @ block)
            for edit in steering.edits if steering else ():
                for start, stop in edit.positions.resolve(prompt_length) if edit.site.layer == layer else ():
                    x[start:stop] += edit.strength * edit.operation.direction.to(x.dtype)
            after.append(x)
        return after


def _applied(steering):
    return Applied(tuple(str(edit) for edit in steering.edits) if steering else (), ())
'''
Write = Callable[..., None]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the distribution is installed in, by pip, without a network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "trimtab_doubled.py").write_text(MODULE)
    options = ["--quiet", "--no-index", "--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return target


@pytest.fixture
def theirs(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(installed))


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Put a distribution of one entry point where Python looks, as an installer would leave it."""

    def put(distribution: str, group: str, entry: str, module: str = "", code: str = "") -> None:
        about = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
        if module:
            (tmp_path / f"{module}.py").write_text(code)
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))

    return put


@pytest.mark.usefixtures("theirs")
def test_a_method_is_learned_with_from_the_command_line(
    tmp_path: Path, trimtab: Any, model: Path, answer_pairs: Path
) -> None:
    out = tmp_path / "d.safetensors"
    common = ["--pairs", str(answer_pairs), "--out", str(out), "--model", str(model), "--layers", "1,2", "--json"]
    document = trimtab("learn", "doubled", *common, "--times", "3", "--norm", "unit", "--positions", "all").json
    assert document["method"] == "doubled"
    steering = load(out)
    assert [(e.site.layer, e.strength, str(e.positions)) for e in steering.edits] == [(1, 3.0, "all"), (2, 3.0, "all")]
    assert all(abs(float(edit.operation.direction.norm()) - 1) < 1e-5 for edit in steering.edits)


@pytest.mark.usefixtures("theirs")
def test_a_method_is_listed_and_explained_with_its_distribution(trimtab: Any) -> None:
    listed = trimtab("methods", "--json").json
    assert listed["doubled"]["distribution"] == "trimtab-doubled 0.3"
    assert listed["caa"]["distribution"] == "trimtab"
    assert "trimtab-doubled 0.3" in trimtab("methods").out
    shown = trimtab("learn", "doubled", "--help").out
    for words in ("--times", "How much of it.", "From trimtab-doubled 0.3."):
        assert words in shown


@pytest.mark.usefixtures("theirs")
def test_bad_choices_and_data(tmp_path: Path, trimtab: Any, prompt_pairs: Path) -> None:
    common = ["learn", "doubled", "--pairs", prompt_pairs, "--out", tmp_path / "d.safetensors"]
    for more, words in (
        ([], "pairs of prompts"),
        (["--norm", "x"], "raw, unit"),
        (["--layers", "a"], "list of blocks"),
        (["--for", "llama.cpp"], "doubled isn't known to only add"),
    ):
        ran = trimtab(*common, *more)
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
        assert words in ran.err


@pytest.mark.usefixtures("theirs")
def test_an_engine_is_loaded_by_its_name(trimtab: Any, model: Path) -> None:
    lm = trimtab_lm(model, engine="theirs")
    assert type(lm).__name__ == "Theirs"
    (answer,) = lm.generate("The sea", max_new_tokens=4)
    assert len(answer.token_ids) == 4
    common = ["generate", "--prompt", "The sea", "--model", model, "--max-new-tokens", "4", "--json"]
    assert trimtab(*common, "--engine", "theirs").json["answers"][0]["text"] == answer.text
    with pytest.raises(TrimtabError, match=r"no engine 'ours'; engines: transformers, llamacpp, vllm, theirs$"):
        engine("ours")


@pytest.mark.usefixtures("theirs")
def test_an_engine_learns_steers_and_refuses(model: Path) -> None:
    lm = trimtab_lm(model, engine="theirs")
    pairs = [(f"the sea {i}", f"a stone {i}") for i in range(4)]
    learned = trimtab.learn_caa(lm, pairs, [0, 1])
    assert [edit.site.layer for edit in learned.edits] == [0, 1]
    learned = learned.at(Positions.all())
    (plain, steered) = lm.generate(["The sea", "The sea"], [None, 50 * learned], max_new_tokens=4)
    assert steered.token_ids != plain.token_ids
    assert steered.applied.edits == tuple(str(edit) for edit in (50 * learned).edits)
    (before,), (after,) = (lm.capture("The sea", 0, Positions.all(), steering=each) for each in (None, learned))
    pushed = learned.edits[0].strength * learned.edits[0].operation.direction
    torch.testing.assert_close(after[Site(0)] - before[Site(0)], pushed.expand_as(before[Site(0)]))
    ablation = Steering((Edit(Site(1), Ablate(torch.ones(16) / 4)),))
    assert "the theirs engine only adds" in lm.supports(ablation)
    for learn, data in ((trimtab.learn_seka, ()), (trimtab.learn_bipo, (pairs,))):
        with pytest.raises(UnsupportedError, match="the theirs engine doesn't support learning"):
            learn(lm, *data)


def trimtab_lm(model: Path, **options: Any) -> Any:
    return trimtab.LM.load(model, device="cpu", **options)


def test_without_the_distribution_there_is_nothing_of_it(trimtab: Any, answer_pairs: Path) -> None:
    assert "doubled" not in recipes()
    ran = trimtab("learn", "doubled", "--out", "x.safetensors", "--pairs", answer_pairs)
    assert "there is no method 'doubled'; methods: actadd, bipo, caa" in ran.err


BROKEN = {
    "its module isn't there": ("missing_module:RECIPE", "", "ModuleNotFoundError"),
    "its module raises": ("broken_module:RECIPE", "raise ZeroDivisionError('oh')", "ZeroDivisionError: oh"),
    "its module ends the program": ("broken_module:RECIPE", "raise SystemExit(1)", "SystemExit: 1"),
    "it imports what was renamed": ("broken_module:RECIPE", "from torch import nothing_of_that_name", "ImportError"),
    "the name isn't there": ("broken_module:RECIPE", "", "AttributeError"),
    "it is no recipe": ("broken_module:RECIPE", "RECIPE = {'name': 'bad'}", "it isn't a Recipe"),
    "its recipe is wrong": (
        "broken_module:RECIPE",
        "from trimtab.methods.recipe import Recipe\nRECIPE = Recipe('bad', '', '', '', '', '', function='f')",
        "names their shapes",
    ),
    "it has another name": (
        "broken_module:RECIPE",
        "from trimtab.methods.recipe import Recipe\n"
        "RECIPE = Recipe('good', '', '', '', '', '', function='m:f', takes='nothing')",
        "is called 'good', and its entry point 'bad'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_method_is_named_and_breaks_nothing_else(
    case: str, write: Write, trimtab: Any, tmp_path: Path
) -> None:
    entry, code, why = BROKEN[case]
    write("bad-plugin", METHODS, f"bad = {entry}", "broken_module", code)
    with pytest.warns(PluginWarning, match="the method 'bad' of bad-plugin 1.0") as warned:
        known = recipes()
    assert why in str(warned[0].message)
    assert "caa" in known
    assert "bad" not in known

    ran = trimtab("methods", "--json")
    assert ran.code == 0
    assert "caa" in ran.json
    assert ran.err.startswith("warning: the method 'bad' of bad-plugin 1.0")
    assert find_recipe("caa") == known["caa"]  # another method doesn't so much as import it
    ran = trimtab("learn", "repe", "--help")
    assert (ran.code, ran.err) == (0, "")
    ran = trimtab("learn", "bad", "--help")
    assert ran.code == 2
    assert "bad-plugin 1.0" in ran.err
    assert why in ran.err


def test_a_method_whose_function_cannot_be_imported(write: Write, trimtab: Any) -> None:
    code = (
        "from trimtab.methods.recipe import Recipe\n"
        "RECIPE = Recipe('bad', 't', 'p', 'd', 'r', 'a', function='broken_module:learn', takes='nothing')"
    )
    write("bad-plugin", METHODS, "bad = broken_module:RECIPE", "broken_module", code)
    with pytest.raises(TrimtabError, match=r"'bad' of bad-plugin 1.0 can't be loaded: broken_module:learn: Attr"):
        recipes()["bad"].load()


def test_a_method_with_an_option_that_every_command_has(write: Write, trimtab: Any) -> None:
    code = (
        "from trimtab.methods.recipe import Option, Recipe\n"
        "RECIPE = Recipe('bad', 't', 'p', 'd', 'r', 'a', function='m:f', takes='nothing',\n"
        "                options=(Option('layers', 'int', 3, ''),))"
    )
    write("bad-plugin", METHODS, "bad = broken_module:RECIPE", "broken_module", code)
    ran = trimtab("learn", "bad", "--help")
    assert ran.code == 2
    assert "bad of bad-plugin 1.0 has an option 'layers', which every command has" in ran.err


def test_a_broken_engine_is_named_and_breaks_nothing_else(write: Write, trimtab: Any, model: Path) -> None:
    write("bad-plugin", ENGINES, "bad = missing_module:Engine")
    with pytest.raises(TrimtabError, match=r"the engine 'bad' of bad-plugin 1.0 .*ModuleNotFoundError"):
        trimtab_lm(model, engine="bad")
    assert trimtab_lm(model).name
    with pytest.raises(TrimtabError, match="engines: transformers, llamacpp, vllm, bad"):
        engine("other")


def test_an_engine_that_loads_nothing(write: Write) -> None:
    write("bad-plugin", ENGINES, "bad = broken_module:Engine", "broken_module", "class Engine: ...")
    with pytest.raises(TrimtabError, match=r"bad-plugin 1.0 .*has no `load`"):
        engine("bad")


def test_two_of_one_name(write: Write, trimtab: Any) -> None:
    write("one-plugin", METHODS, "mine = one:RECIPE")
    write("other-plugin", METHODS, "mine = other:RECIPE")
    for refused in (recipes, lambda: find_recipe("mine")):
        with pytest.raises(TrimtabError, match=r"'mine' of (one|other)-plugin 1.0 and .* 'mine' of (one|other)-plugin"):
            refused()
    assert find_recipe("caa") is not None
    ran = trimtab("learn", "mine", "--help")
    assert ran.code == 2
    for name in ("one-plugin 1.0", "other-plugin 1.0"):
        assert name in ran.err


def test_a_name_that_is_our_own(write: Write) -> None:
    write("bold-plugin", METHODS, "caa = bold:RECIPE")
    for refused in (recipes, lambda: find_recipe("caa")):
        with pytest.raises(TrimtabError, match=r"trimtab's own method 'caa' and the method 'caa' of bold-plugin 1.0"):
            refused()


@pytest.mark.parametrize("name", ["vllm", "transformers"])
def test_an_engine_of_our_own_name(write: Write, name: str) -> None:
    write("bold-plugin", ENGINES, f"{name} = bold:Engine")
    with pytest.raises(
        TrimtabError, match=rf"trimtab's own engine '{name}' and the engine '{name}' of bold-plugin 1.0"
    ):
        engine(name)


def test_our_own_names_are_all_different() -> None:
    from trimtab.methods.own import OWN

    names = [recipe.name for recipe in OWN]
    assert names == sorted(set(names))
    assert all(isinstance(recipe, Recipe) and recipe.distribution == "trimtab" for recipe in OWN)


def test_the_page_names_what_an_engine_implements() -> None:
    """The table is the members that are abstract, and the attributes that have no value in the base class."""
    from trimtab.engines.language_model import LanguageModel

    page = (Path(__file__).parents[2] / "docs/add-a-method.md").read_text(encoding="utf-8")
    section = page.partition("\n## An engine\n")[2].partition("\n## ")[0]
    named = {name for row in re.findall(r"(?m)^\| (`.*?) \|", section) for name in re.findall(r"`(\w+)`", row)}
    assert named == LanguageModel.__abstractmethods__ | set(LanguageModel.__annotations__)
