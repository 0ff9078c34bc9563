"""A tensor as rows of others: read in any order, cut anywhere, and turned back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantforge import codecs, formats
from quantforge.archs.tensors import interleaved, paired, part, size
from quantforge.archs.weight import MINUS_EXP, PLUS_ONE, Piece, Weight, inverted
from quantforge.codecs import Encoded
from quantforge.errors import ShapeError
from quantforge.formats import Stored
from quantforge.formats.rows import by_rows, origin, read_encoded, read_rows


class Held(formats.Source):
    """Arrays in memory as an open file; as: their codec."""

    format, total_bytes = "held", 0

    def __init__(self, arrays: dict[str, np.ndarray], codec: str = "F32") -> None:
        self.path, self.config = Path("held"), {}
        c = codecs.get(codec)
        self.stored = {k: Encoded(c, w.shape, c.encode(np.ascontiguousarray(w, np.float32))) for k, w in arrays.items()}
        self.weights = {k: Stored(e.codec, e.shape) for k, e in self.stored.items()}

    def read(self, name: str) -> Encoded:
        return self.stored[name]


def numbers(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def whole(source: formats.Source, w: Weight) -> np.ndarray:
    x = read_rows(source, w)
    return (x.decode() if isinstance(x, Encoded) else x).reshape(w.shape)


S = {"heads": 3, "head": 4, "q": 12, "kv": 4, "ff": 6, "experts": 5, "embd": 8}
qkv, gate_up, across = numbers(20, 8), numbers(5, 12, 8), numbers(5, 8, 12)
CASES = {
    "fused": (
        {"qkv": qkv},
        {
            name: (Weight(name, (n, 8), (Piece("qkv", n, part(i, "q", "kv", "kv")(S)),)), expected)
            for i, (name, n, expected) in enumerate([("q", 12, qkv[:12]), ("k", 4, qkv[12:16]), ("v", 4, qkv[16:])])
        },
    ),
    "stacked": (
        {"gate_up": gate_up},
        {
            name: (
                Weight(name, (5, 6, 8), (Piece("gate_up", 30, part(i, "ff", "ff", per="experts")(S)),)),
                gate_up[:, i * 6 :][:, :6],
            )
            for i, name in enumerate(["gate", "up"])
        },
    ),
    "one by one": (
        {f"e{i}": gate_up[i] for i in range(5)},
        {"all": (Weight("all", (5, 12, 8), tuple(Piece(f"e{i}", 12) for i in range(5))), gate_up)},
    ),
    "transposed and alternating": (
        {"across": across},
        {
            name: (
                Weight(name, (5, 6, 8), (Piece("across", 60, None, 5),), interleaved(i, 2, "experts*2*ff")(S)),
                across.swapaxes(1, 2)[:, i::2],
            )
            for i, name in enumerate(["gate", "up"])
        },
    ),
    "a part transposed": (
        {"kv_b": numbers(30, 8)},
        {
            "k": (
                Weight("k", (3, 8, 6), (Piece("kv_b", 24, part(0, "6", "4", per="heads")(S), 3),)),
                numbers(30, 8).reshape(3, 10, 8)[:, :6].swapaxes(1, 2),
            ),
            "v": (
                Weight("v", (3, 4, 8), (Piece("kv_b", 12, part(1, "6", "4", per="heads")(S)),)),
                numbers(30, 8).reshape(3, 10, 8)[:, 6:],
            ),
        },
    ),
    "pairs": (
        {"q": numbers(12, 8)},
        {
            "q": (
                Weight("q", (12, 8), (Piece("q", 12, paired("heads")(S)),)),
                numbers(12, 8).reshape(3, 2, 2, 8).swapaxes(1, 2).reshape(12, 8),
            )
        },
    ),
    "vectors": ({"n": numbers(7)}, {"n": (Weight("n", (7,), (Piece("n", 7),), None, PLUS_ONE), numbers(7) + 1)}),
    "a vector as a column": (
        {"a": numbers(7) / 4},
        {"a": (Weight("a", (7, 1), (Piece("a", 7),), None, MINUS_EXP), -np.exp(numbers(7) / 4)[:, None])},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("codec", ["F32", "row-of-f32"])
def test_there_and_back(case: str, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, in tiles of every size, and inverted; from plain arrays, and from codecs whose rows cannot be had alone."""
    arrays, made = CASES[case]
    source = Held(arrays)
    if codec != "F32":
        monkeypatch.setattr(type(codecs.get("F32")), "row_local", False)
    for w, expected in made.values():
        np.testing.assert_array_equal(whole(source, w), expected)
        rows = expected.reshape(-1, expected.shape[-1])
        for step in (1, 2, 3, 5, 7) if expected.ndim > 1 else ():
            for a in range(0, len(rows), step):
                x = read_rows(source, w, a, min(a + step, len(rows)))
                np.testing.assert_array_equal(x.decode() if isinstance(x, Encoded) else x, rows[a : a + step])
    there = Held({name: expected for name, (_, expected) in made.items()})
    back = inverted([w for w, _ in made.values()], {k: w.shape for k, w in arrays.items()})
    assert back.keys() == arrays.keys()
    for name, w in back.items():
        np.testing.assert_allclose(whole(there, w), arrays[name], rtol=1e-6, atol=1e-7)


def test_rows_stay_encoded_where_they_can() -> None:
    w = np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)
    source = Held({"qkv": w}, "Q8_0")
    k = Weight("k", (4, 64), (Piece("qkv", 4, slice(12, 16)),))
    found = read_rows(source, k)
    assert isinstance(found, Encoded) and found.codec.name == "Q8_0"
    np.testing.assert_array_equal(found.decode(), source.read("qkv").decode()[12:16])
    assert by_rows(source, k) and read_encoded(source, k) is not None
    changed = Weight("k", (4, 64), k.pieces, None, PLUS_ONE)
    assert not isinstance(read_rows(source, changed), Encoded)


def test_rows_without_a_place_are_told() -> None:
    lost = Weight("q", (4, 8), (Piece("qkv", 4, slice(0, 4)),))
    with pytest.raises(ShapeError, match="qkv: row 4 has no place"):
        inverted([lost], {"qkv": (5, 8)})


def test_origin_names_the_stored_number() -> None:
    _, made = CASES["a part transposed"]
    source = numbers(30, 8)
    w, expected = made["k"]
    name, (row, column) = origin(w, 9, 2)  # second head
    assert name == "kv_b" and source[row, column] == expected.reshape(-1, 6)[9, 2]
    _, fused = CASES["fused"]
    assert origin(fused["v"][0], 1, 3) == ("qkv", (17, 3))


def test_sizes_are_sums_of_products() -> None:
    assert size("2*ff", S) == 12 and size("q+kv+kv", S) == 20 and size("heads*head", S) == 12 and size("7", S) == 7
