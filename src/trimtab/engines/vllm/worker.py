"""The plugin in vLLM's workers: each has a steering manager, which is filled before each step, and answers the front
end's calls.

The classes of the worker and its model runner aren't changed on disk. The methods of the runner instance that a worker
has created are wrapped, for V1 (`GPUModelRunner`, `CPUModelRunner`) as well as V2.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial, wraps
from typing import Any

import torch

from trimtab import __version__
from trimtab.engines.vllm import operator
from trimtab.engines.vllm.attach import Place, attach, find_blocks, find_places
from trimtab.engines.vllm.bank import Bank
from trimtab.engines.vllm.capacity import Capacity
from trimtab.engines.vllm.counting import RECEIPT, Receipt
from trimtab.engines.vllm.maps import Maps
from trimtab.engines.vllm.settings import settings_of
from trimtab.engines.vllm.shards import Shard
from trimtab.engines.vllm.steering_manager import Chunks, SteeringManager
from trimtab.engines.vllm.versions import SUPPORTED, vllm_version
from trimtab.engines.vllm.wire import wire_of
from trimtab.errors import TrimtabError
from trimtab.files.steering_file import steering_from_bytes
from trimtab.steering import Site

MANAGER_ATTRIBUTE = "_trimtab_rig"

log: logging.Logger = logging.getLogger("vllm.trimtab")


def patch_worker(wrapper: type) -> None:
    """Make vLLM's `WorkerWrapperBase` give each worker a manager once its model is loaded, and answer these calls."""
    inherited = wrapper.__dict__.get("load_model")

    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = inherited(self, *args, **kwargs) if inherited else self.worker.load_model(*args, **kwargs)
        _set_up_steering(self.worker)
        return done

    for function in (load_model, trimtab_hello, trimtab_put, trimtab_drop, trimtab_take, trimtab_rows):
        setattr(wrapper, function.__name__, function)


def _set_up_steering(worker: Any) -> None:
    """Create a manager for this worker's model, unless it can't be steered; `trimtab_hello` then reports why."""
    runner, config = worker.model_runner, worker.vllm_config
    reasons = config_problems(config) + runner_problems(runner)
    worker._trimtab_reasons = reasons
    if reasons:
        return
    text = config.model_config.hf_text_config
    settings = settings_of(config)
    try:
        blocks = find_blocks(runner.get_model(), text.num_hidden_layers)
        heads = config.model_config.get_total_num_kv_heads() if "keys" in settings.sites else 0
        places = find_places(dict(sorted(blocks.items())), text.hidden_size, settings.sites, heads)
    except TrimtabError as error:
        reasons.append(str(error))
        return
    first = next(iter(blocks.values()))
    device = next(first.parameters()).device
    manager = _make_manager(config, places, device)
    manager.tokenizer = partial(_tokenizer, config.model_config)
    operator.MANAGERS.append(manager)
    setattr(runner, MANAGER_ATTRIBUTE, manager)
    plain = [
        site for site in places if manager.static and not manager.capacity.reads and not manager.capacity.at(site.layer)
    ]
    attach(places, len(operator.MANAGERS) - 1, adds_only=plain)
    manager.doses.reported = _reports_to_scheduler(worker)
    _wrap_runner(runner, manager, manager.doses.reported)


