"""Ids and fingerprints as arrays of fixed width, to sort and search by the million."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Keys = NDArray[np.bytes_]
"""16 bytes for each string: ids are as long as users make them, and a million Python strings are 90 MB."""


def keys(strings: pa.Array | pa.ChunkedArray | Sequence[str]) -> Keys:
    """A 16-byte key of each string: derived ids and fingerprints are 16 bytes in hex, the others are hashed."""
    if not isinstance(strings, pa.Array | pa.ChunkedArray):
        strings = pa.array(strings, pa.string())
    hexadecimal = pc.match_substring_regex(strings, r"\A[0-9a-f]{32}\z")
    texts = strings.to_pylist()
    if pc.all(hexadecimal, min_count=0).as_py():
        data = bytes.fromhex("".join(texts))
    else:
        data = b"".join(
            bytes.fromhex(text) if plain else hashlib.blake2b(text.encode(), digest_size=16).digest()
            for text, plain in zip(texts, hexadecimal.to_pylist(), strict=True)
        )
    return np.frombuffer(data, "S16")


def halves(of: Keys) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Keys as two numbers each, which sort as the keys do and much faster."""
    pairs = np.ascontiguousarray(of).view(">u8").reshape(-1, 2)
    return pairs[:, 0].astype(np.uint64), pairs[:, 1].astype(np.uint64)


def prints(fingerprints: pa.Array | pa.ChunkedArray | Sequence[str]) -> NDArray[np.uint64]:
    """8 bytes of each fingerprint: they are only ever compared under the same id."""
    return halves(keys(fingerprints))[0]


def newest(ids: Keys, recorded_at: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the latest record of every id is, in the order of the keys; of equally late ones the last."""
    high, low = halves(ids)
    order = np.lexsort((recorded_at, low, high))
    last = np.ones(len(order), bool)
    last[:-1] = (high[order[1:]] != high[order[:-1]]) | (low[order[1:]] != low[order[:-1]])
    return order[last]
