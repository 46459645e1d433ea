"""A model loaded by llama.cpp, and a context that runs one text through it: steered, and read.

llama.cpp has no way to ask which control vector is set. But it exposes results of its graph, and a steered block's
output is a sum whose second term is that block's vector. So the first run after each change compares these terms with
the vectors that should be added at all blocks, and each later run compares one of them, block after block.
"""

from __future__ import annotations

import ctypes as c
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from trimtab.engines.llamacpp.library import (
    F16,
    F32,
    TESTED,
    Batch,
    EvalCallback,
    GraphTensor,
    last_errors,
    open_library,
)
from trimtab.errors import TrimtabError, UnsupportedError

CACHES = {"float32": F32, "float16": F16}
STEP = 256  # llama.cpp pads its caches to multiples of this
OUTPUT = b"l_out-"  # llama.cpp's name for a block's output, after the control vector

Vectors = Mapping[int, np.ndarray]


class Weights:
    """A loaded GGUF model."""

    def __init__(self, path: Path, gpu_layers: int = 0) -> None:
        self.library = open_library()
        params = self.library.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        self.pointer = self.library.llama_model_load_from_file(str(path).encode(), params)
        if not self.pointer:
            raise TrimtabError(f"llama.cpp can't load {path}: {last_errors()}")
        self.width: int = int(self.library.llama_model_n_embd(self.pointer))
        self.layers: int = int(self.library.llama_model_n_layer(self.pointer))
        self.context: int = int(self.library.llama_model_n_ctx_train(self.pointer))
        self.vocabulary = self.library.llama_model_get_vocab(self.pointer)
        if not self.vocabulary:
            raise TrimtabError(f"llama.cpp finds no vocabulary in {path}: {last_errors()}")

    def metadata(self, key: str) -> str | None:
        """A string from the file's metadata; `None` if it has no such key."""
        size = self.library.llama_model_meta_val_str(self.pointer, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = c.create_string_buffer(size + 1)
        if self.library.llama_model_meta_val_str(self.pointer, key.encode(), buffer, size + 1) != size:
            raise TrimtabError(f"llama.cpp can't read the model's {key}: {last_errors()}")
        return buffer.value.decode("utf-8", "replace")

    def close(self) -> None:
        if self.pointer:
            self.library.llama_model_free(self.pointer)
            self.pointer = None


class Context:
    """A KV cache for one text of at most `size` tokens, and the control vector that is currently set.

    llama.cpp calls back into Python at every node of the graph to ask whether its result is wanted. With the smallest
    model this takes about a hundredth of the time, with others less. `steered` counts, for each block, the tokens at
    which it was steered.
    """

    def __init__(self, weights: Weights, size: int, *, threads: int, cache: str = "float16") -> None:
        self.weights, self.library = weights, weights.library
        self.size: int = -(-size // STEP) * STEP
        self.steered: Counter[int] = Counter()
        self._vectors: Vectors = {}  # the vectors that are set
        self._previous_vectors: Vectors = {}  # those that were set before the last change, until it has been checked
        self._unchecked = False
        self._node = 0  # the number of graph nodes that llama.cpp has asked about
        self._output_nodes: dict[int, int] = {}  # which node is each block's output
        self._watched = 0  # the node that this run compares
        self._added_tokens: dict[int, int] = {}  # blocks that were seen to add their vector, with the number of tokens
        self._faults: list[str] = []
        self._outputs: dict[int, list[np.ndarray]] = {}  # outputs that are being read, by block
        params = self.library.llama_context_default_params()
        params.n_ctx = self.size
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = CACHES[cache]
        params.flash_attn_type = 0  # the same attention kernel for every length
        params.no_perf = 1
        self._callback = EvalCallback(self._wants)  # a reference must live as long as llama.cpp may call it
        params.cb_eval = c.cast(self._callback, c.c_void_p)
        self.batch: int = min(int(params.n_batch), self.size)
        self.pointer = self.library.llama_init_from_model(weights.pointer, params)
        if not self.pointer:
            raise TrimtabError(f"llama.cpp can't make a context of {self.size} tokens: {last_errors()}")

    @property
    def failed(self) -> bool:
        """Whether the last run found a fault, after which the context must not be used any more."""
        return bool(self._faults)

    def close(self) -> None:
        if self.pointer:
            self.library.llama_free(self.pointer)
            self.pointer = None

    def clear(self) -> None:
        """Clear the KV cache and the token counts. The control vector stays."""
        self.steered.clear()
        memory = self.library.llama_get_memory(self.pointer)
        if not memory:
            raise TrimtabError(f"llama.cpp has no KV cache for this model: {last_errors()}")
        self.library.llama_memory_clear(memory, True)

    def steer(self, vectors: Vectors | None) -> None:
        """Add these vectors `[width]` to the outputs of their blocks from now on; `None` or an empty mapping adds none.

        Raises `TrimtabError` if llama.cpp reports a failure. If it silently doesn't add them, `run` raises.
        """
        if not vectors:
            done = self.library.llama_set_adapter_cvec(self.pointer, None, 0, self.weights.width, 0, 0)
        else:
            table = np.zeros((self.weights.layers - 1, self.weights.width), dtype=np.float32)  # blocks 1, 2, …
            for block, vector in vectors.items():
                table[block - 1] = vector
            data = table.ctypes.data_as(c.POINTER(c.c_float))
            done = self.library.llama_set_adapter_cvec(
                self.pointer, data, table.size, self.weights.width, min(vectors), max(vectors)
            )
        if done != 0:
            raise TrimtabError(f"llama.cpp refuses the control vector: {last_errors()}")
        self._previous_vectors = {**self._previous_vectors, **self._vectors} if self._unchecked else self._vectors
        self._vectors = {block: np.array(vector, dtype=np.float32) for block, vector in (vectors or {}).items()}
        self._unchecked = bool(self._previous_vectors or self._vectors)

    def run(self, tokens: Sequence[int], every: bool = False, keep: int = 1) -> np.ndarray:
        """Continue the text with these tokens, and return the logits `[keep, vocabulary]` after the last `keep` ones.

        Args:
            tokens: The token ids.
            every: Compute all tokens up to the end of the last block, so that its output can be read.
            keep: The number of tokens whose logits are returned.

        Raises:
            TrimtabError: llama.cpp fails, or doesn't add exactly the vectors that are set.
        """
        self._added_tokens, self._faults = {}, []
        self._watched = self._next_watched_node()
        first = len(tokens) - keep
        logits = np.empty((keep, self._vocabulary_size), np.float32)
        row = 0
        for start in range(0, len(tokens), self.batch):
            part = tokens[start : start + self.batch]
            ids = (c.c_int32 * len(part))(*part)
            self._node = 0
            wanted = range(max(0, first - start), len(part))
            flags = None
            if every or len(wanted) > 1:  # otherwise llama.cpp computes those after the last token
                flags = (c.c_int8 * len(part))(*(every or i in wanted for i in range(len(part))))
            failed = self.library.llama_decode(self.pointer, Batch(len(part), ids, None, None, None, None, flags))
            if failed:
                raise TrimtabError(f"llama.cpp stopped with code {failed}: {last_errors()}")
            for i in wanted:
                logits[row] = self._logits(i)
                row += 1
        if self._unchecked or self._faults:
            self._check(len(tokens), len(tokens) if every else max(1, keep))
        elif self._vectors and not self._added_tokens:
            self._unchecked = True  # the graph has changed
        self.steered.update(dict.fromkeys(self._vectors, len(tokens)))
        return logits

    def _logits(self, index: int) -> np.ndarray:
        """The logits `[vocabulary]` after the token at this index of the last batch, valid until the next one."""
        logits = self.library.llama_get_logits_ith(self.pointer, index)
        if not logits:
            raise TrimtabError(f"llama.cpp returned no logits: {last_errors()}")
        return np.ctypeslib.as_array(logits, (self._vocabulary_size,))

    @property
    def _vocabulary_size(self) -> int:
        return int(self.library.llama_vocab_n_tokens(self.weights.vocabulary))

    def _check(self, tokens: int, outputs: int) -> None:
        """Raises `TrimtabError` unless this run, the first with these vectors, added them at all of its tokens.

        Args:
            tokens: The number of its tokens.
            outputs: The number of those whose logits were requested.
        """
        last = self.weights.layers - 1  # the last block is only computed for tokens whose logits are requested
        for block in self._vectors:
            steered, wanted = self._added_tokens.get(block, 0), outputs if block == last else tokens
            if steered < wanted:
                self._faults.append(
                    f"block {block} should have been steered at {wanted} tokens, and was steered at {steered}"
                )
        if self._faults:
            raise TrimtabError(f"llama.cpp doesn't apply the control vector: {self._faults[0]}")
        self._previous_vectors, self._unchecked = {}, False

    def read(
        self, blocks: Sequence[int], forward: Callable[[], np.ndarray]
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """The result of `forward`, and the outputs `[tokens, width]` of these blocks during it.

        Of the last block, only tokens whose logits were requested are included. Raises `UnsupportedError` if llama.cpp
        has no name for a block's output.
        """
        self._outputs = {block: [] for block in blocks}
        try:
            result = forward()
            if odd := [block for block, parts in self._outputs.items() if not parts]:
                raise UnsupportedError(f"llama.cpp doesn't name the output of block {odd[0]} of this kind of model")
            return result, {block: np.concatenate(parts) for block, parts in self._outputs.items()}
        finally:
            self._outputs = {}

    def _wants(self, pointer: int, asks: bool, _data: object) -> bool:
        """llama.cpp's callback: first it asks whether a node's result is wanted, then it passes the result."""
        self._node += asks
        if not (self._outputs or self._unchecked) and self._node != self._watched:
            return False
        name = self.library.ggml_get_name(pointer)
        number = name[len(OUTPUT) :] if name.startswith(OUTPUT) else b""
        block = int(number) if number.isdigit() else -1
        reads = block in self._outputs
        checks = block in self._vectors or block in self._previous_vectors
        if asks or not (reads or checks):
            self._output_nodes[block] = self._node
            return reads or checks or not asks
        try:
            if checks:
                self._compare(block, GraphTensor.from_address(pointer), name)
            if reads:
                self._outputs[block].append(self._values(pointer).reshape(-1, self.weights.width))
        except Exception as error:  # ctypes would only print it
            self._faults.append(f"the output of block {block} can't be read ({error})")
        return True

    def _next_watched_node(self) -> int:
        """The graph node of one of the steered blocks, each time of the next block; 0 if not known yet."""
        known = sorted(place for block, place in self._output_nodes.items() if block in self._vectors)
        return next((place for place in known if place > self._watched), known[0] if known else 0)

    def _compare(self, block: int, output: GraphTensor, name: bytes) -> None:
        """Record a fault unless a block's output adds the vector that is set for it, or none if none is set."""
        if output.name != name or output.ne[0] != self.weights.width:
            self._faults.append(f"a tensor of its graph has an unknown layout; install {TESTED}")
            return
        term = output.src[1]
        added = self._values(term) if term else np.empty(0, dtype=np.float32)
        vector = self._vectors.get(block)
        if vector is not None and np.array_equal(added, vector):
            self._added_tokens[block] = self._added_tokens.get(block, 0) + output.ne[1]
        elif vector is not None:
            self._faults.append(f"block {block} doesn't add its vector")
        elif self._previous_vectors[block].any() and np.array_equal(added, self._previous_vectors[block]):
            self._faults.append(f"block {block} still adds a vector that was removed")

    def _values(self, pointer: int) -> np.ndarray:
        """A float32 tensor's numbers, flattened."""
        size = self.library.ggml_nbytes(pointer)
        values = np.empty(size // 4, dtype=np.float32)
        self.library.ggml_backend_tensor_get(pointer, values.ctypes.data_as(c.c_void_p), 0, values.nbytes)
        return values
