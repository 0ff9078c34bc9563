"""An adapter by itself, as llama.cpp applies it to a GGUF file: a source whose tensors are GGUF's `lora_a` and `lora_b`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from .. import codecs, formats, recipes
from ..archs.weight import Shape
from ..arrays import F32
from ..codecs import Encoded
from ..errors import RecipeError, UnsupportedError
from ..formats import Adapters, Source, Stored
from ..formats.adapters import Adapter
from ..formats.low_rank import Change
from ..formats.merged import Names, Route
from ..recipes import presets
from ..recipes.linears import Scheme
from .options import Options

_KEPT = 2
EMBEDDING = "token_embd.weight"


def adapter_alone(path: str | Path | Source, base: str | Path, lora: Adapters, options: Options) -> tuple[Source, Options]:
    """An adapter of PEFT, open as what its GGUF file will hold, and how that is written; base: the model that it is one of.

    Raises FormatError, UnsupportedError for what llama.cpp does not apply, RecipeError.
    """
    if isinstance(path, Source) or lora:
        raise RecipeError("--base writes one adapter by itself: give its directory, and no --lora")
    if not options.target()[0].gguf_names:
        raise RecipeError(f"{path}: an adapter by itself is written as a GGUF file, for llama.cpp: name the output *.gguf")
    recipe = recipes.get("F32" if options.recipe is None else options.recipe)
    if recipe.name not in presets.FLOATS or options.scheme != Scheme() or options.method or options.importance:
        raise RecipeError(f"{path}: an adapter by itself is kept in F32 (default), F16 or BF16: give one of them as --type alone")
    options = replace(options, recipe=recipe)
    adapter = Adapter.open(path)
    try:
        with formats.open_path(base) as model:
            return AdapterSource(adapter, model), options
    except BaseException:
        adapter.close()
        raise


class AdapterSource(Source):
    """See the module."""

    format, gguf_names, whole = "gguf", True, False

    def __init__(self, adapter: Adapter, model: Source) -> None:
        self.path, self._adapter = adapter.path, adapter
        names = Names(model, adapter.updates)
        if names.arch is None:
            raise UnsupportedError(
                f"{model.path}: its architecture has no names in GGUF; merge the adapter: --lora {adapter.path}"
            )
        self._refuse(adapter, names, model)
        self._route = Route(adapter, names, [u for u in adapter.updates.values() if u.low_rank])
        self._pair = lru_cache(maxsize=_KEPT)(self._factors)
        shapes: dict[str, tuple[Shape, Shape]] = {}
        alphas: Counter[float] = Counter()
        for g in self._route.touched:
            self._check_applied(g, names)
            a, b, scale = self._factors(g)
            shapes[g] = (a.shape, b.shape)
            alphas[float(np.float32(scale * b.shape[-1]))] += a.size + b.size
        alphas.pop(0.0, None)  # llama.cpp takes an alpha of 0 for none
        self.alpha = alphas.most_common(1)[0][0] if alphas else 1.0
        plain = codecs.get("F32")
        self.weights = {
            f"{g}.lora_{k}": Stored(plain, shape) for g, pair in shapes.items() for k, shape in zip("ab", pair, strict=True)
        }
        self.config = self._metadata(names)

    @property
    def total_bytes(self) -> int:
        """Bytes of what is made of it, in f32."""
        return sum(s.nbytes for s in self.weights.values())

    def read(self, name: str) -> Encoded:
        """`lora_a`: f32[rank, in] and `lora_b`: f32[out, rank], or stacks; the embedding's lora_a is f32[vocabulary, rank]."""
        g, _, which = name.rpartition(".lora_")
        a, b, scale = self._pair(g)
        w = a
        if which == "b":
            own = np.float32(scale * b.shape[-1])
            w = b if own == np.float32(self.alpha) else b * np.float32(scale * b.shape[-1] / self.alpha)
        plain = codecs.get("F32")
        return Encoded(plain, w.shape, plain.encode(w))

    def close(self) -> None:
        """Unmap the file."""
        self._adapter.close()

    def _factors(self, g: str) -> tuple[F32, F32, float]:
        """A, B and the scale of one of GGUF's tensors; several changes in one become one of higher rank."""
        shape = self._route.touched[g].shape
        change = self._route.change(g)
        scales = change.scale[np.unique(change.which[change.which >= 0])]
        scale = float(scales[0]) if len(scales) else 0.0
        if len(shape) == 3:
            per = len(change.b) // shape[0]
            pairs = [_pair(change.rows(slice(e * per, (e + 1) * per)), scale) for e in range(shape[0])]
            rank = max(a.shape[0] for a, _ in pairs)
            a = np.stack([np.pad(a, ((0, rank - a.shape[0]), (0, 0))) for a, _ in pairs])
            return a, np.stack([np.pad(b, ((0, 0), (0, rank - b.shape[1]))) for _, b in pairs]), scale
        a, b = _pair(change, scale)
        if g == EMBEDDING:
            return b, np.ascontiguousarray(a.T), scale
        return a, b, scale

    def _refuse(self, adapter: Adapter, names: Names, model: Source) -> None:
        """Raise UnsupportedError for what is no change of low rank."""
        for u in adapter.updates.values():
            what = None
            if u.magnitude is not None:
                what = "is DoRA"
            elif u.added is not None:
                what = "has a bias of its own"
            elif u.tokens is not None:
                what = "has trained tokens"
            elif u.replaced is not None and not self._as_before(adapter.read(u.replaced), u.name, names, model):
                what = "is stored whole"
            if what is not None:
                raise UnsupportedError(
                    f"{adapter.path}: {u.name} {what}, which llama.cpp's adapters cannot hold; "
                    f"merge it into the model: quantforge convert {model.path} OUT.gguf --lora {adapter.path}"
                )

    @staticmethod
    def _as_before(saved: Encoded, name: str, names: Names, model: Source) -> bool:
        """Is what the adapter has a copy of what the model has?"""
        x = names.direct.get(name)
        x = names.embedding if x == names.head else x
        if x is None or model.weights[x].shape != saved.shape:
            return False
        return np.array_equal(model.read(x).decode(), saved.decode())

    def _check_applied(self, g: str, names: Names) -> None:
        """Raise UnsupportedError for a tensor whose adapter llama.cpp would load and not use, or not find."""
        assert names.arch is not None
        weight = self._route.touched[g]
        why = None
        if names.head and g in (EMBEDDING, "output.weight"):
            why = "head and embedding of this model are one, which llama.cpp's adapters cannot change"
        elif weight.role in _NOT_APPLIED.get(names.arch.name, _LOOKED_UP) | _LOOKED_UP or weight.role.endswith("_norm"):
            why = f"llama.cpp's {names.arch.name} graph takes no adapter there"
        if why is not None:
            name = next(s for s in weight.sources if s in self._route.updates)
            raise UnsupportedError(
                f"{self.path}: {name}: {why}; merge it into the model: "
                f"quantforge convert {names.source.path} OUT.gguf --lora {self.path}"
            )

    def _metadata(self, names: Names) -> Mapping[str, Any]:
        assert names.arch is not None
        metadata: dict[str, Any] = {
            gguf.Keys.General.ARCHITECTURE: names.arch.name,
            gguf.Keys.General.TYPE: gguf.GGUFType.ADAPTER,
            gguf.Keys.Adapter.TYPE: "lora",
            gguf.Keys.General.NAME: self.path.resolve().name,
            gguf.Keys.Adapter.LORA_ALPHA: self.alpha,
        }
        if tokens := self._adapter.config.get("alora_invocation_tokens"):
            metadata[gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS] = np.array(tokens, np.uint32)
        return metadata


