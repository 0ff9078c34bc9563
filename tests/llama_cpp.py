"""Real llama.cpp for tests: the C functions that the xllamacpp wheel exports, through ctypes.

Logits are computed as exactly as llama.cpp can: one thread, float32 key-value cache, no flash
attention. Params structs are passed by value as opaque words; their fields are found by the
values that llama_*_default_params() fills in, so a changed layout fails here and not silently.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

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


class _Tensor(ctypes.Structure):
    """ggml_tensor, up to its name."""


_Tensor._fields_ = (
    ("type", ctypes.c_int32),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int32),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
)


def _values(tensor: _Tensor, dtype: type) -> np.ndarray:
    """A view of a tensor's numbers, axes as ggml counts them, the fastest last."""
    ne, nb = list(tensor.ne)[::-1], list(tensor.nb)[::-1]
    octets = sum((n - 1) * b for n, b in zip(ne, nb, strict=True)) + 4
    flat = np.ctypeslib.as_array((ctypes.c_uint8 * octets).from_address(tensor.data))
    return np.ndarray(ne, dtype, flat, strides=nb)


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_Eval = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(_Tensor), ctypes.c_bool, ctypes.c_void_p)
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
        ("ggml_op_name", ctypes.c_char_p, [ctypes.c_int32]),
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


def _context_params(n_tokens: int, see: Any = None) -> _Struct:
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
    if see is not None:  # cb_eval and its argument, two null pointers, are in front of the cache types
        assert not any(words[cache_types - 4 : cache_types])
        pointer = ctypes.cast(see, ctypes.c_void_p).value or 0
        words[cache_types - 4], words[cache_types - 3] = pointer & 0xFFFFFFFF, pointer >> 32
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

    def importance(self, windows: list[list[int]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Matrix of a block -> sums of squares of its inputs and counts, as llama-imatrix gathers them: a matrix that
        experts share out has a row and a count for each, another one row and one count."""
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

        def add(name: str, sums: np.ndarray, counts: np.ndarray) -> None:
            before = found.get(name, (0, 0))
            found[name] = (sums + before[0], counts + before[1])

        @_Eval
        def see(node: Any, asked: bool, _: object) -> bool:
            t = node.contents
            op = library().ggml_op_name(t.op)
            if op not in (b"MUL_MAT", b"MUL_MAT_ID") or t.src[1].contents.type != 0:
                return False
            w, x = t.src[0].contents, _values(t.src[1].contents, np.float32)
            name = w.name.decode()
            if not name.startswith("blk.") or (op == b"MUL_MAT" and x.shape[-2] < 16):
                return False
            if asked:
                return True
            if op == b"MUL_MAT_ID":
                ids, n = _values(t.src[2].contents, np.int32)[0, 0], w.ne[2]  # [tokens, used]
                inputs = np.broadcast_to(x[0], (*ids.shape, x.shape[-1])).astype(np.float64) ** 2
                add(name, np.stack([inputs[ids == e].sum(0) for e in range(n)]), np.bincount(ids.ravel(), minlength=n)[:, None])
            else:
                n = w.ne[2] * w.ne[3]
                squares = (x.astype(np.float64) ** 2).sum(-2).reshape(-1, n, x.shape[-1]).sum(0)
                add(name, squares.reshape(1, -1), np.array([[x.size // x.shape[-1] // n]]))
            return True

        for tokens in windows:
            self._run(tokens, False, see)
        return found

    def _run(self, tokens: list[int], embeddings: bool, see: Any = None) -> np.ndarray:
        lib = library()
        context = lib.llama_init_from_model(self._model, _context_params(max(256, len(tokens)), see))
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
            run = lib.llama_encode if embeddings and lib.llama_model_has_encoder(self._model) else lib.llama_decode
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
