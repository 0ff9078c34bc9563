"""AutoRound: GPTQ's or AWQ's arrays under its own config, or its own packing, which is GPTQ's with zeros as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UnsupportedError
from .base import Arrays, Found, Layout, Load, get, stems


@dataclass(frozen=True, slots=True)
class AutoRound(Layout):
    """AutoRound's integers."""

    name: ClassVar[str] = "auto-round"
    also: ClassVar[tuple[str, ...]] = ("auto_round", "autoround", "intel/auto-round")

    def find(self, config: Mapping[str, Any], arrays: Arrays, load: Load) -> Found:
        """See `Layout.find`."""
        packing = str(config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq")
        kind, integers = str(config.get("data_type", "int")), stems(arrays, "qweight")
        if not integers or not kind.startswith("int"):
            raise UnsupportedError(
                f"AutoRound's {packing} with data_type {kind!r}: its integers in GPTQ's, AWQ's or its own packing are read; "
                "export it as auto_gptq, auto_awq or llm_compressor"
            )
        if "awq" in packing:
            return get("awq").find({**config, "version": "gemm", "zero_point": config.get("sym") is not True}, arrays, load)
        if any("awq" in str(own.get("packing_format")) for own in (config.get("extra_config") or {}).values()):
            raise UnsupportedError("AutoRound's GPTQ and AWQ packing in one checkpoint; export it in one of them")
        version = "gptq" if "gptq" in packing else "gptq_v2"
        return get("gptq").find({**config, "checkpoint_format": version, "format": None}, arrays, load)


LAYOUT = AutoRound
