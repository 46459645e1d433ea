"""What the documentation shows as code is right: commands and options exist, names can be imported, and what needs no
more than the default model runs. Pages with tests of their own are run there, with what they print.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

RUN_ELSEWHERE = {
    *(
        "README.md",
        "add-a-method.md",
        "bake.md",
        "estimators.md",
        "file-format.md",
        "notebooks.md",
        "operations.md",
        "pairs.md",
    ),
    "agents.md",
    *("prompts.md", "traits.md", "your-vector.md", "bipo.md", "cap.md", "distill.md", "instaboost.md", "loreft.md"),
    *("pasta.md", "positions.md", "reps.md", "seka.md", "sttp.md"),
}
"""Pages with a test of their own."""
NOT_RUN = {
    "audit.md": "measures for minutes: audits are run in tests/evaluate and tests/commands",
    "bench.md": "compares methods for many minutes: tests/bench does on tiny models",
    "caa.md": "reads CAA's data sets, on a model from the Hub",
    "engines-vllm.md": "needs vLLM and two GPUs, or a server",
    "image-prompts.md": "needs an image-text model: tests/engines/test_images.py has tiny ones",
    "inferaligner.md": "needs two models of one family",
    "make.md": "makes a steering for minutes, on a model from the Hub: tests/making does on a tiny one",
    "serving.md": "asks a running server: examples/server.py does, and is run",
    "tuning.md": "searches for minutes: the command `tune` is run in tests/tune",
}


def blocks(page: Path, *kinds: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(page.read_text()) if kind in kinds]


def commands(code: str) -> Iterator[list[str]]:
    """The calls of `trimtab` in a block of shell, without comments, what goes before and what comes after a pipe."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "trimtab" in words[:3] and all("=" in word for word in words[: words.index("trimtab")]):
            words = words[words.index("trimtab") + 1 :]
            ends = [i for i, word in enumerate(words) if word in ("|", ">", "&&", ";", "&")]
            yield words[: ends[0]] if ends else words


WRITTEN = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)}"[:100])
    for page in PAGES
    if page.name != "add-a-method.md"  # its method comes from a package that its own test installs
    for code in blocks(page, "sh", "bash", "console")
    for words in commands(code)
]


@pytest.fixture(scope="module")
def program() -> Any:
    import typer

    from trimtab.commands.app import app

    return typer.main.get_command(app)


@pytest.mark.parametrize("words", WRITTEN)
def test_a_command_and_its_options_exist(program: Any, words: list[str]) -> None:
    from trimtab.commands import learn_distill
    from trimtab.commands.learn_method import DIRECT_METHODS, DISTILL, LearnCommand, command_for
    from trimtab.methods.recipe import find_recipe

    command, rest = program, list(words)
    while rest and hasattr(command, "get_command") and rest[0][:1] != "-":
        subcommand = command.get_command(command.context_class(command), rest[0])
        assert subcommand is not None, f"there is no command {rest[0]!r} in {words}"
        command, rest = subcommand, rest[1:]
    if isinstance(command, LearnCommand) and rest and rest[0] not in DIRECT_METHODS:
        recipe = find_recipe(rest[0])
        if recipe is not None:
            command, rest = learn_distill.command() if recipe.name == DISTILL else command_for(recipe), rest[1:]
    if command.context_settings.get("ignore_unknown_options") or ("--engine", "vllm") in pairwise(rest):
        pytest.skip("the rest goes to another program")
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    for word in rest:
        if re.match(r"--?[a-zA-Z]", word):
            assert word.partition("=")[0] in known, f"{word} isn't an option of {command.name}"


