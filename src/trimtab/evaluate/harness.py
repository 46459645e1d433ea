"""EleutherAI's evaluation harness, steered: importing this module registers the model class `trimtab` with it.

Needs `trimtab[lm-eval]`.

    trimtab eval lm-eval --model_args pretrained=gpt2,steer=s.safetensors:2 --tasks hellaswag --batch_size 16

or, in your own program, `import trimtab.evaluate.harness` and then `lm_eval.simple_evaluate(model="trimtab", …)`. The
harness (0.4.x) finds model classes only through its registry and doesn't load plugins, so its own `lm_eval` program
doesn't know this one.

The class is the harness's `hf` with a steering: the same tokens, contexts and windows, so that results differ only by
the steering. For position rules and gates, a request's context is the prompt and its continuation is the generated
text. Tested with lm-eval 0.4.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from trimtab.engines.transformers import default_model
from trimtab.engines.transformers.read import padded
from trimtab.engines.transformers.scores import is_score_edit
from trimtab.engines.transformers.session import Session
from trimtab.engines.transformers.weights import best_device
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.files.pick import parse_pick
from trimtab.files.steering_file import steering_digest
from trimtab.lm import LM

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
except ImportError as error:
    raise TrimtabError(f"the evaluation harness isn't installed ({error}): pip install 'trimtab[lm-eval]'") from None

Tokens = tuple[Any, list[int], list[int]]  # a request of the harness: (its own key, context, continuation)


@register_model("trimtab")
class SteeredHFLM(HFLM):
    """The harness's `hf` model class, steered.

    `steer` is `FILE[@LAYERS][:STRENGTH]`; without it, this is `hf`. `transfer` allows a steering learned on another
    model of the same width, `layers_path` names the list of blocks if it can't be found; all other arguments are those
    of `hf`. Without `pretrained` it loads trimtab's default model.

    The harness's `use_cache` is keyed by requests only: don't share its file between steerings.

    Raises `TrimtabError` if the steering can't be read or doesn't fit the model, and `UnsupportedError` if it steers
    attention scores.
    """

    def __init__(
        self,
        pretrained: Any = None,
        steer: str | None = None,
        transfer: bool = False,
        layers_path: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        steering = None if steer is None else parse_pick(str(steer), "steer").load()
        if steering is not None and str(batch_size).startswith("auto"):
            raise TrimtabError("a steered run needs a fixed batch size; give a number, such as --batch_size 16")
        super().__init__(
            pretrained=str(default_model.default_folder()) if pretrained is None else pretrained,
            device=device or best_device(),
            batch_size=batch_size,
            **options,
        )
        self.lm: LM = LM(self.model, self.tokenizer, layers=layers_path)
        self.steering = steering
        self.steer = steer
        self.transfer: bool = bool(transfer)
        if steering is not None:
            self.lm.check(steering, transfer=self.transfer)
            if any(is_score_edit(edit) for edit in steering.edits):
                raise UnsupportedError(f"{steer} steers attention scores, which isn't supported in the harness")

    def _loglikelihood_tokens(
        self, requests: list[Tokens], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Each continuation's log-probability, and whether greedy decoding would generate it."""
        if self.steering is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        # rows are shared by requests that differ only in their last token
        rows: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise TrimtabError(
                    f"can't score a continuation of {len(continuation)} tokens after a context of {len(context)}: both"
                    f" need at least one token, and a continuation has at most {self.max_length}"
                )
            window = (*context, *continuation)[-(self.max_length + 1) :]
            rows.setdefault((window[:-1], len(window) - len(continuation)), []).append(i)
        order = sorted(rows, key=lambda row: (-len(row[0]), row))
        size = override_bs or int(self.batch_size)
        scores: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="steered loglikelihoods") as bar:
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                for row, logits in zip(batch, self._steered_logits(batch), strict=True):
                    text, prompt = row
                    logprobs = log_softmax(logits[prompt - 1 : len(text)], dim=-1, dtype=self.softmax_dtype)
                    for i in rows[row]:
                        key, _, continuation = requests[i]
                        scores[i] = _scored(logprobs, continuation)
                        if key is not None:
                            self.cache_hook.add_partial("loglikelihood", key, scores[i])
                        bar.update()
        return [scores[i] for i in range(len(requests))]

    @torch.no_grad()
    def _steered_logits(self, rows: Sequence[tuple[tuple[int, ...], int]]) -> Tensor:
        """The logits `[rows, tokens, vocabulary]` of texts with their prompts' lengths; right-padded, as in `hf`."""
        ids, mask = padded([text for text, _ in rows], left=False, device=self.device)
        lengths = [prompt for _, prompt in rows]
        with self.lm._exclusive():
            prompts = [list(text[:prompt]) for text, prompt in rows]
            edits = self.lm._resolve_edits([self.steering] * len(rows), prompts)
            session = Session(self.model, self.lm.layout, lambda _count, _first: edits, lengths, self.lm.tokenizer)
            sites = sorted({edit.site for row_edits in edits for edit in row_edits})
            with session.hooked(sites), self._precision():
                logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            session.check_reached(ids.shape[1])
            return logits

    def _precision(self) -> Any:
        mixed = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=mixed, enabled=mixed is not None)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        if self.steering is None:
            return super()._model_generate(context, max_length, stop, **options)
        with self.lm.steered(self.steering, transfer=self.transfer):
            return super()._model_generate(context, max_length, stop, **options)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness records about the model, and the steering."""
        steering = None if self.steering is None else steering_digest(self.steering)
        return {**super().get_model_info(), "steer": self.steer, "steering": steering}


def _scored(logprobs: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    tokens = torch.tensor(list(continuation), device=logprobs.device)
    greedy = bool((logprobs.argmax(-1) == tokens).all())
    return float(logprobs.gather(-1, tokens[:, None]).sum()), greedy
