"""quantforge: convert any language-model checkpoint into any other, quantized as well as the science allows.

import quantforge as qf

report = qf.convert("model/", "out.gguf", recipe="Q4_K_M", importance="imatrix.gguf")
e = qf.quantize(w, "Q4_K", importance=imp)   # e.decode(), e.bpw, e.parts, e.tobytes()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .extras import watch

if TYPE_CHECKING:
    from .backends import Library
    from .calibration.gather import CalibrationReport, calibrate
    from .calibration.importance import Importance
    from .calibration.importance import read as read_importance
    from .codecs import Codec, Encoded, GridCodec, register
    from .conversion.convert import convert, plan
    from .conversion.options import Calibration
    from .conversion.plan import Plan
    from .conversion.run import Report
    from .device import quantize
    from .errors import (
        BackendError,
        CalibrationError,
        FormatError,
        MissingError,
        NativeError,
        NonFiniteError,
        OutputError,
        QuantForgeError,
        RecipeError,
        ShapeError,
        UnsupportedError,
    )
    from .evaluation.report import Evaluation
    from .evaluation.run import evaluate
    from .evaluation.scorecard import compare
    from .formats import open_path as open
    from .formats.splitting import merge, split
    from .recipes import Recipe
    from .recipes.linears import Scheme
    from .runtime.loading import load
    from .verification.report import Verification
    from .verification.run import verify

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Calibration",
    "CalibrationError",
    "CalibrationReport",
    "Codec",
    "Encoded",
    "Evaluation",
    "FormatError",
    "GridCodec",
    "Importance",
    "Library",
    "MissingError",
    "NativeError",
    "NonFiniteError",
    "OutputError",
    "Plan",
    "QuantForgeError",
    "Recipe",
    "RecipeError",
    "Report",
    "Scheme",
    "ShapeError",
    "UnsupportedError",
    "Verification",
    "__version__",
    "calibrate",
    "compare",
    "convert",
    "evaluate",
    "load",
    "merge",
    "open",
    "plan",
    "quantize",
    "read_importance",
    "register",
    "split",
    "verify",
]

# Names are looked up when first used: `quantforge --help` loads neither NumPy nor gguf.
_HOMES = {
    **dict.fromkeys(("Codec", "Encoded", "GridCodec", "register"), ("codecs", "")),
    "quantize": ("device", ""),
    **dict.fromkeys(("convert", "plan"), ("conversion.convert", "")),
    "Calibration": ("conversion.options", ""),
    "Plan": ("conversion.plan", ""),
    "Report": ("conversion.run", ""),
    "Library": ("backends", ""),
    "Scheme": ("recipes.linears", ""),
    **dict.fromkeys(("CalibrationReport", "calibrate"), ("calibration.gather", "")),
    "Importance": ("calibration.importance", ""),
    "Recipe": ("recipes", ""),
    "Evaluation": ("evaluation.report", ""),
    "compare": ("evaluation.scorecard", ""),
    "evaluate": ("evaluation.run", ""),
    "load": ("runtime.loading", ""),
    "open": ("formats", "open_path"),
    **dict.fromkeys(("merge", "split"), ("formats.splitting", "")),
    "Verification": ("verification.report", ""),
    "verify": ("verification.run", ""),
    "read_importance": ("calibration.importance", "read"),
}


watch()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES.get(name, ("errors", ""))
    value = getattr(import_module(f".{module}", __name__), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
