"""Real llama.cpp for tests: the C functions that the xllamacpp wheel exports, through ctypes.

Logits are computed as exactly as llama.cpp can: one thread, float32 key-value cache, no flash
attention. Params structs are passed by value as opaque words; their fields are found by the
values that llama_*_default_params() fills in, so a changed layout fails here and not silently.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import pytest

_SIZE = 1024  # more than any params struct; the callee reads and writes only its own part
_Params = ctypes.c_int32 * (_SIZE // 4)


class _Struct(ctypes.Structure):
    _fields_ = (("words", _Params),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq", ctypes.c_void_p),
        ("seq", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_errors: list[str] = []


@_Log
def _log(level: int, text: bytes, _: object) -> None:
    if level >= 4:  # GGML_LOG_LEVEL_ERROR
        _errors.append(text.decode("utf-8", "replace").strip())


@cache
def library() -> ctypes.CDLL:
    """The wheel's shared library with signatures set and its log silenced; skips the test without the wheel."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs the xllamacpp wheel (a complete llama.cpp)")
    (path,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    lib = ctypes.CDLL(str(path))
    pointer, int32 = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_log_set", None, [_Log, pointer]),
        ("llama_model_default_params", _Struct, []),
        ("llama_context_default_params", _Struct, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Struct]),
        ("llama_init_from_model", pointer, [pointer, _Struct]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", int32, [pointer]),
        ("llama_vocab_get_add_bos", ctypes.c_bool, [pointer]),
        ("llama_vocab_is_eog", ctypes.c_bool, [pointer, int32]),
        ("llama_tokenize", int32, [pointer, ctypes.c_char_p, int32, pointer, int32, ctypes.c_bool, ctypes.c_bool]),
        ("llama_token_to_piece", int32, [pointer, int32, pointer, int32, int32, ctypes.c_bool]),
        ("llama_model_chat_template", ctypes.c_char_p, [pointer, ctypes.c_char_p]),
        ("llama_batch_init", _Batch, [int32, int32, int32]),
        ("llama_batch_free", None, [_Batch]),
        ("llama_decode", int32, [pointer, _Batch]),
        ("llama_encode", int32, [pointer, _Batch]),
        ("llama_model_has_encoder", ctypes.c_bool, [pointer]),
        ("llama_model_has_decoder", ctypes.c_bool, [pointer]),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [pointer]),
        ("llama_get_embeddings", ctypes.POINTER(ctypes.c_float), [pointer]),
        ("llama_set_embeddings", None, [pointer, ctypes.c_bool]),
        ("llama_model_n_embd", int32, [pointer]),
        ("llama_adapter_lora_init", pointer, [pointer, ctypes.c_char_p]),
        ("llama_set_adapters_lora", int32, [pointer, pointer, ctypes.c_size_t, pointer]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_log, None)
    return lib


def _context_params(n_tokens: int) -> _Struct:
    params = library().llama_context_default_params()
    words = params.words
    assert words[1] >= words[2] > 0, "n_ctx, n_batch, n_ubatch are not the first three words"
    words[0] = words[1] = words[2] = n_tokens
    threads = next(i for i in range(3, 12) if words[i] == words[i + 1] > 1)
    words[threads] = words[threads + 1] = 1
    flash_attention = max(i for i in range(16) if words[i] == -1)  # the last of the enums that default to -1, "auto"
    words[flash_attention] = 0
    words[flash_attention - 2] = 0  # pooling_type: none
    cache_types = next(i for i in range(flash_attention + 8, 40) if words[i] == words[i + 1] == 1)  # F16, F16
    words[cache_types] = words[cache_types + 1] = 0
    return params


