"""The entry point for vLLM plugins: it patches vLLM's classes, once in every process.

If a plugin fails, vLLM logs that and continues without it. So the front end doesn't trust that this has worked: before
the first steered request, it asks every worker (see `frontend.connect`).
"""

from __future__ import annotations

import logging

from trimtab.engines.vllm.versions import check_version

log: logging.Logger = logging.getLogger("vllm.trimtab")

_registered = False


def register() -> None:
    """Patch vLLM's classes. Raises `UnsupportedError` for a version of vLLM that this engine doesn't support."""
    global _registered
    if _registered:
        return
    check_version()
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.exceptions import GenerationError, VLLMValidationError
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.request import RequestStatus
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from trimtab.engines.vllm.capacity import Capacity
    from trimtab.engines.vllm.core import Failure, patch_core, patch_keys, patch_scheduler
    from trimtab.engines.vllm.frontend import NAMES
    from trimtab.engines.vllm.patched import patch_engines, patch_inputs, patch_outputs
    from trimtab.engines.vllm.requests import patch_server
    from trimtab.engines.vllm.settings import patch_arguments
    from trimtab.engines.vllm.worker import patch_worker

    def load_requirements(arguments: EngineArgs) -> tuple[Capacity, frozenset[str]]:
        NAMES.load_environment()
        if isinstance(arguments, AsyncEngineArgs):  # a server, or another user of the asynchronous engine
            patch_server()
        return NAMES.capacity(), NAMES.sites()

    patch_arguments(EngineArgs, load_requirements)
    patch_engines(LLMEngine, AsyncLLM, NAMES, VLLMValidationError, GenerationError)
    patch_inputs(InputProcessor)
    patch_outputs(OutputProcessor)
    patch_keys(kv_cache_utils)
    patch_scheduler(
        Scheduler, Failure(RequestStatus.FINISHED_ERROR, FinishReason.ERROR, EngineCoreOutput, EngineCoreOutputs)
    )
    patch_core(EngineCore)
    patch_worker(WorkerWrapperBase)
    _registered = True
    log.info("trimtab's plugin is loaded")
