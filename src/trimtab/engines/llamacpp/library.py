"""llama.cpp's C functions, from the package `xllamacpp`, whose only extension file exports them.

Of the bindings of llama.cpp, `llama-cpp-python` takes half an hour to compile, and the wheels of `llama-cpp-py-sync`
need a newer C library than many systems have. The wheels of `xllamacpp` run anywhere, but its own classes can't set a
control vector. Structures that are passed by value are mirrored here as in the version that `trimtab[llamacpp]` pins;
`open_library` verifies their layout.
"""

from __future__ import annotations

import ctypes as c
import importlib.util
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from trimtab.errors import TrimtabError

TESTED = "xllamacpp 2026.10.11549"
F32, F16 = 0, 1  # ggml's type numbers
ERROR = 4  # the log level

EvalCallback = c.CFUNCTYPE(c.c_bool, c.c_void_p, c.c_bool, c.c_void_p)
LogCallback = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
Room = c.c_char * 512
"""Padding at the end of a structure.

If a newer version has more fields, they overwrite nothing else before the mismatch is noticed.
"""


class ModelParams(c.Structure):
    """`llama_model_params`."""

    _fields_: ClassVar = [
        ("devices", c.c_void_p),
        ("tensor_buft_overrides", c.c_void_p),
        ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int32),
        ("load_mode", c.c_int32),
        ("lazy_mode", c.c_int32),
        ("main_gpu", c.c_int32),
        ("tensor_split", c.c_void_p),
        ("progress_callback", c.c_void_p),
        ("progress_callback_user_data", c.c_void_p),
        ("kv_overrides", c.c_void_p),
        ("vocab_only", c.c_uint8),
        ("check_tensors", c.c_uint8),
        ("use_extra_bufts", c.c_uint8),
        ("no_host", c.c_uint8),
        ("no_alloc", c.c_uint8),
        ("load_mtp", c.c_uint8),
        ("room", Room),
    ]


class ContextParams(c.Structure):
    """`llama_context_params`."""

    _fields_: ClassVar = [
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32),
        ("n_outputs_max", c.c_uint32),
        ("n_outputs_max_per_seq", c.c_uint32),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        ("ctx_type", c.c_int32),
        ("rope_scaling_type", c.c_int32),
        ("pooling_type", c.c_int32),
        ("attention_type", c.c_int32),
        ("flash_attn_type", c.c_int32),
        ("rope_freq_base", c.c_float),
        ("rope_freq_scale", c.c_float),
        ("yarn_ext_factor", c.c_float),
        ("yarn_attn_factor", c.c_float),
        ("yarn_beta_fast", c.c_float),
        ("yarn_beta_slow", c.c_float),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int32),
        ("type_v", c.c_int32),
        ("moe_cache_size", c.c_size_t),
        ("abort_callback", c.c_void_p),
        ("abort_callback_data", c.c_void_p),
        ("embeddings", c.c_uint8),
        ("offload_kqv", c.c_uint8),
        ("no_perf", c.c_uint8),
        ("op_offload", c.c_uint8),
        ("swa_full", c.c_uint8),
        ("kv_unified", c.c_uint8),
        ("samplers", c.c_void_p),
        ("n_samplers", c.c_size_t),
        ("ctx_other", c.c_void_p),
        ("room", Room),
    ]


class Batch(c.Structure):
    """`llama_batch`. Without `pos`, tokens continue the text; without `logits`, only the last token has logits."""

    _fields_: ClassVar = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.c_void_p),
        ("n_seq_id", c.c_void_p),
        ("seq_id", c.c_void_p),
        ("logits", c.POINTER(c.c_int8)),
    ]


class GraphTensor(c.Structure):
    """`ggml_tensor`, up to its name."""

    _fields_: ClassVar = [
        ("type", c.c_int32),
        ("buffer", c.c_void_p),
        ("ne", c.c_int64 * 4),
        ("nb", c.c_size_t * 4),
        ("op", c.c_int32),
        ("op_params", c.c_int32 * 16),
        ("flags", c.c_int32),
        ("src", c.c_void_p * 10),
        ("view_src", c.c_void_p),
        ("view_offs", c.c_size_t),
        ("data", c.c_void_p),
        ("name", c.c_char * 64),
    ]


