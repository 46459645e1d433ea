"""What the released codes of PASTA, SADI, CAST and DIRECTER compute, restated with hooks on a bare transformers model.

`python tests/parity/released.py > tests/parity/recorded.json` records it on SmolLM2-135M-Instruct in float32 with eager
attention. Nothing of trimtab's takes part, but for where the default model lies. The arithmetic, line for line, is of

- QingruZhang/PASTA at 3089b0c: `find_token_range` and `edit_multisection_attention`;
- weixuan-wang123/SADI at d7fedf0: `select_heads_acts_actups` (signed differences at the last token, the largest of all
  layers) and `steer_*` with `trace_*_patch` (a clean pass's values, the chosen ones times `strength`, put in the place
  of every layer's at the question's last token), for 30 layers instead of 32;
- IBM/activation-steering at 52be602: `LeashLayer` (the first pass of the prompt checks the condition at the block's
  input, and behaviour vectors are added at blocks' inputs), in float32 instead of float16;
- mjk0618/directer at ba4d50b: `get_indices_to_scale` and `DirecterGenerator`, in float32 instead of bfloat16.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

PROMPT = "Write about the sea.\nUse only lowercase letters."
PHRASE = "Use only lowercase letters."
HEADS = {5: [0, 3], 12: [1, 4, 8], 20: [2]}
PAIRS = [
    ("How do I bake bread?", " Mix flour and water.", " I can't help with that."),
    ("What is rain?", " Water from clouds.", " I won't answer that."),
    ("Name three colours.", " Red, green and blue.", " Sorry, I am not able to."),
    ("How far is the moon?", " About 384000 km.", " That I must refuse."),
]
QUESTION = "Why is the sky blue?"
STRENGTH = 10.0
COUNTS = {"act_fn": 50, "hidden": 10, "heads": 8}
CONDITION, THRESHOLD = 7, 0.0298
BEHAVIOUR, ADDED = (10, 12), 3.0
PROMPTS = ["How are you?", "Tell me how the tides work, in a few words.", "Is tea nice?"]
NEW = 8


def unit(seed: int, width: int = 576) -> Tensor:
    """Some direction `[width]`."""
    made = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return made / made.norm()


@contextmanager
def hooks(handles: Sequence[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def greedy(model: Any, ids: Sequence[int]) -> dict[str, Any]:
    """The next tokens with a cache, and their log-probabilities."""
    newest, cache, tokens, logprobs = torch.tensor([list(ids)]), None, [], []
    for _ in range(NEW):
        out = model(newest, past_key_values=cache, use_cache=True)
        law = out.logits[0, -1].log_softmax(-1)
        cache, newest = out.past_key_values, law.argmax().view(1, 1)
        tokens.append(int(newest))
        logprobs.append(round(float(law[tokens[-1]]), 6))
    return {"tokens": tokens, "logprobs": logprobs}


def token_range(offsets: Sequence[tuple[int, int]], text: str, phrase: str) -> tuple[int, int]:
    """PASTA's `find_token_range`."""
    start, stop = text.index(phrase), text.index(phrase) + len(phrase)
    first = next(i for i, (a, b) in enumerate(offsets) if a <= start <= b)
    last = next(i for i, (a, b) in enumerate(offsets) if a <= stop <= b)
    return first, last + 1


def pasta(model: Any, ids: Sequence[int], spans: Sequence[tuple[int, int]], alpha: float, position: str) -> Any:
    """Greedy decoding with the mask that `edit_multisection_attention` makes of the model's."""

    def editing(heads: list[int]) -> Callable[..., Any]:
        def edit(_module: Any, args: Any, kwargs: Any) -> Any:
            mask = kwargs["attention_mask"]
            mask = mask.expand(-1, model.config.num_attention_heads, -1, -1).clone()
            for start, stop in spans:
                if position == "include":
                    mask[:, heads, :, start:stop] += math.log(alpha)
                else:
                    mask[:, heads, :, :start] += math.log(alpha)
                    mask[:, heads, :, stop : len(ids)] += math.log(alpha)
            if position == "include":
                mask[:, heads, :, : len(ids)] -= math.log(alpha)
            return args, {**kwargs, "attention_mask": mask}

        return edit

    blocks = model.model.layers
    handles = [blocks[n].self_attn.register_forward_pre_hook(editing(h), with_kwargs=True) for n, h in HEADS.items()]
    with hooks(handles):
        return greedy(model, ids)


