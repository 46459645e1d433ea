"""A GGUF model's own tokenizer and chat template, with the interface of a transformers tokenizer that trimtab needs."""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from typing import Any

from trimtab.errors import TrimtabError


class GgufTokenizer:
    """llama.cpp's tokenizer of a model: `tokenizer(text)["input_ids"]`, `decode`, and the chat template in its file."""

    def __init__(self, library: Any, vocabulary: int, template: str | None) -> None:
        self._library, self._vocabulary = library, vocabulary
        self.chat_template = template
        self.vocab_size: int = int(library.llama_vocab_n_tokens(vocabulary))
        self.bos_token_id: int = int(library.llama_vocab_bos(vocabulary))
        self.bos_token: str = self._text(self.bos_token_id)
        self.eos_token: str = self._text(int(library.llama_vocab_eos(vocabulary)))

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """The ids of plain text, with the model's special tokens around it unless `add_special_tokens` is false."""
        return {"input_ids": self._ids(text, special=add_special_tokens)}

    def _ids(self, text: str, special: bool) -> list[int]:
        data = text.encode("utf-8", "surrogatepass")
        capacity = len(data) + 8
        ids = (c.c_int32 * capacity)()
        count = self._library.llama_tokenize(self._vocabulary, data, len(data), ids, capacity, special, True)
        if count < 0:
            raise TrimtabError(f"llama.cpp can't tokenize this text of {len(text)} characters")
        return list(ids[:count])

    def apply_chat_template(
        self, messages: Sequence[Any], *, tokenize: bool = True, return_dict: bool = True, **keywords: Any
    ) -> Any:
        """The rendered messages: text, or with `tokenize`, `{"input_ids": …}`. Keywords are passed to the template."""
        del return_dict  # only for compatibility with transformers
        from trimtab.engines.transformers.compat import render_chat_template

        text = render_chat_template(
            messages,
            self.chat_template,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            **keywords,
        )
        return {"input_ids": self._ids(text, special=False)} if tokenize else text

    def _text(self, token: int) -> str:
        if token < 0:
            return ""
        text = self._library.llama_vocab_get_text(self._vocabulary, token)
        if text is None:
            raise TrimtabError(f"llama.cpp has no text for token {token}")
        return str(text.decode())

    def convert_ids_to_tokens(self, token: int) -> str:
        """The token as written in the vocabulary."""
        return self._text(token)

    def is_end(self, token: int) -> bool:
        """Whether this is an end-of-text token."""
        return bool(self._library.llama_vocab_is_eog(self._vocabulary, token))

    def decode(
        self, tokens: Sequence[int], skip_special_tokens: bool = True, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """The text of generated tokens, without cleanup of spaces; bytes that aren't valid UTF-8 become `\\ufffd`."""
        del clean_up_tokenization_spaces  # only for compatibility with transformers
        ids = (c.c_int32 * max(1, len(tokens)))(*tokens)
        capacity = 16 * len(tokens) + 64
        while True:
            buffer = c.create_string_buffer(capacity)
            count = self._library.llama_detokenize(
                self._vocabulary, ids, len(tokens), buffer, capacity, False, not skip_special_tokens
            )
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            capacity = -count