def _make_manager(config: Any, places: Mapping[Site, Place], device: torch.device) -> SteeringManager:
    """A manager with banks for these sites, and with the captured graphs' capacity that the settings ask for."""
    settings, dtype = settings_of(config), config.model_config.dtype
    width = config.model_config.hf_text_config.hidden_size
    graphs = config.compilation_config.cudagraph_mode
    replayed = device.type != "cpu" and graphs is not None and graphs.name != "NONE"
    captured = config.compilation_config.max_cudagraph_capture_size or 0 if replayed else settings.static
    tokens = max(config.scheduler_config.max_num_batched_tokens, captured)
    layers = [site.layer for site in places if site.kind == "residual"]
    bank = Bank(layers, width, settings.slots, tokens, dtype, device)
    sites = {site: place.width for site, place in places.items()}
    split = {site.kind: place.whole for site, place in places.items() if place.whole > place.width}
    own = {site.kind: place.width for site, place in places.items() if site.kind in split}
    shard = Shard(split, config.parallel_config.tensor_parallel_size, _tensor_parallel_rank() if split else 0, own)
    if not captured:
        return SteeringManager(sites, dtype, device, bank, shard=shard)
    capacity = Capacity.from_plain(settings.capacity)
    mapped = {site: width for site, width in sites.items() if capacity.at(site.layer)}
    maps = Maps(capacity, mapped, settings.maps, tokens, dtype, device) if mapped else None
    manager = SteeringManager(sites, dtype, device, bank, True, capacity, maps, captured, shard)
    if device.type == "cuda" and settings.fused:
        _fuse(manager)
    return manager


def _fuse(manager: SteeringManager) -> None:
    """Replace the operators by one kernel, if it gives the same results on this device; otherwise log why not."""
    try:
        from trimtab.engines.vllm.fused import Fused, check_fused

        check_fused(manager)
    except Exception as error:  # Triton's compiler can raise anything
        log.warning("trimtab runs its operators one by one: its kernel can't be used here (%s)", error)
        return
    assert manager.counts is not None
    manager.fused = Fused(manager.bank, manager.maps, manager.counts, manager.kept)


def _tensor_parallel_rank() -> int:
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def _reports_to_scheduler(worker: Any) -> bool:
    """Whether the scheduler receives this worker's output: that is the first worker of the last pipeline stage."""
    parallel = worker.vllm_config.parallel_config
    side = parallel.tensor_parallel_size * getattr(parallel, "prefill_context_parallel_size", 1)
    return bool(worker.rank == parallel.world_size - side)


def config_problems(config: Any) -> list[str]:
    """Why an engine with this configuration can't be steered; empty if it can."""
    compilation, parallel = config.compilation_config, config.parallel_config
    reasons = {
        "speculative decoding is on, and its drafts aren't steered": config.speculative_config is not None,
        "a KV connector is set, which stores blocks under keys that ignore steering": (
            config.kv_transfer_config is not None
        ),
        "sequence parallelism is on, which spreads a block's output over workers": bool(
            getattr(compilation.pass_config, "enable_sp", False)  # a compiler pass, up to vLLM 0.31
            or getattr(parallel, "use_sequence_parallel_moe", False)
        ),
        "micro-batches overlap (DBO), so a pass's tokens aren't processed together": bool(
            getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False)
        ),
        "a prompt's tokens are spread over workers (prefill context parallelism)": (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
        "the model is an embedding model, which doesn't generate": config.model_config.runner_type != "generate",
        "the model is an encoder-decoder": config.model_config.is_encoder_decoder,
    }
    return [reason for reason, holds in reasons.items() if holds]


def runner_problems(runner: Any) -> list[str]:
    """Why a model runner can't be wrapped; empty if it is one of the two that the plugin knows."""
    first, second = ("_model_forward",), ("prepare_inputs",)
    common = ("execute_model", "sample_tokens", "get_model")
    if any(all(hasattr(runner, name) for name in (*common, *kind)) for kind in (first, second)):
        return []
    kind = type(runner)
    return [
        f"its model runner {kind.__module__}.{kind.__name__} isn't one of the two vLLM runners that trimtab supports;"
        f" install one of vLLM {' or '.join(SUPPORTED)}"
    ]


