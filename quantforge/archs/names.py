"""Names of a checkpoint's tensors, whatever wraps the model: prefixes are found, not listed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

_WRAPPERS = re.compile(
    r"^(?:_orig_mod\.|module\.|base_model\.model\.)+|\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""What torch.compile, DataParallel and PEFT put before every name, and FSDP and others inside of names."""


def canonical(names: Iterable[str], expected: Collection[str]) -> dict[str, str]:
    """Name in the checkpoint -> the name that the architecture's table has for it, for those that can be one of `expected`.

    The expected names begin with a few roots ("model.", "lm_head."); a checkpoint may have others there, or none
    ("model.language_model.", "language_model.model.", ""). Of all roots that occur, the one under which most names are
    expected ones is taken.
    """
    given = {n: _WRAPPERS.sub("", n) for n in names}
    roots = _roots(expected)
    if not roots:
        return {n: bare for n, bare in given.items() if bare in expected}
    root = max(roots, key=lambda r: roots[r])
    tails = {e[len(root) :] for e in expected if e.startswith(root)}
    counts: dict[str, int] = {root: sum(bare in expected for bare in given.values())}
    for bare in given.values():
        parts = bare.split(".")
        for i in range(min(len(parts), 5)):
            if ".".join(parts[i:]) in tails:
                prefix = "".join(f"{p}." for p in parts[:i])
                counts[prefix] = counts.get(prefix, 0) + 1
    theirs = max(counts, key=lambda prefix: (counts[prefix], prefix == root))
    outer = theirs.removesuffix(root) if theirs.endswith(root) and theirs != root else _outer(theirs)
    renamed: dict[str, str] = {}
    taken: set[str] = set()
    for name, bare in given.items():
        inside = root + bare[len(theirs) :] if bare.startswith(theirs) else bare
        beside = bare.removeprefix(outer)  # a head beside the decoder
        for spelled in (inside, beside, bare):
            if spelled in expected and (spelled not in taken or spelled == bare):
                renamed[name] = spelled
                taken.add(spelled)
                break
    return renamed


def _roots(expected: Collection[str]) -> Mapping[str, int]:
    """First words of names that have numbered blocks, with how many names begin so."""
    counts: dict[str, int] = {}
    for name in expected:
        match = re.match(r"(.*?\.?)(?:[^.]+)\.\d+\.", name)
        if match:
            counts[match[1]] = counts.get(match[1], 0) + 1
    return counts


def _outer(prefix: str) -> str:
    parts = prefix.split(".")
    return "".join(f"{p}." for p in parts[:-2])
