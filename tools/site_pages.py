"""Generates the documentation site's pages that aren't in `docs/`, such as the reference of names and commands.

mkdocs calls `on_files` and `on_page_markdown`. Links from the pages to files outside `docs/` point to the repository.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GROUPS = {
    "Models": ("trimtab.lm",),
    "Learning": ("trimtab.making", "trimtab.methods", "trimtab.learn"),
    "Steerings": ("trimtab.steering", "trimtab.decoding"),
    "Text": ("trimtab.text",),
    "Evaluating": ("trimtab.evaluate",),
    "Files": ("trimtab.files", "trimtab.baking"),
    "Errors": ("trimtab.errors",),
}
"""The parts of the reference, by the modules that define the public names."""

RESULTS = {
    "trimtab.baking.bake": ("Baked",),
    "trimtab.decoding.trace": ("Trace",),
    "trimtab.engines.answer": ("Generation", "Applied", "Dose"),
    "trimtab.engines.images": ("PromptImages",),
    "trimtab.engines.request": ("Batch", "Decoding", "NextToken"),
    "trimtab.engines.streaming": ("Stream",),
    "trimtab.engines.transformers.grammar": ("Matcher",),
    "trimtab.engines.transformers.session": ("Session",),
    "trimtab.evaluate.audit.run": ("Audit",),
    "trimtab.evaluate.divergence": ("Divergence",),
    "trimtab.learn.moments": ("PairMoments",),
    "trimtab.making.make": ("Made",),
    "trimtab.methods.cast": ("Condition",),
    "trimtab.report.projections": ("Projections",),
    "trimtab.steering.card": ("ModelId",),
    "trimtab.steering.cosines": ("Cosines",),
    "trimtab.steering.gates": ("Reading",),
    "trimtab.steering.meanings": ("Meaning",),
    "trimtab.steering.monitors": ("Monitored",),
    "trimtab.tune": ("AtNats", "Dosed", "Sweep", "Tuned"),
}
"""The classes that public functions and methods return, alone or inside each other, by their modules."""

MODULES = {
    "trimtab.bench": ("bench", "plan", "Settings"),
    "trimtab.data": ("find_trait", "instruction_pairs", "instruction_type", "prompts", "queries", "trait"),
    "trimtab.doctor": ("check_model", "tiny_lm"),
    "trimtab.evaluate.constraints": ("is_json",),
    "trimtab.evaluate.divergence": ("divergence", "reference"),
    "trimtab.evaluate.inspect_registry": ("steered",),
    "trimtab.making": ("idea_from_writer",),
    "trimtab.learn.contrast": ("check_layers", "versions"),
    "trimtab.learn.estimators": ("mean_difference", "median", "pca", "probe", "unit"),
    "trimtab.methods.caa": ("activations", "equalised", "learn_behaviours", "moved"),
    "trimtab.methods.recipe": ("Option", "Recipe"),
    "trimtab.methods.reps": ("nulled",),
    "trimtab.methods.seka": ("highlights",),
    "trimtab.methods.tda": ("kept",),
    "trimtab.steering": ("emphasis",),
    "trimtab.text.pairs": ("as_pairs", "digest", "pairs_from_rows"),
    "trimtab.tune": ("at_dose", "at_nats", "grid", "Guard", "learn_operations", "tune"),
}
"""The names that the pages import from modules of the package, by those modules."""

LEADING = {"LM": ("load", "generate", "stream", "steered", "check", "read", "project", "sweep", "next_logprobs")}
"""Classes that inherit most of their methods from a class that isn't public, with the methods to list first."""

OUTSIDE = re.compile(r"\]\((?:\.\./)+((?!\.\.)[^)#\s]+)(#[^)\s]*)?\)")
MARKUP = re.compile(r"\[/?(?:bold|dim|italic)\]")


sys.path.insert(0, str(Path(__file__).parent))
from http_page import http_page  # noqa: E402 (mkdocs loads this file by its path, so that its neighbours aren't found)


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    pages = {
        "reference/api.md": api_page(),
        "reference/cli.md": cli_page(),
        "reference/http.md": http_page(),
        "results.md": (ROOT / "benchmarks" / "RESULTS.md").read_text(),
    }
    for notebook in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")):
        pages[f"notebooks/{notebook.stem}.md"] = notebook_page(notebook)
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links to files that aren't pages of the site to the repository."""
    folder = Path("benchmarks/x.md" if page.file.src_uri == "results.md" else f"docs/{page.file.src_uri}").parent

    def link(match: re.Match[str]) -> str:
        target, anchor = match[0][2:].rstrip(")").partition("#")[0], match[2] or ""
        path = (ROOT / folder / target).resolve().relative_to(ROOT)
        generated = path.parts[0] == "docs" and path.relative_to("docs").as_posix() in files.src_uris
        if not generated and not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {target}, and there is no {path}")
        if path == Path("benchmarks/RESULTS.md"):
            up = "../" * page.file.src_uri.count("/")
            return f"]({up}results.md{anchor})"
        if path.parts[0] == "docs" and path.suffix == ".md":
            up = "../" * page.file.src_uri.count("/")
            return f"]({up}{path.relative_to('docs')}{anchor})"
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"]({config['repo_url'].rstrip('/')}/{kind}/main/{path}{anchor})"

    return OUTSIDE.sub(link, markdown)


