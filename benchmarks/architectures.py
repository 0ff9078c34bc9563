"""docs/architectures.md from what the tests of the architectures found (`make architectures`)."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import tomllib

from quantforge import archs

PAGE = """# Architectures

Every architecture is proven on small random models that transformers {transformers} makes from its own classes, one for each of the samples that the architecture states. Written by `make architectures` on {date}.

- **logits**: the F32 GGUF in real llama.cpp (xllamacpp {xllamacpp}) against transformers on the same 120 tokens, the largest difference in parts of the logits' range (of encoders: of the last hidden states').
- **GELU**: the same where ggml's GELU, a table of 16 bits, is put into transformers: nearly all of the difference goes.
- **back**: the GGUF as a checkpoint again, in transformers, against the first one.
- **KLD**: `evaluate` of the GGUF against its source, nats per token.
- **Q8_0**, **Q4_K_M**: the median over tokens of the largest difference, same units; random weights are the hardest there are.
- **methods**: what `tests/archs/test_across.py` did with its samples, having loaded and run what came of it: `calibrate`, with names, counts and sums as llama.cpp's own graph multiplies them; `--method gptq` and `awq` to GGUF; the layouts GPTQ and AWQ with their methods, compressed-tensors; `evaluate` of Q8_0 and Q4_0, in that order. `make test-all` does all of these with every sample of a decoder, `make test` one with each graph.

{count} classes on {graphs} of llama.cpp's graphs.

| class | llama.cpp | varied, beside sizes | logits | GELU | back | KLD | Q8_0 | Q4_K_M | methods |
|---|---|---|--:|--:|--:|--:|--:|--:|---|
"""  # noqa: E501
NOT_REGISTERED = """
## Not registered

Of the {both} classes that transformers and llama.cpp's converter both know, {missing} are not registered: nothing is that has not been proven.

| class | why |
|---|---|
"""  # noqa: E501
TABLE = Path(__file__).with_suffix(".toml")
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")


def varied(arch: archs.Arch) -> str:
    """Config keys that the samples set."""
    keys = dict.fromkeys(k for sample in arch.samples.values() for k in sample if k not in SIZES)
    return ", ".join(keys)


def not_registered() -> str:
    """The section of what is missing, with the reasons of `TABLE`."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    reasons: dict[str, str] = table["not_registered"]
    rows = "".join(f"| {name} | {reason} |\n" for name, reason in reasons.items())
    return NOT_REGISTERED.format(both=len(table["both"]), missing=len(reasons)) + rows


def main() -> None:
    """Read lines of figures, print the page."""
    import datetime
    from importlib.metadata import version

    worst: dict[str, dict[str, float]] = defaultdict(dict)
    done: dict[str, list[str]] = {}
    for line in Path(sys.argv[1]).read_text().splitlines():
        row = json.loads(line)
        name = row.pop("name")
        row.pop("sample", None)
        ways = row.pop("methods", None)
        if ways is not None:  # with every sample
            done[name] = [w for w in done.get(name, ways) if w in ways]
        for key, value in row.items():
            worst[name][key] = max(worst[name].get(key, 0.0), value)
    known = archs.supported()
    made = {k: v for k, v in worst.items() if "logits" in v and k in known}
    print(
        PAGE.format(
            transformers=version("transformers"),
            xllamacpp=version("xllamacpp"),
            date=datetime.date.today(),
            count=len(made),
            graphs=len({known[n].name for n in made}),
        ),
        end="",
    )
    most = max(done.values(), key=len, default=[])
    for name in sorted(made, key=lambda n: (known[n].name, n)):
        columns = ("logits", "table", "back", "kld", "Q8_0", "Q4_K_M")
        shown = [f"{made[name][k]:.1e}" if k in made[name] else "–" for k in columns]
        ways = "all" if name in done and done[name] == most else ", ".join(done.get(name, ["–"]))
        print(f"| {name} | {known[name].name} | {varied(known[name])} | {' | '.join(shown)} | {ways} |")
    print(not_registered(), end="")


if __name__ == "__main__":
    main()
