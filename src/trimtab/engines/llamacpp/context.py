"""A model in llama.cpp's memory, and a run of one text through it: steered, and read."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.engines.llamacpp.library import F16, F32, Batch, EvalCallback, last_errors, open_library
from trimtab.errors import TrimtabError, UnsupportedError

CACHES = {"float32": F32, "float16": F16}
STEP = 256  # llama.cpp pads its caches to multiples of this
OUTPUT = b"l_out-"  # what llama.cpp calls a block's output, after the control vector

Vectors = Mapping[int, np.ndarray]


class Weights:
    """A GGUF model, loaded."""

    def __init__(self, path: Path, gpu_layers: int = 0) -> None:
        self.library = open_library()
        params = self.library.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        self.pointer = self.library.llama_model_load_from_file(str(path).encode(), params)
        if not self.pointer:
            raise TrimtabError(f"llama.cpp can't load {path}: {last_errors()}")
        self.width = int(self.library.llama_model_n_embd(self.pointer))
        self.layers = int(self.library.llama_model_n_layer(self.pointer))
        self.context = int(self.library.llama_model_n_ctx_train(self.pointer))
        self.vocabulary = self.library.llama_model_get_vocab(self.pointer)

    def metadata(self, key: str) -> str | None:
        """A text of the file's metadata, `None` where it has none of that name."""
        size = self.library.llama_model_meta_val_str(self.pointer, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = c.create_string_buffer(size + 1)
        self.library.llama_model_meta_val_str(self.pointer, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8", "replace")

    def close(self) -> None:
        """Free the memory. Contexts of this model must be closed before."""
        if self.pointer:
            self.library.llama_model_free(self.pointer)
            self.pointer = None


class Context:
    """A cache for one text of at most `size` tokens, and the control vector that acts on it now.

    With `reading` it keeps the outputs of the blocks that `read` is asked for: llama.cpp then asks Python at every step
    of the graph, which takes time. Prompts are read in such a context, and their `state` continued in one without.
    """

    def __init__(
        self, weights: Weights, size: int, *, threads: int, cache: str = "float16", reading: bool = False
    ) -> None:
        self.weights, self.library = weights, weights.library
        self.size = -(-size // STEP) * STEP
        self._seen: dict[int, list[np.ndarray]] = {}  # what is being read
        params = self.library.llama_context_default_params()
        params.n_ctx = self.size
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = CACHES[cache]
        params.flash_attn_type = 0  # one way of attention, whatever the length
        params.no_perf = 1
        if reading:
            self._callback = EvalCallback(self._asked)  # kept for as long as llama.cpp may call it
            params.cb_eval = c.cast(self._callback, c.c_void_p)
        self.batch = min(int(params.n_batch), self.size)
        self.pointer = self.library.llama_init_from_model(weights.pointer, params)
        if not self.pointer:
            raise TrimtabError(f"llama.cpp can't make a context of {self.size} tokens: {last_errors()}")

    def close(self) -> None:
        """Free the memory."""
        if self.pointer:
            self.library.llama_free(self.pointer)
            self.pointer = None

    def clear(self) -> None:
        """Forget the text. The control vector stays."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.pointer), True)

    def steer(self, vectors: Vectors | None) -> None:
        """Add these vectors `[width]` at the outputs of their blocks from now on; nothing where `None` or empty."""
        if not vectors:
            done = self.library.llama_set_adapter_cvec(self.pointer, None, 0, self.weights.width, 0, 0)
        else:
            table = np.zeros((self.weights.layers - 1, self.weights.width), dtype=np.float32)  # of blocks 1, 2, …
            for block, vector in vectors.items():
                table[block - 1] = vector
            data = table.ctypes.data_as(c.POINTER(c.c_float))
            done = self.library.llama_set_adapter_cvec(
                self.pointer, data, table.size, self.weights.width, min(vectors), max(vectors)
            )
        if done != 0:
            raise TrimtabError(f"llama.cpp refuses the control vector: {last_errors()}")

    def run(self, tokens: Sequence[int], every: bool = False) -> np.ndarray:
        """Continue the text with these tokens. The logits `[vocabulary]` after the last of them.

        With `every`, all tokens are computed to the end of the last block, so that it can be read.
        """
        for start in range(0, len(tokens), self.batch):
            part = tokens[start : start + self.batch]
            ids = (c.c_int32 * len(part))(*part)
            flags = (c.c_int8 * len(part))(*([1] * len(part))) if every else None
            failed = self.library.llama_decode(self.pointer, Batch(len(part), ids, None, None, None, None, flags))
            if failed:
                raise TrimtabError(f"llama.cpp stopped with code {failed}: {last_errors()}")
        logits = self.library.llama_get_logits_ith(self.pointer, -1)
        return np.ctypeslib.as_array(logits, (self.library.llama_vocab_n_tokens(self.weights.vocabulary),)).copy()

    def state(self) -> Any:
        """The text so far, for `resume` in another context of the same kind."""
        size = self.library.llama_state_seq_get_size(self.pointer, 0)
        data = (c.c_uint8 * size)()
        if self.library.llama_state_seq_get_data(self.pointer, data, size, 0) != size:
            raise TrimtabError(f"llama.cpp can't copy its cache: {last_errors()}")
        return data

    def resume(self, state: Any) -> None:
        """Go on with another context's text instead of the own one."""
        self.clear()
        if self.library.llama_state_seq_set_data(self.pointer, state, len(state), 0) != len(state):
            raise TrimtabError(f"llama.cpp can't copy its cache: {last_errors()}")

    def read(self, blocks: Sequence[int], runs: Callable[[], np.ndarray]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """What `runs` gives, and the outputs `[tokens, width]` of these blocks in what it runs here.

        Of the last block only those whose logits were asked for. Raises `UnsupportedError` where llama.cpp has no
        name for them.
        """
        self._seen = {block: [] for block in blocks}
        try:
            result = runs()
            if odd := [block for block, parts in self._seen.items() if not parts]:
                raise UnsupportedError(f"llama.cpp doesn't name the output of block {odd[0]} of this kind of model")
            return result, {block: np.concatenate(parts) for block, parts in self._seen.items()}
        finally:
            self._seen = {}

    def _asked(self, tensor: int, asks: bool, _data: object) -> bool:
        """llama.cpp asks of each result whether it is wanted, and then hands it over."""
        name = self.library.ggml_get_name(tensor) if self._seen else b""
        number = name[len(OUTPUT) :] if name.startswith(OUTPUT) else b""
        wanted = number.isdigit() and int(number) in self._seen
        if asks or not wanted:
            return wanted or not asks
        size = self.library.ggml_nbytes(tensor)
        if size % (4 * self.weights.width) == 0:  # float32, as a block's output always is
            values = np.empty((size // (4 * self.weights.width), self.weights.width), dtype=np.float32)
            self.library.ggml_backend_tensor_get(tensor, values.ctypes.data_as(c.c_void_p), 0, size)
            self._seen[int(number)].append(values)
        return True
