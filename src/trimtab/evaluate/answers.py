"""Generate the answers of an evaluation: all arms in the same batches, one line per record, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError
from trimtab.evaluate.records import FORMAT, FORMAT_KEY, ArmPrompt, Record, split_records
from trimtab.files.steering_file import steering_digest

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM
    from trimtab.engines.transformers.generate import Generation

Score = Callable[[ArmPrompt, "Generation"], dict[str, float]]
AnswerBatch = Callable[[int, Sequence[ArmPrompt], Mapping[int, str]], list[Record]]


def answer(
    lm: LM,
    requests: Sequence[ArmPrompt],
    *,
    score: Score,
    max_new_tokens: int = 256,
    out: str | Path | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    transfer: bool = False,
    about: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Record]:
    """Answer and score all requests, whatever their arms and steerings, with the same stopping rules.

    The batches are fixed before the first one runs: the requests are sorted by prompt length, longest first, and split
    into batches of `batch_size`. So an answer doesn't depend on where a run was interrupted. Finished rows leave their
    batch if `lm.generate` supports it. Records are returned, and written, in that order. `options` are passed to
    `lm.generate`; with `do_sample=True` each batch has its own seed, derived from `seed`.

    With `out`, each batch is appended to that JSONL file as soon as it is done. If the file exists, the run resumes
    after its last complete batch, and the finished file is byte-identical to that of an uninterrupted run. The first
    line describes the run: model, options, requests, and `about`, which holds anything else that a score depends on.

    Before anything is generated, raises `TrimtabError` for a request that can't run, two requests with the same arm and
    item, or a file that another run wrote.
    """
    check_names(requests)
    if batch_size < 1:
        raise TrimtabError(f"a batch holds at least one request, got {batch_size}")
    if options.get("num_return_sequences", 1) != 1:
        raise TrimtabError(
            "an evaluation takes one answer per request; for more, repeat the request under another item name"
        )
    lengths = _checked_prompt_lengths(lm, requests, max_new_tokens, transfer, options)
    order = sorted(range(len(requests)), key=lambda i: -lengths[i])
    batches = [[requests[i] for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
    settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed, **options}

    def answer_batch(number: int, batch: Sequence[ArmPrompt], digests: Mapping[int, str]) -> list[Record]:
        batch_seed = _batch_seed(seed, number) if options.get("do_sample") else None
        generations = lm.generate(
            [request.prompt for request in batch],
            [request.steering for request in batch],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=batch_seed,
            transfer=transfer,
            **options,
        )
        return [
            Record(
                arm=request.arm,
                item=request.item,
                prompt=request.prompt,
                answer=generation.text,
                tokens=len(generation.token_ids),
                finish=generation.finish_reason,
                steering=digests.get(id(request.steering)),
                edits=generation.applied.edits,
                dose=generation.applied.dose_if_measured,
                seed=batch_seed,
                scores=score(request, generation),
                group=request.group,
            )
            for request, generation in zip(batch, generations, strict=True)
        ]

    return run(lm, requests, batches, answer_batch, settings=settings, out=out, progress=progress, about=about)


def run(
    lm: LM,
    requests: Sequence[ArmPrompt],
    batches: Sequence[Sequence[ArmPrompt]],
    answer_batch: AnswerBatch,
    *,
    settings: Mapping[str, Any],
    out: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    about: Mapping[str, Any] | None = None,
) -> list[Record]:
    """Answer each batch with `make(number, batch, digests)`, and maintain the file `out` as described in `answer`.

    `batches` are the requests in the order in which they run; `digests` maps the `id` of a steering to its digest. The
    result of `answer_batch` may depend only on the batch and `settings`; otherwise a resumed run would end differently.
    """
    steerings = {id(r.steering): r.steering for r in requests if r.steering is not None}
    digests = {number: steering_digest(steering) for number, steering in steerings.items()}
    header = _header(lm, requests, digests, settings, about) if out is not None else b""
    records = _resume(Path(out), header, batches) if out is not None else []
    total = sum(map(len, batches))
    if progress is not None:
        progress(len(records), total)
    done = len(records)
    batch_end = 0
    for number, batch in enumerate(batches):
        batch_end += len(batch)
        if batch_end <= done:
            continue
        new = answer_batch(number, batch, digests)
        if out is not None:
            _append(Path(out), "".join(record.to_json() + "\n" for record in new).encode())
        records += new
        if progress is not None:
            progress(len(records), total)
    return records


def check_names(requests: Sequence[ArmPrompt]) -> None:
    """Raises `TrimtabError` if there are no requests, or two with the same arm and item."""
    if not requests:
        raise TrimtabError("there are no requests; give at least one")
    seen: set[tuple[str, str]] = set()
    for request in requests:
        if (name := (request.arm, request.item)) in seen:
            raise TrimtabError(f"item {request.item!r} occurs twice in arm {request.arm!r}; give each its own name")
        seen.add(name)


def _checked_prompt_lengths(
    lm: LM, requests: Sequence[ArmPrompt], max_new_tokens: int, transfer: bool, options: Mapping[str, Any]
) -> list[int]:
    """The lengths of the prompts in tokens. Raises `TrimtabError` for anything that would fail in a later batch."""
    from trimtab.engines.transformers.generate import check_request

    steerings = {id(request.steering): request.steering for request in requests}
    for steering in steerings.values():
        if steering is not None:
            lm.check(steering, transfer=transfer)
    system, chat = options.get("system"), options.get("chat")
    known: dict[str, int] = {}
    lengths = []
    for request in requests:
        text = json.dumps(request.prompt)
        if text not in known:
            known[text] = len(lm.encode(request.prompt, system=system, chat=chat))
        lengths.append(known[text])
        for edit in request.steering.edits if request.steering else ():
            edit.positions.reach(lengths[-1])
    check_request(lm.layout, lengths, max_new_tokens, {k: v for k, v in options.items() if k not in ("system", "chat")})
    return lengths


def _batch_seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4], "big")


def _header(
    lm: LM,
    requests: Sequence[ArmPrompt],
    digests: Mapping[int, str],
    settings: Mapping[str, Any],
    about: Mapping[str, Any] | None,
) -> bytes:
    """The first line of a file of records: everything that the file's bytes depend on."""
    arms: dict[str, list[Any]] = {}
    for r in requests:
        arms.setdefault(r.arm, []).append([r.item, r.prompt, digests.get(id(r.steering)), r.group])
    run = {
        "about": dict(about or {}),
        "model": {**lm.identity.as_json(), **lm.runs_in},
        **({} if lm.engine == "transformers" else {"engine": lm.engine}),
        "options": dict(settings),
        "arms": {name: {"requests": len(rows), "digest": _digest(rows)} for name, rows in arms.items()},
        "versions": {name: version(name) for name in ("trimtab", "transformers", "torch")},
    }
    order = _digest([[r.arm, r.item] for r in requests])
    try:
        digest = _digest([run, order])
        line = json.dumps(
            {FORMAT_KEY: FORMAT, "digest": digest, **run, "order": order}, ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise TrimtabError(f"options of a run that is written to a file must be JSON values: {error}") from None
    return line.encode() + b"\n"


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _resume(path: Path, header: bytes, batches: Sequence[Sequence[ArmPrompt]]) -> list[Record]:
    """The records of the complete batches in the file, which is truncated to them; a new file gets the header."""
    try:
        data = path.read_bytes() if path.exists() else b""
        if header.startswith(data):  # empty, or killed while the header was written
            path.write_bytes(header)
            return []
    except OSError as error:
        raise TrimtabError(
            f"can't write {path}: {error.strerror}; name a file in an existing, writable folder"
        ) from None
    stored, records = split_records(data, path)
    if not data.startswith(header):
        raise TrimtabError(
            f"{path} holds another run: {_differences(stored, json.loads(header))}. Run that one, delete the file, or"
            " name another"
        )
    expected = [request for batch in batches for request in batch]
    if len(records) > len(expected):
        raise TrimtabError(f"{path} has {len(records)} records for {len(expected)} requests; delete it to start again")
    for number, (record, request) in enumerate(zip(records, expected, strict=False), 2):
        if (record.arm, record.item) != (request.arm, request.item):
            raise TrimtabError(f"{path}:{number} is out of order; the file is damaged, delete it to start again")
    whole = 0
    for batch in batches:
        if whole + len(batch) > len(records):
            break
        whole += len(batch)
    end = sum(len(line) + 1 for line in data.split(b"\n")[: whole + 1])
    if end < len(data):
        os.truncate(path, end)
    return records[:whole]


def _differences(stored: Mapping[str, Any], requested: Mapping[str, Any]) -> str:
    """How two runs differ, in words: the first few settings that differ."""
    a, b = _flat(stored), _flat(requested)
    keys = [key for key in {**a, **b} if key != "digest" and a.get(key, "none") != b.get(key, "none")]
    listed = [f"{key} is {a.get(key, 'none')} there and {b.get(key, 'none')} here" for key in keys[:4]]
    return "; ".join(listed) + (f"; {len(keys) - 4} more" if len(keys) > 4 else "") or "its description differs"


def _flat(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{above}{key}.") if isinstance(item, Mapping) else {f"{above}{key}": item}
    return flat


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