PLACES = {"act_fn": "mlp.act_fn", "hidden": "mlp", "heads": "self_attn.o_proj"}


def at_place(model: Any, site: str, layer: int, change: Callable[[Tensor], Tensor]) -> Any:
    module = model.model.layers[layer].get_submodule(PLACES[site])
    if site == "heads":
        return module.register_forward_pre_hook(lambda _m, args: (change(args[0]),))
    return module.register_forward_hook(lambda _m, _args, output: change(output))


@torch.no_grad()
def last_tokens(model: Any, site: str, ids: Sequence[int]) -> Tensor:
    """`[layers, size]` of the last token, unsteered."""
    last_states: list[Tensor] = []
    layers = range(model.config.num_hidden_layers)
    with hooks([at_place(model, site, n, lambda x: last_states.append(x[0, -1].clone()) or x) for n in layers]):
        model(torch.tensor([list(ids)]), use_cache=False)
    return torch.stack(last_states)


def sadi(model: Any, encode: Callable[..., list[int]], site: str) -> dict[str, Any]:
    """Which are chosen, and the log-probabilities after the question with a clean pass's values put everywhere."""
    heads = model.config.num_attention_heads
    differences = []
    for question, right, wrong in PAIRS:
        sides = [last_tokens(model, site, encode(question, answer)).numpy() for answer in (right, wrong)]
        if site == "heads":
            sides = [side.reshape(len(side), heads, -1).mean(-1) for side in sides]
        differences.append(sides[0] - sides[1])
    score = np.mean(differences, axis=0)
    best = np.argsort(-score.flatten(), kind="stable")[: COUNTS[site]]
    chosen = [[int(i) for i in np.unravel_index(flat, score.shape)] for flat in best]
    ids = encode(QUESTION)
    values = last_tokens(model, site, ids)
    view = values.view(len(values), heads, -1) if site == "heads" else values[..., None]
    for layer, i in chosen:
        view[layer, i] *= STRENGTH

    def putting(layer: int) -> Callable[[Tensor], Tensor]:
        def put(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, -1] = values[layer]
            return x

        return put

    with hooks([at_place(model, site, n, putting(n)) for n in range(len(values))]), torch.no_grad():
        law = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
    top = law.topk(5)
    return {"chosen": sorted(chosen), "top": top.indices.tolist(), "logprobs": [round(float(p), 6) for p in top.values]}


