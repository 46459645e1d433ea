"""The request format of `trimtab serve` for vLLM's own server: `steering` and `emphasize` as fields of the request.

vLLM accepts any field and ignores unknown ones. So fields that this engine can't honor are refused here, and so is
steering where vLLM would drop it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from trimtab.engines.vllm.emphasized import EMPHASIZED, EmphasisRequest, parse_emphasis
from trimtab.engines.vllm.wire import STEERING_KEY
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.text.chat import CONTINUE

PROTOCOLS = {
    "vllm.entrypoints.openai.chat_completion.protocol": "ChatCompletionRequest",
    "vllm.entrypoints.openai.completion.protocol": "CompletionRequest",
    "vllm.entrypoints.openai.responses.protocol": "ResponsesRequest",
}
REFUSED = {"rejection": "more than one row of logits per token, which the vllm engine doesn't compute"}
WITH_REJECTION = (
    "emphasize comes with rejection of implausible tokens, which the vllm engine can't do: ask for rejection: false, or"
    " serve with the transformers engine (trimtab serve)"
)


def patch_server() -> None:
    """Make requests to vLLM's server, if this process has one, accept `steering` as a field."""
    for module, name in PROTOCOLS.items():
        patch_request(getattr(import_module(module), name))


def patch_request(request: Any) -> None:
    """Make a request class add its fields `steering` and `emphasize` to the sampling parameters.

    Patching a class twice has no effect.
    """
    if "_trimtab" in request.__dict__:
        return
    request._trimtab = True
    sampling = request.to_sampling_params

    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        steering, emphasis_request = _requested_steering(self), _emphasis_request(self)
        params = sampling(self, *args, **kwargs)
        if steering:
            params.extra_args = {**(params.extra_args or {}), STEERING_KEY: steering}
        if emphasis_request:
            params.extra_args = {**(params.extra_args or {}), EMPHASIZED: emphasis_request}
        return params

    request.to_sampling_params = to_sampling_params
    if hasattr(request, "to_beam_search_params"):
        beams = request.to_beam_search_params

        def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
            if _requested_steering(self) or _emphasis_request(self):
                raise UnsupportedError("vLLM's beam search drops a request's extra arguments; leave out steering")
            return beams(self, *args, **kwargs)

        request.to_beam_search_params = to_beam_search_params


def _requested_steering(request: Any) -> Any:
    """The steering that a request specifies, in either place. Raises `TrimtabError` for unsupported fields."""
    fields = request.model_extra or {}
    for name, why in REFUSED.items():
        if fields.get(name):
            raise UnsupportedError(f"{name} needs {why}; the transformers engine can (trimtab serve)")
    return _in_either(request, STEERING_KEY)


def _emphasis_request(request: Any) -> EmphasisRequest | None:
    """What a request emphasizes, in either place. Raises `TrimtabError` if it can't be parsed or isn't supported."""
    wanted = _in_either(request, EMPHASIZED)
    if not wanted:
        return None
    if (request.model_extra or {}).get("rejection") is not False:
        raise UnsupportedError(WITH_REJECTION)
    keywords = {CONTINUE: bool(getattr(request, "continue_final_message", False))}
    keywords |= getattr(request, "chat_template_kwargs", None) or {}
    return parse_emphasis(wanted, getattr(request, "messages", None), keywords)


def _in_either(request: Any, name: str) -> Any:
    """The value of a field of the request, or of the same key in its `vllm_xargs`."""
    fields, in_xargs = request.model_extra or {}, (request.vllm_xargs or {}).get(name)
    if in_xargs and fields.get(name):
        raise TrimtabError(f"{name} is in the request and in its vllm_xargs; give it once")
    return fields.get(name) or in_xargs
