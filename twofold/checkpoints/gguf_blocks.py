"""The types a GGUF stores tensors in, and what their blocks stand for.

A quantized row is a run of blocks. A block holds the codes of 32 weights (256 in the K-quants) and what turns them
back into numbers: a scale, and in some types a minimum. The K-quants have two levels: a block's weights fall into
groups, each with a small integer scale (and minimum) of its own, in units of the block's.

A block is written down here as a NumPy structure, byte for byte, and unpacked by shifting and masking: codes of 4
bits lie two a byte, those of 2 bits four a byte, and a code's top bits may lie in an array of their own.

Source: the block structures of ggml (ggml-common.h) and the arithmetic of its `dequantize_row_*`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Float32, UInt8
from numpy import ndarray as Array

CHUNK = 1 << 18  # weights unpacked at a time: what fits in a cache is unpacked twice as fast


@dataclass(frozen=True)
class BlockType:
    """One type: ``block_size`` weights are stored as one ``block``. A float type is a block of one."""

    name: str
    block_size: int
    block: np.dtype
    unpack: Callable[[np.ndarray], np.ndarray] | None = None  # blocks to floats [num_blocks, block_size]; None: floats

    def row_bytes(self, row_length: int) -> int:
        return row_length // self.block_size * self.block.itemsize

    def dequantize(self, rows: UInt8[Array, "num_rows row_bytes"]) -> Float32[Array, "num_rows row_length"]:
        """Rows of stored bytes as float32."""
        if self.unpack is None:
            return rows.view(self.block).astype(np.float32)
        blocks = rows.reshape(-1, self.block.itemsize).view(self.block).reshape(-1)
        out = np.empty((len(blocks), self.block_size), np.float32)
        step = CHUNK // self.block_size
        for start in range(0, len(blocks), step):
            out[start : start + step] = self.unpack(blocks[start : start + step])
        return out.reshape(len(rows), -1)


def _f32(column: np.ndarray) -> np.ndarray:
    """One number a block, as a column to multiply with."""
    return column.astype(np.float32)[:, None]


def _low_then_high(nibbles: np.ndarray) -> np.ndarray:
    """Codes of 4 bits, along the last axis: the low halves of all bytes first, then the high ones."""
    return np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=-1)


# --- one level: blocks of 32 ------------------------------------------------------------------------------------


def _q4_0(b: np.ndarray) -> np.ndarray:
    return _f32(b["scale"]) * (_low_then_high(b["codes"]).view(np.int8) - 8)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _f32(b["scale"]) * _low_then_high(b["codes"]) + _f32(b["min"])


def _codes_of_5(b: np.ndarray) -> np.ndarray:
    """The fifth bit of weight i is bit i of ``high``."""
    high = (b["high"][:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return _low_then_high(b["codes"]) | (high.astype(np.uint8) << 4)


def _q5_0(b: np.ndarray) -> np.ndarray:
    return _f32(b["scale"]) * (_codes_of_5(b).view(np.int8) - 16)


def _q5_1(b: np.ndarray) -> np.ndarray:
    return _f32(b["scale"]) * _codes_of_5(b) + _f32(b["min"])


def _q8_0(b: np.ndarray) -> np.ndarray:
    return _f32(b["scale"]) * b["codes"]


# --- two levels: blocks of 256 in groups of 16 or 32 ------------------------------------------------------------


def _in_groups(codes: np.ndarray, scales: np.ndarray, mins: np.ndarray | None = None) -> np.ndarray:
    """``scales * codes - mins``, a scale and a minimum for each group of a block's codes, in order."""
    num_blocks, num_groups = scales.shape
    values = scales[:, :, None] * codes.reshape(num_blocks, num_groups, -1)
    if mins is not None:
        values -= mins[:, :, None]
    return values.reshape(num_blocks, -1)


def _codes_of_2(packed: np.ndarray) -> np.ndarray:
    """Each half of a block is 32 bytes; a byte holds one code of each of the half's four runs of 32."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return ((packed.reshape(-1, 2, 1, 32) >> shifts) & 3).reshape(-1, 256)


def _nibble_runs(packed: np.ndarray) -> np.ndarray:
    """Each 32 bytes hold a run of 32 codes in their low halves and the next run in their high ones."""
    return _low_then_high(packed.reshape(-1, 4, 32)).reshape(-1, 256)


def _scales_and_mins(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of 6 bits in 12 bytes: 0 to 3 whole, the top bits of 4 to 7 above them."""
    first, second, third = (b["scales"][:, i : i + 4] for i in (0, 4, 8))
    scales = np.concatenate([first & 63, (third & 0x0F) | (first >> 6 << 4)], axis=1)
    mins = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return _f32(b["scale"]) * scales, _f32(b["min"]) * mins