def cast(model: Any, encode: Callable[..., list[int]], prompt: str) -> dict[str, Any]:
    """The similarity at the condition's block, and greedy decoding with the behaviour if it exceeds the threshold."""
    c = unit(1)
    met: list[float] = []

    def check(_module: Any, args: Any, kwargs: Any) -> None:
        if not met:
            x = (args[0] if args else kwargs["hidden_states"])[0].mean(0)
            projected = torch.tanh(torch.outer(c, c) / torch.dot(c, c) @ x)
            met.append(float(torch.dot(x, projected) / (x.norm() * projected.norm())))

    def add(layer: int) -> Callable[..., Any]:
        def adding(_module: Any, args: Any, kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            new = x + ADDED * unit(layer) if met[0] > THRESHOLD else x
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return adding

    blocks = model.model.layers
    handles = [blocks[CONDITION].register_forward_pre_hook(check, with_kwargs=True)]
    handles += [blocks[n].register_forward_pre_hook(add(n), with_kwargs=True) for n in BEHAVIOUR]
    with hooks(handles):
        answer = greedy(model, encode(prompt))
    return {"similarity": round(met[0], 8), **answer}


def scaled(cache: Any, span: tuple[int, int], layers: Sequence[int]) -> Any:
    """A copy of the cache with the span's keys at these layers times 100."""
    copied = copy.deepcopy(cache)
    for n in layers:
        copied.layers[n].keys[:, :, span[0] : span[1]] *= 100.0
    return copied


@torch.no_grad()
def directer(model: Any, ids: Sequence[int], span: tuple[int, int]) -> dict[str, Any]:
    """Greedy tokens, the ranking of the layers, and at each token which rung was taken (`None`: the raw token)."""
    states: list[tuple[Tensor, Tensor]] = []

    def note(_module: Any, _args: Any, kwargs: Any, result: Any) -> None:
        states.append((kwargs["hidden_states"].clone(), result[0].clone()))

    def run(token: Tensor, cache: Any) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        states.clear()
        return model(token, past_key_values=cache, use_cache=True).logits[:, -1], list(states)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)

    every = list(range(model.config.num_hidden_layers))
    order: list[int] = []
    tokens: list[int] = []
    rungs: list[int | None] = []
    with hooks([block.self_attn.register_forward_hook(note, with_kwargs=True) for block in model.model.layers]):
        inputs = torch.tensor([list(ids)])
        cache = model(inputs[:, :-1], use_cache=True).past_key_values
        token = inputs[:, -1:]
        for _ in range(NEW):
            before = copy.deepcopy(cache)
            raw, clean = run(token, cache)
            law = raw.softmax(-1)[0]
            best, second = law.topk(2).values.tolist()
            shut = bool(order) and second < 0.5 * best - 1e-9
            if not order:
                table = []
                for n in every:
                    _, moved = run(token, scaled(before, span, [n]))
                    pairs = zip(clean, moved, strict=True)
                    table.append(
                        [float((distance(a, d) + distance(b, c)).mean().clamp(min=0)) for (a, b), (c, d) in pairs]
                    )
                order = torch.tensor(table).mean(0).argsort(descending=True).tolist()
            chosen, trial, rung = every, 0, None
            logits = raw
            while not shut:
                trial += 1
                if len(chosen) == 1 or trial > 10:
                    logits = raw
                    break
                logits, _ = run(token, scaled(before, span, chosen))
                if float(law[logits.argmax()]) - 0.5 * float(law[raw.argmax()]) > 0:
                    rung = trial - 1
                    break
                chosen = order[: max(1, len(order) // 2**trial)]
            token = logits.argmax(-1, keepdim=True)
            tokens.append(int(token))
            rungs.append(rung)
    return {"tokens": tokens, "order": order, "rungs": rungs}


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trimtab.engines.transformers.default_model import default_folder

    folder = default_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    def chat(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def encode(prompt: str, answer: str = "") -> list[int]:
        return tokenizer(chat(prompt) + answer, add_special_tokens=False)["input_ids"]

    whole = tokenizer(chat(PROMPT), add_special_tokens=False, return_offsets_mapping=True)
    span = token_range(whole["offset_mapping"], chat(PROMPT), PHRASE)
    recorded: dict[str, Any] = {"pasta": {"span": span}}
    for name, spans, alpha, position in (
        ("exclude", [span], 0.01, "exclude"),
        ("include", [span], 100.0, "include"),
        ("exclude two", [span, (4, 7)], 0.1, "exclude"),
    ):
        recorded["pasta"][name] = pasta(model, whole["input_ids"], spans, alpha, position)
    recorded["sadi"] = {site: sadi(model, encode, site) for site in PLACES}
    recorded["cast"] = [cast(model, encode, prompt) for prompt in PROMPTS]
    instruction = tokenizer(PHRASE, add_special_tokens=False)["input_ids"]
    ids = whole["input_ids"]
    start = next(i for i in range(len(ids)) if ids[i : i + len(instruction)] == instruction)
    span = (start, start + len(instruction) + 1)  # its range ends behind the token behind the instruction
    recorded["directer"] = {"span": span, **directer(model, ids, span)}
    print(json.dumps(recorded))


if __name__ == "__main__":
    main()
