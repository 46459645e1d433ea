"""Write docs/families.md: which features of trimtab work on which type of model, according to the doctor.

    python tools/families.py                  all types, one process each: ten minutes of one core
    python tools/families.py llama jamba      these rows again; the others stay

A type is `llama`, a variant `gemma4_text@shared`, the language model of an image-text type `llava:images`.
"""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "doctor"))

from every_family import COLUMNS, HYBRIDS, IMAGES, LANGUAGE, MARKS, PAGE, page, row  # noqa: E402

from trimtab.doctor import CHECKS  # noqa: E402
from trimtab.errors import TrimtabError  # noqa: E402

COUNTED = ("adding", "heads", "neurons", "attention", "mlp", "emphasis", "rejection", "rejecting", "stepping")


def main(arguments: list[str]) -> int:
    """Run the given types, or all, and write the page."""
    torch.set_num_threads(1)  # processes are forked from this one, and other threads wouldn't survive the fork
    rows, missing = ({}, {}) if not arguments else page()[1:]
    for kind in arguments or (*LANGUAGE, *HYBRIDS, *IMAGES):
        rows.pop(kind, None)
        missing.pop(kind, None)
        result = _checked(kind)
        print(kind, result, flush=True)
        if isinstance(result, str):
            missing[kind] = result
        else:
            rows[kind] = result
    PAGE.write_text(written(rows, missing), encoding="utf-8")
    return 0


def _checked(kind: str) -> dict[str, str] | str:
    """A type's row, or the reason why it has none, computed in a forked process that needn't import anything."""
    forks = multiprocessing.get_context("fork")
    reader, writer = forks.Pipe(duplex=False)
    process = forks.Process(target=_answer, args=(kind, writer))
    process.start()
    writer.close()
    try:
        result: dict[str, str] | str = reader.recv()
    except EOFError:
        raise SystemExit(f"{kind}: its process died; its traceback is above") from None
    process.join()
    return result


def _answer(kind: str, writer: Connection) -> None:
    try:
        writer.send(row(kind))
    except TrimtabError as error:
        writer.send(str(error))


def written(rows: dict[str, dict[str, str]], missing: dict[str, str]) -> str:
    """The content of the page."""
    counts = {name: sum(each[name] in (MARKS["works"], MARKS["partly"]) for each in rows.values()) for name in COUNTED}
    legend = "\n".join(f"- **{name}**: {what}" for name, (what, _) in CHECKS.items() if name in COLUMNS)
    summary = ", ".join(f"{name} {count}" for name, count in counts.items())
    head = f"| type | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}"
    table = "\n".join(f"| {kind} | {' | '.join(rows[kind][name] for name in COLUMNS)} |" for kind in sorted(rows))
    left = "\n".join(f"| {kind} | {_reason(missing[kind])} |" for kind in sorted(missing))
    return f"""{INTRODUCTION.format(release=transformers.__version__, count=len(rows), summary=summary)}
{legend}

{head}
{table}

## Not in the table

Of these no tiny model could be made that runs on text alone.

| type | why |
| --- | --- |
{left}
"""


def _reason(text: str) -> str:
    plain = " ".join(text.replace("|", "/").split())
    return plain.partition("that runs on text alone: ")[2][:160] or plain[:160]


INTRODUCTION = """# Model families

trimtab finds the parts of a model from what the model declares and does, never by its name. This page shows how well
that works: `python tools/families.py` writes it. The script makes a tiny random model of every type in transformers
{release} that has a causal language model (`type@name` are variants of a type, `type:images` the language models inside
of image-text models), runs everything on it and compares it with a plain computation. That takes about ten minutes of
one core; a single type takes a few seconds (`python tools/families.py llama`). `make test-all` runs it again.

To check a model of your own, or one that isn't in the table:

```bash
trimtab models --check Qwen/Qwen2.5-0.5B-Instruct   # its own weights
trimtab models --check config.json                  # a tiny random model of its type
```

```python
from trimtab.doctor import check_model

report = check_model(lm)
report["heads"].state, report["heads"].reason
```

`yes`: it works. `some`: it works at the layers that have it. `no`: it is refused, with an error that says why.
`theirs`: it is wrong in transformers itself, without any steering. Any other error fails the test.

The table is about text. What image-text models do with [images in the prompt](image-prompts.md) is tested on tiny
models of LLaVA, Gemma 3, Qwen2-VL, Idefics 3 and Llama 3.2 Vision.

Of the {count} types here, this many support each feature: {summary}.

Notes on some types:

- **Several residual streams** (hyper-connections: DeepSeek V4, Hunyuan V4, Qwen4-Exp; AltUp: Gemma 3n). The residual
  stream is the one that the configuration declares active; where it declares none, the mean of all, and an edit moves
  all alike.
- **Hybrids** (Mamba, Gated DeltaNet, convolutions beside attention). Attention is read and steered in the layers that
  have it. Rejection copies the cache for each candidate, since a state can't be shared as keys and values can; so it
  does under latent attention (DeepSeek V2 and V3, Kimi, GLM-4.7-Flash).
- **Pads.** Some types count pads as positions when they are padded on the left, without trimtab as well (`padding` is
  `theirs`). trimtab finds that out and lets prompts of different lengths run in batches of their own.
- **Mixtures of experts.** `neurons` are those of the expert that every token passes, if there is one. A routed expert
  has other tokens each time, so there is no one row of neurons. `router` are the logits by which experts are chosen:
  of the router's own linear map, before any softmax, sigmoid, bias or group ([`steermoe`](methods/steermoe.md)).
- **Looped models** run a block several times a pass. There is no one place after it, so such blocks aren't steered.
- **Layers that only reuse keys and values** (Gemma 3n and 4) compute the last prompt token alone while generating, as
  transformers has them; nothing would come of edits at the tokens before.

The columns:
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
