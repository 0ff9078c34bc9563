"""Layers behind the last block that predict further tokens (MTP): the same roles, from other places."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from ..errors import UnsupportedError
from .tensors import Config, From, Tensor
from .weight import Value

_LAYER = "model.layers.{bid}."


def beyond(h: Config, names: Collection[str]) -> int:
    """How many layers a checkpoint has that are numbered on after the last block."""
    numbers = (int(m[1]) for n in names if (m := re.search(r"(?:^|\.)layers\.(\d+)\.(?!.*visual)", n)))
    return max(0, max(numbers, default=0) + 1 - int(h["num_hidden_layers"]))


def apart(_: Config, names: Collection[str]) -> int:
    """How many layers a checkpoint has under mtp.layers. Raises UnsupportedError for several, which share one projection."""
    numbers = {m[1] for n in names if (m := re.search(r"(?:^|\.)mtp\.layers\.(\d+)\.", n))}
    if len(numbers) > 1:
        raise UnsupportedError(f"the checkpoint has {len(numbers)} layers under mtp.layers; one is the limit")
    return len(numbers)


def predicting(layers: int, names: Collection[str]) -> set[str]:
    """The tensors of prediction layers, by a checkpoint's names or GGUF's. layers: how many the model has without them."""
    of = re.compile(r"(?:^|\.)mtp\.|(?:^|\.)(?:layers|blk)\.(\d+)\.(?!.*visual)")
    return {n for n in names if (m := of.search(n)) and (m[1] is None or int(m[1]) >= layers)}


COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
"""Keys of config.json that say how many there are."""

NEXTN = {
    "nextn.eh_proj": Tensor(("embd", "2*embd"), _LAYER + "eh_proj", where="nextn"),
    "nextn.enorm": Tensor(("embd",), _LAYER + "enorm", where="nextn"),
    "nextn.hnorm": Tensor(("embd",), _LAYER + "hnorm", where="nextn"),
    "nextn.embed_tokens": Tensor(("vocab", "embd"), _LAYER + "embed_tokens", where="nextn", optional=True),
    "nextn.shared_head_head": Tensor(("vocab", "embd"), _LAYER + "shared_head.head", where="nextn", optional=True),
    "nextn.shared_head_norm": Tensor(("embd",), _LAYER + "shared_head.norm", where="nextn", optional=True),
}
"""What prediction layers that are numbered on after the last block have more than blocks."""


def with_mtp(tensors: Mapping[str, Tensor], norm: Value | None = None) -> dict[str, Tensor]:
    """Roles, those of full attention layers also for a prediction layer that is stored apart, under "mtp."."""
    roles: dict[str, Tensor] = {}
    for role, t in tensors.items():
        if not any("{bid}" in o.name for o in t.origins):
            roles[role] = t
            continue
        roles[role] = replace(t, where=f"{t.where} & !nextn" if t.where else "!nextn")
        if t.where in ("", "full"):
            also = tuple(_moved(From(o) if isinstance(o, str) else o) for o in t.also)
            roles[f"{role}@nextn"] = replace(t, checkpoint=tuple(map(_moved, t.origins)), also=also, where="nextn")
    return roles | {
        "nextn.eh_proj": Tensor(("embd", "2*embd"), "mtp.fc", where="nextn"),
        "nextn.enorm": Tensor(("embd",), "mtp.pre_fc_norm_embedding", where="nextn", value=norm),
        "nextn.hnorm": Tensor(("embd",), "mtp.pre_fc_norm_hidden", where="nextn", value=norm),
        "nextn.shared_head_norm": Tensor(("embd",), "mtp.norm", where="nextn", value=norm),
    }


def _moved(origin: From) -> From:
    return replace(origin, name=origin.name.replace(_LAYER, "mtp.layers.{nextn}."))