def _wrap_runner(runner: Any, manager: SteeringManager, reports: bool = True) -> None:
    """Call the manager before and after each forward pass, and send its receipt with the sampled tokens.

    A worker that isn't `reports` has no one to send it to. It raises `RuntimeError` instead, which ends the engine.
    """
    firsts: dict[str, int] = {}
    planned: list[Any] = []
    receipts: deque[Receipt] = deque()  # of the step whose tokens haven't been sampled yet
    unheard: deque[Receipt] = deque()

    def begin(requests: Sequence[str]) -> None:
        counts = planned[-1].num_scheduled_tokens
        manager.begin(Chunks(list(requests), [firsts[r] for r in requests], [counts[r] for r in requests]))

    def execute(original: Callable, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dummy_run"):
            return original(scheduled, *args, **kwargs)
        while unheard and unheard[0].ready():
            _raise_faults(unheard.popleft())
        _follow(manager, firsts, scheduled)
        planned[:] = [scheduled]
        manager.expect(scheduled.num_scheduled_tokens)
        done = original(scheduled, *args, **kwargs)
        receipts.clear()
        if scheduled.total_num_scheduled_tokens:
            receipt = manager.end()
            if receipt is not None and reports:
                receipts.append(receipt)
            elif receipt is not None and receipt.ready():
                _raise_faults(receipt)
            elif receipt is not None:
                unheard.append(receipt)
        return done

    def sample(original: Callable, *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if not hasattr(output, "get_output") and getattr(output, "sampled_token_ids", None):
            manager.add_sampled_tokens(output.req_ids, output.sampled_token_ids)
        return send_with(receipts.popleft(), output) if receipts else output

    def forward(original: Callable, *args: Any, **kwargs: Any) -> Any:
        begin(runner.input_batch.req_ids)
        return original(*args, **kwargs)

    def prepare(original: Callable, *args: Any, **kwargs: Any) -> Any:
        batch = original(*args, **kwargs)
        begin(batch.req_ids)
        return batch

    _wrap(runner, "execute_model", execute)
    _wrap(runner, "sample_tokens", sample)
    if hasattr(runner, "_model_forward"):  # V1
        _wrap(runner, "_model_forward", forward)
    else:  # V2: its inputs are prepared for real steps only
        _wrap(runner, "prepare_inputs", prepare)


def send_with(receipt: Receipt, output: Any) -> Any:
    """The sampled tokens with their receipt, which is settled once they are on the host."""
    if hasattr(output, "get_output"):  # they are still being copied
        arrive = output.get_output
        output.get_output = lambda: send_with(receipt, arrive())
        return output
    output = copy(output)  # vLLM shares one empty output among steps
    setattr(output, RECEIPT, receipt.plain())
    return output


def _raise_faults(receipt: Receipt) -> None:
    for reason in receipt.resolve_faults().values():
        raise RuntimeError(reason)


def _wrap(thing: Any, name: str, around: Callable) -> None:
    original = getattr(thing, name)

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(thing, name, wrapped)


def _follow(manager: SteeringManager, firsts: dict[str, int], scheduled: Any) -> None:
    """Update the manager with finished, new and continued requests, and the position of each one's next tokens."""
    for request in scheduled.finished_req_ids:
        firsts.pop(request, None)
    manager.finish(scheduled.finished_req_ids)
    for new in scheduled.scheduled_new_reqs:
        firsts[new.req_id] = new.num_computed_tokens
        wire = wire_of(new.sampling_params)
        if wire is not None:
            manager.start(new.req_id, wire, getattr(new, "prompt_token_ids", None))
    cached = scheduled.scheduled_cached_reqs
    manager.resume(cached.resumed_req_ids)
    firsts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))


# ---- calls that every worker answers, through `collective_rpc` -------------------------------------------------


def _manager_of(wrapper: Any) -> SteeringManager:
    manager = getattr(wrapper.worker.model_runner, MANAGER_ATTRIBUTE, None)
    if manager is None:
        raise RuntimeError(f"this worker can't steer: {'; '.join(wrapper.worker._trimtab_reasons)}")
    return manager