class Llama:
    """A model in llama.cpp; a context manager."""

    def __init__(self, path: str | Path, vocab_only: bool = False) -> None:
        params = library().llama_model_default_params()
        flags = (ctypes.c_uint8 * _SIZE).from_buffer(params.words)
        # the bools come last: vocab_only, check_tensors, use_extra_bufts, ...
        assert list(flags[72:75]) == [0, 0, 1], "vocab_only is not where it was: pin xllamacpp"
        flags[72] = vocab_only
        _errors.clear()
        self._context = None
        self._adapter = None
        self._model = library().llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}: {' | '.join(_errors)}")
        self._vocab = library().llama_model_get_vocab(self._model)

    def adapt(self, path: str | Path) -> Llama:
        """Apply an adapter from now on."""
        _errors.clear()
        self._adapter = library().llama_adapter_lora_init(self._model, str(path).encode())
        if not self._adapter:
            raise RuntimeError(f"llama.cpp does not apply {path}: {' | '.join(_errors)}")
        return self

    @property
    def n_vocab(self) -> int:
        return library().llama_vocab_n_tokens(self._vocab)

    @property
    def adds_bos(self) -> bool:
        return library().llama_vocab_get_add_bos(self._vocab)

    def ends(self, token: int) -> bool:
        """Does generation stop at this token?"""
        return library().llama_vocab_is_eog(self._vocab, token)

    def chat_template(self, name: str | None = None) -> str | None:
        found = library().llama_model_chat_template(self._model, name.encode() if name else None)
        return found.decode() if found is not None else None

    def tokenize(self, text: str | bytes, special: bool = False, add_special: bool = False) -> list[int]:
        """Token ids; `special`: control tokens in the text are recognised; `add_special`: BOS/EOS as the file says."""
        data = text.encode() if isinstance(text, str) else text
        ids = (ctypes.c_int32 * (2 * len(data) + 8))()
        n = library().llama_tokenize(self._vocab, data, len(data), ids, len(ids), add_special, special)
        assert n >= 0
        return list(ids[:n])

    def piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        n = library().llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        assert n >= 0
        return buffer.raw[:n]

    def logits(self, tokens: list[int]) -> np.ndarray:
        """f32[len(tokens), vocab]: next-token logits after each token, from one fresh context.

        A model of encoder and decoder gets the tokens in both.
        """
        return self._run(tokens, False)

    def embeddings(self, tokens: list[int]) -> np.ndarray:
        """f32[len(tokens), hidden]: an encoder's last hidden states, from one fresh context."""
        return self._run(tokens, True)

    def _run(self, tokens: list[int], embeddings: bool) -> np.ndarray:
        lib = library()
        context = lib.llama_init_from_model(self._model, _context_params(max(256, len(tokens))))
        assert context, f"no context: {_errors}"
        if self._adapter:
            adapters, scales = (ctypes.c_void_p * 1)(self._adapter), (ctypes.c_float * 1)(1.0)
            assert lib.llama_set_adapters_lora(context, adapters, 1, scales) == 0
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        try:
            n = len(tokens)
            for field, kind, values in (
                (batch.token, ctypes.c_int32, tokens),
                (batch.pos, ctypes.c_int32, range(n)),
                (batch.n_seq, ctypes.c_int32, [1] * n),
                (batch.logits, ctypes.c_int8, [1] * n),
            ):
                (kind * n).from_address(field)[:] = list(values)
            sequences = (ctypes.POINTER(ctypes.c_int32) * n).from_address(batch.seq)
            for i in range(n):
                sequences[i][0] = 0
            batch.n = n
            lib.llama_set_embeddings(context, embeddings)
            if lib.llama_model_has_encoder(self._model) and lib.llama_model_has_decoder(self._model):
                assert lib.llama_encode(context, batch) == 0, f"llama_encode failed: {_errors}"
            run = lib.llama_encode if embeddings else lib.llama_decode
            assert run(context, batch) == 0, f"llama_decode failed: {_errors}"
            if embeddings:
                return np.ctypeslib.as_array(lib.llama_get_embeddings(context), (n, lib.llama_model_n_embd(self._model))).copy()
            return np.ctypeslib.as_array(lib.llama_get_logits(context), (n, self.n_vocab)).copy()
        finally:
            lib.llama_batch_free(batch)
            lib.llama_free(context)

    def close(self) -> None:
        if self._model:
            library().llama_model_free(self._model)
        self._model = None

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