def _q2_k(b: np.ndarray) -> np.ndarray:
    scales, mins = _f32(b["scale"]) * (b["scales"] & 0x0F), _f32(b["min"]) * (b["scales"] >> 4)
    return _in_groups(_codes_of_2(b["codes"]), scales, mins)


def _q3_k(b: np.ndarray) -> np.ndarray:
    """Sixteen scales of 6 bits: their low halves in 8 bytes, the top bits of four of them in each of 4 more."""
    top = (b["scales"][:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    scales = _low_then_high(b["scales"][:, :8]) | (top.reshape(-1, 16) << 4)
    high = (b["high"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # bit r of a byte: run r of 32
    codes = _codes_of_2(b["codes"]) | (high.reshape(-1, 256) << 2)
    return _in_groups(codes.view(np.int8) - 4, _f32(b["scale"]) * (scales.view(np.int8) - 32))


def _q4_k(b: np.ndarray) -> np.ndarray:
    return _in_groups(_nibble_runs(b["codes"]), *_scales_and_mins(b))


def _q5_k(b: np.ndarray) -> np.ndarray:
    high = (b["high"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1  # bit r of a byte: run r of 32
    return _in_groups(_nibble_runs(b["codes"]) | (high.reshape(-1, 256) << 4), *_scales_and_mins(b))


def _q6_k(b: np.ndarray) -> np.ndarray:
    """Each half of a block: 64 bytes of low nibbles in two runs of 32 and then two more, 32 bytes of top bits."""
    low = _low_then_high(b["codes"].reshape(-1, 2, 64)).reshape(-1, 256)
    codes = low | (_codes_of_2(b["high"]) << 4)
    return _in_groups(codes.view(np.int8) - 32, _f32(b["scale"]) * b["scales"])


def _q8_k(b: np.ndarray) -> np.ndarray:
    return _f32(b["scale"]) * b["codes"]


def _block(*fields: tuple) -> np.dtype:
    return np.dtype(list(fields))


_SCALE, _MIN = ("scale", "<f2"), ("min", "<f2")

BLOCK_TYPES: dict[int, BlockType] = {  # by ggml's number
    0: BlockType("F32", 1, np.dtype("<f4")),
    1: BlockType("F16", 1, np.dtype("<f2")),
    2: BlockType("Q4_0", 32, _block(_SCALE, ("codes", "u1", 16)), _q4_0),
    3: BlockType("Q4_1", 32, _block(_SCALE, _MIN, ("codes", "u1", 16)), _q4_1),
    6: BlockType("Q5_0", 32, _block(_SCALE, ("high", "<u4"), ("codes", "u1", 16)), _q5_0),
    7: BlockType("Q5_1", 32, _block(_SCALE, _MIN, ("high", "<u4"), ("codes", "u1", 16)), _q5_1),
    8: BlockType("Q8_0", 32, _block(_SCALE, ("codes", "i1", 32)), _q8_0),
    10: BlockType("Q2_K", 256, _block(("scales", "u1", 16), ("codes", "u1", 64), _SCALE, _MIN), _q2_k),
    11: BlockType("Q3_K", 256, _block(("high", "u1", 32), ("codes", "u1", 64), ("scales", "u1", 12), _SCALE), _q3_k),
    12: BlockType("Q4_K", 256, _block(_SCALE, _MIN, ("scales", "u1", 12), ("codes", "u1", 128)), _q4_k),
    13: BlockType(
        "Q5_K", 256, _block(_SCALE, _MIN, ("scales", "u1", 12), ("high", "u1", 32), ("codes", "u1", 128)), _q5_k
    ),
    14: BlockType("Q6_K", 256, _block(("codes", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), _SCALE), _q6_k),
    15: BlockType("Q8_K", 256, _block(("scale", "<f4"), ("codes", "i1", 256), ("sums", "<i2", 16)), _q8_k),
    30: BlockType("BF16", 1, np.dtype(ml_dtypes.bfloat16)),
}  # fmt: skip