def notebook_page(path: Path) -> str:
    """A notebook with its output, as Markdown; images and tables are embedded in the page."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f'<img alt="what the cell draws" src="data:image/png;base64,{data["image/png"].strip()}">')
            elif "text/html" in data:
                html = "".join(data["text/html"])
                parts.append("<div>" + re.sub(r"\n\s*\n", "\n", html) + "</div>")
            else:
                parts.append(f"```text\n{''.join(output.get('text') or data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def api_page() -> str:
    """Every public name of the package, what public calls return, and what the pages import from modules."""
    import trimtab

    public: dict[str, tuple[str, str]] = trimtab._PUBLIC
    parts = [
        "# Python\n\nEverything that `from trimtab import …` gives, then the [results](#results) of calls, and the"
        " names that these pages import from [modules](#trimtabtune) of the package.\n"
    ]
    placed: set[str] = set()
    for title, homes in GROUPS.items():
        names = [name for name, (home, _) in public.items() if home.startswith(homes)]
        placed |= set(names)
        parts.append(f"## {title}\n")
        # warnings come last
        for name in sorted(names, key=lambda name: (name.endswith("Warning"), name.lower(), name)):
            parts.append(f"::: {_defined(*public[name])}\n{_members(*public[name]) if name in LEADING else ''}")
    if missing := sorted(set(public) - placed):
        raise LookupError(f"the site's reference has no part for {', '.join(missing)}")
    parts.append("## Results\n\nWhat calls return, and what that contains. These classes aren't imported by name.\n")
    results = {_defined(home, name): name.lower() for home, names in RESULTS.items() for name in names}
    parts += [f"::: {dotted}\n" for dotted in sorted(results, key=lambda dotted: results[dotted])]
    for home, module_names in MODULES.items():
        parts.append(f"## {home}\n\n`from {home} import …`; see [stability](../stability.md) about these names.\n")
        parts += [f"::: {_defined(home, name)}\n" for name in module_names]
    return "\n".join(parts)


def _members(home: str, name: str) -> str:
    """All of a class's public members, own and inherited, the `LEADING` ones first."""
    from importlib import import_module

    kind = getattr(import_module(home), name)
    own = [member for base in kind.__mro__[:-1] for member in vars(base) if not member.startswith("_")]
    if unknown := set(LEADING[name]) - set(own):
        raise LookupError(f"{name} has no {', '.join(sorted(unknown))}")
    listed = "".join(f"        - {member}\n" for member in dict.fromkeys((*LEADING[name], *own)))
    return f"    options:\n      inherited_members: true\n      group_by_category: false\n      members:\n{listed}"


def _defined(home: str, name: str) -> str:
    """The dotted name of the definition, for a reader of the source."""
    from importlib import import_module

    value = getattr(import_module(home), name)
    module = getattr(value, "__module__", home)
    return f"{module if module.startswith('trimtab') else home}.{name}"


def cli_page() -> str:
    """Every command with its help and its options."""
    import typer

    from trimtab.commands.app import app

    parts = ["# Command line\n\nWhat `--help` says of each command.\n"]
    for names, command in _commands(typer.main.get_command(app), ("trimtab",)):
        parts.append(f"## {' '.join(names)}\n\n{_help(command.help or '')}\n")
        rows = [_row(parameter) for parameter in command.params if getattr(parameter, "help", None)]
        if rows:
            parts.append("| option | what it says |\n| --- | --- |\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _commands(command: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield names, command
    if hasattr(command, "list_commands"):
        context = command.context_class(command)
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            if subcommand is not None and not subcommand.hidden:
                yield from _commands(subcommand, (*names, name))


def _help(text: str) -> str:
    """A command's docstring as Markdown: text in bold or dim becomes code."""
    text = textwrap.dedent(text).replace("\f", "")

    def block(match: re.Match[str]) -> str:
        lines = match[2].strip("\n").splitlines()
        code = "\n".join([lines[0].strip(), *textwrap.dedent("\n".join(lines[1:])).splitlines()]) if lines else ""
        return f"\n```\n{code}\n```\n" if "\n" in match[2] or match[1] == "bold" else f"`{match[2].strip()}`"

    text = re.sub(r"\[(bold|dim)\](.*?)\[/\1\]", block, text, flags=re.DOTALL)
    return MARKUP.sub("", text)


def _row(option: Any) -> str:
    names = ", ".join(f"`{option_name}`" for option_name in [*option.opts, *option.secondary_opts])
    words = MARKUP.sub("", option.help).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
    return f"| {names} | {words} |"