POINTER, TEXT, INT, BOOL, SIZE = c.c_void_p, c.c_char_p, c.c_int32, c.c_bool, c.c_size_t
TOKENS, FLOATS = c.POINTER(c.c_int32), c.POINTER(c.c_float)
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, POINTER]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (POINTER, [TEXT, ModelParams]),
    "llama_model_free": (None, [POINTER]),
    "llama_init_from_model": (POINTER, [POINTER, ContextParams]),
    "llama_free": (None, [POINTER]),
    "llama_model_n_embd": (INT, [POINTER]),
    "llama_model_n_layer": (INT, [POINTER]),
    "llama_model_n_ctx_train": (INT, [POINTER]),
    "llama_model_has_encoder": (BOOL, [POINTER]),
    "llama_model_meta_val_str": (INT, [POINTER, TEXT, TEXT, SIZE]),
    "llama_model_get_vocab": (POINTER, [POINTER]),
    "llama_vocab_n_tokens": (INT, [POINTER]),
    "llama_vocab_is_eog": (BOOL, [POINTER, INT]),
    "llama_vocab_bos": (INT, [POINTER]),
    "llama_vocab_eos": (INT, [POINTER]),
    "llama_vocab_get_text": (TEXT, [POINTER, INT]),
    "llama_tokenize": (INT, [POINTER, TEXT, INT, TOKENS, INT, BOOL, BOOL]),
    "llama_detokenize": (INT, [POINTER, TOKENS, INT, TEXT, INT, BOOL, BOOL]),
    "llama_get_memory": (POINTER, [POINTER]),
    "llama_memory_clear": (None, [POINTER, BOOL]),
    "llama_set_adapter_cvec": (INT, [POINTER, FLOATS, SIZE, INT, INT, INT]),
    "llama_decode": (INT, [POINTER, Batch]),
    "llama_get_logits_ith": (FLOATS, [POINTER, INT]),
    "ggml_get_name": (TEXT, [POINTER]),
    "ggml_nbytes": (SIZE, [POINTER]),
    "ggml_backend_tensor_get": (None, [POINTER, POINTER, SIZE, SIZE]),
}

logged_errors: deque[str] = deque(maxlen=4)
"""The last errors that llama.cpp logged."""


@LogCallback
def _log(level: int, text: bytes, _data: object) -> None:
    if level == ERROR:
        logged_errors.append(text.decode(errors="replace").strip())


@cache
def open_library() -> Any:
    """llama.cpp, with its functions' types set and its log silenced.

    Raises `TrimtabError` if `xllamacpp` isn't installed, or if its parameters have another layout than the tested
    version.
    """
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise TrimtabError("the llamacpp engine isn't installed: pip install 'trimtab[llamacpp]'")
    folder = Path(next(iter(spec.submodule_search_locations)))
    file = next((f for f in sorted(folder.glob("xllamacpp*")) if f.suffix in (".so", ".pyd", ".dylib")), None)
    try:
        library = c.CDLL(str(file))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise TrimtabError(f"the installed xllamacpp can't be used ({error}); install {TESTED}") from None
    _check_layout(library.llama_model_default_params(), library.llama_context_default_params())
    library.llama_log_set(_log, None)
    library.llama_backend_init()
    return library


def _check_layout(model: ModelParams, context: ContextParams) -> None:
    """Raises `TrimtabError` if the parameters' defaults aren't at their offsets in the tested version."""
    flags = [getattr(p, field[0]) for p in (model, context) for field in p._fields_ if field[1] is c.c_uint8]
    pointers = [getattr(p, field[0]) for p in (model, context) for field in p._fields_ if field[1] is c.c_void_p]
    expected = {
        "n_ctx": 512,
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_seq_max": 1,
        "rope_scaling_type": -1,
        "pooling_type": -1,
        "attention_type": -1,
        "rope_freq_base": 0.0,
        "yarn_ext_factor": -1.0,
        "type_k": F16,
        "type_v": F16,
    }
    odd = [name for name, value in expected.items() if getattr(context, name) != value]
    if odd or any(flag not in (0, 1) for flag in flags) or any(pointers) or not model.use_extra_bufts:
        raise TrimtabError(
            f"the installed xllamacpp has an incompatible parameter layout ({', '.join(odd) or 'flags'}); install"
            f" {TESTED}"
        )


def last_errors() -> str:
    """llama.cpp's last error messages in one line; this clears them."""
    text = "; ".join(dict.fromkeys(logged_errors))
    logged_errors.clear()
    return text or "llama.cpp gave no reason"