def test_the_example_data_that_commands_name_exist() -> None:
    named = {word for page in PAGES for code in blocks(page, "sh") for words in commands(code) for word in words}
    files = {word for word in named if word.startswith("examples/")}
    assert len(files) >= 4
    assert not {file for file in files if not (ROOT / file).is_file()}


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_names_and_keywords_exist(page: Path) -> None:
    for code in blocks(page, "python"):
        tree = ast.parse(code)
        names: dict[str, Any] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trimtab":
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    names[alias.asname or alias.name] = getattr(module, alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and callable(names.get(node.func.id)):
                parameters = inspect.signature(names[node.func.id]).parameters
                if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                    keywords = {keyword.arg for keyword in node.keywords} - {None}
                    assert keywords <= set(parameters), (
                        f"{page.name}: {node.func.id} takes no {keywords - set(parameters)}"
                    )


def test_every_page_with_code_is_run_or_says_why_not() -> None:
    names = {page.name for page in WITH_PYTHON}
    sorts = [RUN_ELSEWHERE, set(NOT_RUN), set(PREPARED)]
    assert set().union(*sorts) == names
    assert sum(map(len, sorts)) == len(names)


def _doses(lm: Any) -> dict[str, Any]:
    _shout(lm, "shout.safetensors")
    return {}


def _formats(lm: Any) -> dict[str, Any]:
    import trimtab

    steering = _shout(lm, "love.safetensors")
    for name in ("love.gguf", "generated.gguf"):
        trimtab.export(steering.at(trimtab.Positions.all()), name)
    return {}


def _shout(lm: Any, path: str) -> Any:
    import trimtab

    loud = [("I SAID STOP. NOW!", "I said stop, now."), ("THIS IS GREAT!", "This is great."), ("WHY NOT?", "Why not?")]
    steering = trimtab.learn_caa(lm, loud, layers=12)
    trimtab.save(steering, path)
    return steering


def _model(lm: Any) -> dict[str, Any]:
    return {"lm": lm}


def _directer(lm: Any) -> dict[str, Any]:
    import trimtab

    some = trimtab.learn_caa(lm, [("YES!", "Yes."), ("STOP NOW!", "Stop now.")], layers=[10, 12, 14])
    return {"lm": lm, "prompts": ["Hello", "Who are you?"], "steering": some, "one_layer_steering": some[12]}


def _cast(lm: Any) -> dict[str, Any]:
    def texts_on(about: str) -> list[str]:
        return [
            f"{how} {about}?" for how in ("Tell me about", "What is", "Who made", "Explain", "Why is there", "Describe")
        ]

    texts = {"attacks": texts_on("a bomb"), "chats": texts_on("the weather"), "stories": texts_on("a fairy tale")}
    return {"lm": lm, "refusal": _shout(lm, "shout.safetensors"), **texts}


def _monitors(lm: Any) -> dict[str, Any]:
    steering = _shout(lm, "harm.safetensors")
    return {"lm": lm, "pirate": steering}


def _tda(lm: Any) -> dict[str, Any]:
    import trimtab

    trimtab.save(trimtab.learn_tda(lm, ["Rain falls.", "The sea is deep."]), "sparse.safetensors")
    return {}


PREPARED: dict[str, Any] = {
    "doses.md": _doses,
    "inspect.md": lambda lm: {},
    "start.md": lambda lm: {},
    "formats.md": _formats,
    "families.md": _model,
    "directer.md": _directer,
    "cast.md": _cast,
    "instruct.md": lambda lm: {},
    "monitors.md": _monitors,
    "steermoe.md": lambda lm: {},
    "tda.md": _tda,
}
"""What a page's code takes for granted."""
UNREACHABLE = ("push_to_hub", 'engine="llamacpp"')
"""What these pages' other code needs: the Hub, which tests/files/test_hub.py stands in for, or a model in GGUF."""


LONG = ("cast.md", "directer.md", "doses.md", "families.md", "instruct.md", "monitors.md", "steermoe.md", "tda.md")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.long_unless(lambda name: name not in LONG)
@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.filterwarnings("ignore")
def test_it_runs(name: str, lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (page,) = [page for page in PAGES if page.name == name]
    names = {"__name__": "example", **PREPARED[name](lm)}
    ran = 0
    for code in blocks(page, "python"):
        if not any(word in code for word in UNREACHABLE):
            exec(compile(code, str(page.relative_to(ROOT)), "exec"), names)
            ran += 1
    assert ran