_NOT_APPLIED: dict[str, set[str]] = {
    "deepseek2": {"attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b", "attn_v_b", "output"},
    "minicpm3": {"attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b"},
    "nemotron_h_moe": {"ffn_latent_down", "ffn_latent_up"},
    "gemma4": {"per_layer_model_proj", "ffn_down_exps"},
}
"""Matrices that llama.cpp multiplies with without a look at adapters, by graph, or, gemma4's experts, scales before it adds
an adapter's part: a change of them would be left out, or another one."""
_LOOKED_UP = {"position_embd", "token_types", "per_layer_token_embd"}
"""Tables other than the token embedding: llama.cpp takes rows of them as they are."""


def _pair(change: Change, scale: float) -> tuple[F32, F32]:
    """A: [rank, in] and B: [out, rank] of one matrix; changes of several parts of its rows stand side by side."""
    used = [int(k) for k in np.unique(change.which) if k >= 0]
    rank = change.b.shape[1]
    if len(used) == 1 and (change.which >= 0).all():
        return change.a[used[0]], change.b.astype(np.float32)
    b = np.zeros((len(change.b), rank * len(used)), np.float32)
    for i, k in enumerate(used):
        here = change.which == k
        b[here, i * rank : (i + 1) * rank] = change.b[here].astype(np.float32) * np.float32(
            change.scale[k] / scale if scale else 0
        )
    return np.concatenate([change.a[k] for k in used]) if used else np.zeros((0, change.a.shape[-1]), np.float32), b
