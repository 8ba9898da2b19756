"""Coded blocks between a pool and pinned memory: `CodedRows` for a GPU, which codes while the bus carries.

The bus is several times as slow as coding. So blocks travel in pieces: while one crosses, the next is coded, or the one
before it decoded. They are read and written where they lie in the pool, without a copy between::

    out    stream   choose  code 0  code 1  code 2  the model ...
           host            ^ the sizes, all at once: the only thing it waits for
           bus                    [   codes 0   ][   codes 1   ][   codes 2   ]

    back   bus      [   codes 0   ][   codes 1   ][   codes 2   ]
           stream                  decode 0       decode 1       decode 2  the model ...
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor

from fast._runner.staging import ALIGNMENT, Bus
from fast.kv_cache import lossless
from fast.kv_cache.lossless import choose_codes, launch_decode, launch_encode
from reference.kv_cache.coded_rows import WordLayout
from reference.kv_cache.lossless import WORD_FORMATS

PIECE_BYTES = 1 << 25  # of plain rows: two thirds of a millisecond on the bus, and far less to code


def codes_here(backend: Any) -> bool:
    """Whether a backend's coder is the one of `fast`: another's is called as the op that it is."""
    names = ("encode_lossless", "decode_lossless")
    return all(unwrap(getattr(backend, name)) is unwrap(getattr(lossless, name)) for name in names)


@dataclass(frozen=True)
class CodedBlocks:
    """Coded blocks in pinned memory, or on their way there: only the bus may read them.

    Attributes:
        codes: Of each block's leading words, in rows as long as the longest needs (and up to the next 16 bytes).
        others: The words that do not lead, as they are.
    """

    layout: WordLayout
    codes: Tensor  # uint8 [num_blocks, row_bytes]
    others: Tensor  # int16 [num_blocks, num_values, others_per_number]

    @property
    def nbytes(self) -> int:
        """What travels, and what the host keeps."""
        return self.codes.nbytes + self.others.nbytes

    def fetch(self, bus: Bus, host_rows: Sequence[int], pool: Tensor, block_ids: Tensor) -> None:
        """Queue the way of these rows into blocks of a pool, none of them twice."""
        numbers = _numbers(pool, self.layout)
        for piece in _pieces(pool, len(host_rows)):
            rows, ids = host_rows[piece], block_ids[piece]
            launch_decode(bus.fetch(self.codes, rows), numbers[:, :, -1], ids, WORD_FORMATS[self.layout.format])
            if self.others.numel():
                numbers[ids, :, :-1] = bus.fetch(self.others, rows)


class Leaving:
    """Blocks that are to leave a pool: how each will be coded is queued, for all of them, and not yet known here.

    Args:
        block_ids: On the device; one at least.
    """

    def __init__(self, pool: Tensor, layout: WordLayout, block_ids: Tensor):
        self._pool, self._layout, self._block_ids = pool, layout, block_ids
        self._numbers, self._format = _numbers(pool, layout), WORD_FORMATS[layout.format]
        self._chosen = choose_codes(self._numbers[:, :, -1], block_ids, self._format)

    def send(self, bus: Bus) -> CodedBlocks:
        """Wait for the choice, and so for what is queued before it; queue the rest."""
        longest = int(self._chosen.sizes.max())
        num_blocks, row_bytes = len(self._block_ids), -(-longest // ALIGNMENT) * ALIGNMENT
        codes = bus.on_host((num_blocks, row_bytes), torch.uint8)
        others = bus.on_host((num_blocks, *self._numbers[0, :, :-1].shape), torch.int16)
        for piece in _pieces(self._pool, num_blocks):
            ids = self._block_ids[piece]
            coded = self._pool.new_empty(len(ids), row_bytes)
            launch_encode(self._numbers[:, :, -1], ids, self._chosen.of(piece), coded, self._format)
            bus.send(coded, codes[piece])
            if others.numel():
                bus.send(self._numbers[ids, :, :-1], others[piece])
        return CodedBlocks(self._layout, codes, others)


def _numbers(pool: Tensor, layout: WordLayout) -> Tensor:
    """A pool as words of two bytes: ``[num_blocks, num_values, words_per_number]``."""
    return pool.view(torch.int16).unflatten(1, (-1, layout.words_per_number))


def _pieces(pool: Tensor, num_blocks: int) -> Iterator[slice]:
    """Of so many of its blocks."""
    step = max(PIECE_BYTES // pool.shape[1], 1)
    return (slice(first, min(first + step, num_blocks)) for first in range(0, num_blocks, step))
