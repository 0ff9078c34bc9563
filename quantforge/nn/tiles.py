"""Matrices cut into tiles of 16 rows and chunks of columns, so that every lane of a warp gets its bits in
loads of 16 bytes. Both are padded with zeros. docs/gpu.md has pictures."""

from __future__ import annotations

import torch

TILE = 16
"""Rows."""


def _split(t: torch.Tensor, axis: int, n: int) -> torch.Tensor:
    """An axis as two, the second of length n."""
    return t.reshape(*t.shape[:axis], -1, n, *t.shape[axis + 1 :])


def spread(codes: torch.Tensor, chunk: int, sub: int) -> torch.Tensor:
    """Columns to lanes: codes [out, in] -> [tiles, chunks, 16 rows, 4 lanes, chunk/8 pairs, 2].

    A lane has sub/4 neighbouring columns of every `sub`.
    """
    out, n = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -n % chunk, 0, -out % TILE))
    tiles = codes.reshape(-1, TILE, codes.shape[1] // chunk, chunk // sub, 4, sub // 8, 2)
    return tiles.permute(0, 2, 1, 4, 3, 5, 6).flatten(4, 5)


def gather(lanes: torch.Tensor, sub: int, out: int, n: int) -> torch.Tensor:
    """Inverse of `spread`."""
    tiles = _split(lanes, 4, sub // 8).permute(0, 2, 1, 4, 3, 5, 6)
    return tiles.reshape(tiles.shape[0] * TILE, -1)[:out, :n]


def pack_fields(lanes: torch.Tensor, width: int) -> torch.Tensor:
    """One plane of `width` bits: [tiles, chunks, 16, 4, pairs, 2] -> u8[tiles, chunks, bytes].

    A pair's codes lie in the two halves of a 32-bit word, 16/width pairs to a word, the first lowest.
    Words come in vectors of at most 16 bytes a lane; all lanes' first vectors, then the second ones.
    """
    per = 16 // width
    halves = _split(lanes, 4, per).int() & ((1 << width) - 1)
    halves = (halves << torch.arange(0, 16, width, dtype=torch.int32, device=lanes.device).reshape(per, 1)).sum(
        -2, dtype=torch.int32
    )
    words = ((halves[..., 1] << 16) | halves[..., 0]).to(torch.int32)
    vectors = _split(words, 4, min(4, words.shape[4]))  # tiles, chunks, 16, 4, vector, word
    return vectors.permute(0, 1, 4, 2, 3, 5).contiguous().view(torch.uint8).flatten(2)


def unpack_fields(plane: torch.Tensor, width: int) -> torch.Tensor:
    """Inverse of `pack_fields`: u8[tiles, chunks, 16, 4, pairs, 2]."""
    words = plane.contiguous().view(torch.int32)
    lane = words.shape[2] // 64  # words of a lane
    vectors = words.reshape(*words.shape[:2], -1, 16, 4, min(4, lane))
    words = vectors.permute(0, 1, 3, 4, 2, 5).flatten(4)
    shifts = torch.arange(0, 16, width, dtype=torch.int32, device=plane.device)
    halves = torch.stack([words & 0xFFFF, (words >> 16) & 0xFFFF], -1)
    fields = (halves.unsqueeze(5) >> shifts.reshape(-1, 1)) & ((1 << width) - 1)
    return fields.flatten(4, 5).to(torch.uint8)


def pack_rows(params: torch.Tensor, per: int) -> torch.Tensor:
    """A row's bytes to its tiles: u8[out, blocks, bytes], `per` blocks to a chunk -> u8[tiles, chunks, 16·per·bytes]."""
    out, blocks, size = params.shape
    params = torch.nn.functional.pad(params, (0, 0, 0, -blocks % per, 0, -out % TILE))
    tiles = params.reshape(-1, TILE, params.shape[1] // per, per * size)
    return tiles.transpose(1, 2).flatten(2).contiguous()


def unpack_rows(plane: torch.Tensor, size: int, out: int, blocks: int) -> torch.Tensor:
    """Inverse of `pack_rows`."""
    tiles = _split(plane, 2, plane.shape[2] // TILE).transpose(1, 2)
    return tiles.reshape(tiles.shape[0] * TILE, -1, size)[:out, :blocks]
