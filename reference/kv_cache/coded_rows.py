"""Blocks outside the pool, coded: what a swap moves and the host keeps is smaller, and comes back bit for bit.

A block that leaves the pool is a row of bytes. Where the cache holds floats, most of a row are numbers whose exponents
say the same thing again and again, and `lossless` makes them smaller. So a row is coded where it lies, before it
travels, and decoded where it arrives. (Preemption by swapping is a wager that moving blocks is cheaper than computing
them again; what is moved is what it costs.)

`lossless` codes words of two bytes. A row of bfloat16 or float16 is one as it stands. Of a wider float only the leading
word has the exponent, laid out, in float32, as a bfloat16 is; the words behind it are noise and stay as they are::

    float32    s eeeeeeee fffffff | ffffffffffffffff       (its leading word is the second of the two: little-endian)
               coded as bfloat16  | as it is

Rows of codes (int8, fp8, int4, KIVI's first pool) have lost their exponents already: they are not coded, nor do they
grow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8, UInt16
from numpy import ndarray as Array

from reference.kv_cache.formats import ArraySpec
from reference.kv_cache.lossless import HEADER_BYTES


class WordLayout(NamedTuple):
    """How a row's numbers are words of two bytes.

    Attributes:
        words_per_number: Their last one leads.
        format: What `encode_lossless` calls the leading word.
    """

    words_per_number: int
    format: str


WORD_LAYOUTS = {
    "float64": WordLayout(4, "bfloat16"),  # three bits of its exponent count as fraction: they vary anyway
    "float32": WordLayout(2, "bfloat16"),
    "bfloat16": WordLayout(1, "bfloat16"),
    "float16": WordLayout(1, "float16"),
}


def word_layout(specs: Sequence[ArraySpec]) -> WordLayout | None:
    """Of rows in which these arrays lie; None where they are not all floats of one dtype.

    Example:
        >>> word_layout([ArraySpec("k_cache", (16, 2, 64), "float32"), ArraySpec("v_cache", (16, 2, 64), "float32")])
        WordLayout(words_per_number=2, format='bfloat16')
    """
    dtypes = {spec.dtype for spec in specs}
    return WORD_LAYOUTS.get(dtypes.pop()) if len(dtypes) == 1 else None


@dataclass(frozen=True)
class CodedRows:
    """Rows of a pool on the host, each coded by itself. Indexed by a list it gives those rows, as an array would.

    Attributes:
        codes: Of each row's leading words, in rows as long as the longest needs; never longer than the words and a
            header.
        sizes: Bytes that each row's code has; what is behind them means nothing.
        others: The words that do not lead, as they are.

    Example:
        >>> import reference
        >>> numbers = np.linspace(1, 2, 64, dtype=np.float32).reshape(2, 32)
        >>> rows = CodedRows.encode(numbers.view(np.uint8), WORD_LAYOUTS["float32"], reference)
        >>> rows.nbytes, numbers.nbytes
        (210, 256)
        >>> bool((rows[[1]].decode(reference).view(np.float32) == numbers[1]).all())
        True
    """

    layout: WordLayout
    codes: UInt8[Array, "num_rows longest"]
    sizes: Int64[Array, " num_rows"]
    others: UInt16[Array, "num_rows num_values others_per_number"]

    @classmethod
    def encode(cls, rows: Any, layout: WordLayout, backend: ModuleType | Any) -> "CodedRows":
        """Code a backend's rows of bytes, there, and bring them to the host."""
        words = backend.bitcast(rows, "uint16")
        numbers = words.reshape(len(rows), words.shape[1] // layout.words_per_number, layout.words_per_number)
        codes, sizes = backend.encode_lossless(numbers[:, :, -1], format=layout.format)
        sizes = backend.to_host(sizes)
        codes = backend.to_host(codes[:, : int(sizes.max(initial=0))])  # what none of them needs does not travel
        return cls(layout, np.ascontiguousarray(codes), sizes, backend.to_host(numbers[:, :, :-1]).copy())

    def decode(self, backend: ModuleType | Any, *, device: str | None = None) -> Any:
        """The rows of bytes, as the backend's array."""
        num_rows, num_values, _ = self.others.shape
        codes = backend.empty((num_rows, HEADER_BYTES + 2 * num_values), dtype="uint8", device=device)
        codes[:, : self.codes.shape[1]] = backend.from_host(self.codes, device=device)
        sizes = backend.from_host(self.sizes, device=device)
        leading = backend.decode_lossless(codes, sizes, num_values=num_values, format=self.layout.format)

        words_per_number = self.layout.words_per_number
        rows = backend.empty((num_rows, 2 * words_per_number * num_values), dtype="uint8", device=device)
        numbers = backend.bitcast(rows, "uint16").reshape(num_rows, num_values, words_per_number)
        numbers[:, :, -1] = leading
        if words_per_number > 1:
            numbers[:, :, :-1] = backend.from_host(self.others, device=device)
        return rows

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Sequence[int]) -> "CodedRows":
        which = list(rows)
        if which == [*range(len(self))]:
            return self
        return replace(self, codes=self.codes[which], sizes=self.sizes[which], others=self.others[which])

    @property
    def nbytes(self) -> int:
        """What travels, and what the host keeps."""
        return self.codes.nbytes + self.others.nbytes