def trimtab_hello(self: Any) -> dict[str, Any]:
    """Report that the plugin is loaded, and what it supports; `"reasons"` says why the worker can't steer."""
    manager: SteeringManager | None = getattr(self.worker.model_runner, MANAGER_ATTRIBUTE, None)
    text = self.worker.model_config.hf_text_config
    handshake = {
        "trimtab": __version__,
        "vllm": vllm_version(),
        "rank": self.worker.rank,
        "reasons": list(self.worker._trimtab_reasons),
        "layers": text.num_hidden_layers,
        "width": text.hidden_size,
    }
    if manager is not None:
        handshake |= {
            "here": [site.layer for site in manager.sites if site.kind == "residual"],
            "inside": {site.kind: manager.shard.whole(site, width) for site, width in manager.sites.items()},
            "split": sorted(manager.shard.split),
            "unfired": [str(site) for site in manager.unfired] if _runs_before_use(self.worker) else [],
            "static": manager.static,
            "fused": manager.fused is not None,
            "untold": _tokens_unknown(self.worker),
            "unmeasured": _unmeasured(self.worker, manager),
            "dtype": str(manager.dtype).removeprefix("torch."),
            **manager.describe(),
        }
    return handshake


def _tokens_unknown(worker: Any) -> str:
    """Why a worker doesn't know each token on the host before the next pass, and what helps; empty if it does."""
    config = worker.vllm_config
    if getattr(config.scheduler_config, "async_scheduling", False):
        return "async scheduling leaves it on the device; start the engine with async_scheduling=False"
    if config.parallel_config.pipeline_parallel_size > 1:
        return "only the last stage of a pipeline has it; start the engine with pipeline_parallel_size=1"
    if not hasattr(worker.model_runner, "_model_forward"):
        return "vLLM's second model runner leaves it on the device; start with VLLM_USE_V2_MODEL_RUNNER=0"
    return ""


def _unmeasured(worker: Any, manager: SteeringManager) -> str:
    """Why this engine can't measure doses, and what helps; empty if it can."""
    if worker.vllm_config.parallel_config.pipeline_parallel_size > 1:
        return "each stage of a pipeline knows only those of its own blocks; start it with pipeline_parallel_size=1"
    if manager.static and not manager.capacity.reads:
        return "captured graphs keep no activations; start it with TRIMTAB_KERNEL=all, or with enforce_eager"
    return ""


def _tokenizer(config: Any) -> Any:
    """The model's tokenizer, which vLLM caches."""
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(config)


def _runs_before_use(worker: Any) -> bool:
    """Whether the model runs before the first call: on a GPU to measure memory, or if compiled, for warmup."""
    return worker.device_config.device_type != "cpu" or worker.compilation_config.mode != 0


def trimtab_put(self: Any, digest: str, content: bytes) -> None:
    """Store a steering's content."""
    _manager_of(self).steerings[digest] = steering_from_bytes(content, digest[:12])


def trimtab_drop(self: Any, digests: list[str]) -> None:
    """Remove steerings that no request needs any more."""
    for digest in digests:
        _manager_of(self).steerings.pop(digest, None)


def trimtab_take(self: Any, readings: list[str]) -> list[dict[str, tuple[list[int], bytes]]]:
    """The activations of readings: shape and bytes, in float32, for each reading and each site of this worker."""
    manager = _manager_of(self)
    taken = [manager.pop_reading(reading) for reading in readings]
    return [{str(site): (list(x.shape), _bytes(x)) for site, x in activations.items()} for activations in taken]


def trimtab_rows(self: Any, rows: list[int]) -> dict[int, bytes]:
    """Those of these rows of the embeddings that this worker has, in bfloat16."""
    table = _embeddings(self.worker.get_model())
    if table is None:
        return {}
    low, high = table.shard_indices.org_vocab_start_index, table.shard_indices.org_vocab_end_index
    return {row: _bytes(table.weight[row - low], torch.bfloat16) for row in rows if low <= row < high}


def _embeddings(model: Any) -> Any:
    """The table of input embeddings, or `None` if this stage has none. Each tensor-parallel worker has some rows."""
    inner = model.get_language_model() if hasattr(model, "get_language_model") else model
    return next((m for m in inner.modules() if type(m).__name__ == "VocabParallelEmbedding"), None)


def _bytes(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> bytes:
    return x.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy().tobytes()
