"""What a verification saw: plain dataclasses whose fields are the JSON schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "differs", "unknown", "note"]
"""unknown: it cannot be told; note: worth saying, and no fault."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at, and what there is to say of it."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """One tensor against what it should be."""

    name: str
    type: str
    shape: tuple[int, ...]
    status: Status
    detail: str = ""
    equal: bool = False
    """Are its bytes those that plain rounding gives?"""
    error: float | None = None
    """‖w − ŵ‖ / ‖w‖."""
    rounding_error: float | None = None
    """The same of plain rounding to its type."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of `verify`."""

    path: str
    against: str | None
    derived_from: str | None
    checks: Sequence[Check]
    tensors: Sequence[TensorCheck] = field(default_factory=tuple)

    @property
    def code(self) -> int:
        """0: all is as it should be; 1: something differs; 2: nothing is known to differ, but something cannot be told."""
        seen = {c.status for c in self.checks}
        return 1 if "differs" in seen else 2 if "unknown" in seen else 0

    def to_json(self) -> dict[str, Any]:
        """Ready for json.dumps; `schema` names this layout."""
        whole = asdict(self)
        return {"schema": "quantforge.verify/1", "code": self.code, **whole}
