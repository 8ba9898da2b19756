"""The formats of the KV cache: which arrays a block holds, which ops serve them, and what it all costs.

One table, shared by every command. Adding a format is adding a row, and the ops that it names.

Of two pools (KIVI) the first is the quantized one, the second the window's; the ops take the window's arrays, slots
and tables first.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd, prod

ALIGNMENT = 64
"""Bytes. Every array of a block begins at a multiple of it: a CPU's cache line, two of the sectors a GPU fetches, and
enough for any vector load."""

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1, "uint8": 1,
}  # fmt: skip

MODEL_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class BlockShape:
    """What a format needs to know of a model to say which arrays a block holds, for one layer."""

    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # the model's, for what is kept as it is computed


@dataclass(frozen=True)
class ArraySpec:
    """One array of a block and layer: its shape behind ``num_blocks``, and its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def aligned_bytes(self) -> int:
        """From where it begins to where the next one does."""
        return -(-self.num_bytes // ALIGNMENT) * ALIGNMENT


Pools = tuple[tuple[ArraySpec, ...], ...]  # the arrays of each pool, in the order in which the ops take them


@dataclass(frozen=True)
class KVFormat:
    """One row of the table.

    Attributes:
        window: KIVI: queries read in full precision what is fewer than so many tokens back, and what is not sealed yet:
            with 0 that alone. It means a second pool of window blocks. None: the format has neither.
        bits: Stored for each value, its share of scales and zeros left out (`bytes_per_token` counts everything).
            0: as many as the model's dtype.
        group_size: Values that share a scale and a zero: along a head, and for KIVI's keys along a channel. Where it
            does not divide that length, the greatest common divisor of the two does. 0: no groups.
        layout: From the format and a `BlockShape` to the arrays of each pool.
        write_op: Takes k, v, the arrays, the slots.
        attend_op: Takes q, the arrays, the block tables, the lengths.
        fused_op: Norms, rotates and writes in one; None where that takes the parts.
    """

    name: str  # "auto" (the model's dtype), "bfloat16", "float16", "float32", "int8", "fp8", "int4", "kivi4", "kivi2"
    summary: str
    window: int | None = None
    bits: int = 0
    group_size: int = 0
    layout: Callable[["KVFormat", BlockShape], Pools] | None = None  # None: "auto", until it is resolved
    write_op: str = ""
    attend_op: str = ""
    fused_op: str | None = None

    def with_window(self, window: int | None) -> "KVFormat":
        """This format with another window; None leaves its own. Raises ValueError for a format that has none."""
        if window is None:
            return self
        if self.window is None:
            kivi = ", ".join(name for name, format in KV_FORMATS.items() if format.window is not None)
            raise ValueError(f"KV format {self.name} has no window (got {window}); those that have one: {kivi}")
        return replace(self, window=window)

    @property
    def kept(self) -> int:
        """Tokens whose window blocks the next query needs: at least its own, which is written there before it is
        sealed, however small the window."""
        return max(1, self.window or 0)

    def window_start(self, next_position: int) -> int:
        """Groups that end at or before this position are read quantized by every query from ``next_position`` on.

        What to give to `BlockTable.release_before` for the window's table; ``next_position`` must be one that no
        truncation undoes. (A model's own sliding window ends in the same place: the first key that is still seen.)
        """
        return max(0, next_position + 1 - self.kept)

    def tail_blocks(self, block_size: int) -> int:
        """Window blocks which the query right after a prefix of full blocks reads: ``tail`` for `match_pools`."""
        return -(-(self.kept - 1) // block_size)

    def window_blocks(
        self, *, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, lookahead: int = 0
    ) -> int:
        """Window blocks that cannot run out: those each sequence keeps, and those that the steps in flight fill."""
        if self.window is None:
            return 0
        kept = self.tail_blocks(block_size) + 2  # a window may begin within a block, and a chunk end within another
        return max_num_seqs * kept + (1 + lookahead) * -(-max_num_batched_tokens // block_size)


def _plain_layout(format: KVFormat, shape: BlockShape) -> Pools:
    """Numbers in the dtype that gives the format its name."""
    per_token = (shape.block_size, shape.num_kv_heads, shape.head_dim)
    return ((ArraySpec("k_cache", per_token, format.name), ArraySpec("v_cache", per_token, format.name)),)


def _scaled_layout(codes: str) -> Callable[[KVFormat, BlockShape], Pools]:
    """Codes of that dtype, and a scale for each token and head."""

    def layout(format: KVFormat, shape: BlockShape) -> Pools:
        heads = (shape.block_size, shape.num_kv_heads)
        arrays = (
            ArraySpec("k_cache", (*heads, shape.head_dim), codes),
            ArraySpec("v_cache", (*heads, shape.head_dim), codes),
            ArraySpec("k_scale", heads, "float32"),
            ArraySpec("v_scale", heads, "float32"),
        )
        return (arrays,)

    return layout


def _grouped_layout(format: KVFormat, shape: BlockShape) -> Pools:
    """Packed codes; a scale and a zero for each group along a head."""
    packed, groups = _packed_heads(format, shape), _head_groups(format, shape)
    arrays = (
        ArraySpec("k_cache", packed, "uint8"),
        ArraySpec("v_cache", packed, "uint8"),
        ArraySpec("k_scale", groups, "float16"),
        ArraySpec("k_zero", groups, "float16"),
        ArraySpec("v_scale", groups, "float16"),
        ArraySpec("v_zero", groups, "float16"),
    )
    return (arrays,)


def _kivi_layout(format: KVFormat, shape: BlockShape) -> Pools:
    """Packed codes; a scale and a zero for each channel over a group of keys, and for each group of a value's
    channels. The window: k and v as the model computes them."""
    if format.window is None or format.window < 0:
        raise ValueError(f"KV format {format.name}: window: expected at least 0 tokens, got {format.window}")
    packed, value_groups = _packed_heads(format, shape), _head_groups(format, shape)
    per_token = (shape.block_size, shape.num_kv_heads, shape.head_dim)
    key_groups = (shape.block_size // gcd(format.group_size, shape.block_size), shape.num_kv_heads, shape.head_dim)
    quantized = (
        ArraySpec("k_cache", packed, "uint8"),
        ArraySpec("v_cache", packed, "uint8"),
        ArraySpec("k_scale", key_groups, "float16"),
        ArraySpec("k_zero", key_groups, "float16"),
        ArraySpec("v_scale", value_groups, "float16"),
        ArraySpec("v_zero", value_groups, "float16"),
    )
    return quantized, (ArraySpec("k_window", per_token, shape.dtype), ArraySpec("v_window", per_token, shape.dtype))


def _packed_heads(format: KVFormat, shape: BlockShape) -> tuple[int, int, int]:
    codes_per_byte = 8 // format.bits
    if shape.head_dim % codes_per_byte:
        expected = f"a multiple of {codes_per_byte}"
        raise ValueError(f"KV format {format.name}: head_dim: expected {expected}, got {shape.head_dim}")
    return shape.block_size, shape.num_kv_heads, shape.head_dim // codes_per_byte


def _head_groups(format: KVFormat, shape: BlockShape) -> tuple[int, int, int]:
    return shape.block_size, shape.num_kv_heads, shape.head_dim // gcd(format.group_size, shape.head_dim)


def _plain(dtype: str, summary: str) -> KVFormat:
    return KVFormat(
        dtype, summary, bits=8 * ITEM_BYTES[dtype], layout=_plain_layout,
        write_op="write_kv", attend_op="paged_attention", fused_op="rotary_write_kv",
    )  # fmt: skip


def _scaled(name: str, codes: str, summary: str) -> KVFormat:
    return KVFormat(
        name, summary, bits=8, layout=_scaled_layout(codes),
        write_op=f"write_kv_{name}", attend_op=f"paged_attention_{name}",
    )  # fmt: skip


def _kivi(bits: int, summary: str) -> KVFormat:
    return KVFormat(
        f"kivi{bits}", summary, window=128, bits=bits, group_size=32, layout=_kivi_layout,
        write_op="write_kv_kivi", attend_op="paged_attention_kivi",
    )  # fmt: skip


_TABLE = (
    KVFormat("auto", "As the model computes: its own dtype, nothing lost."),
    _plain("float32", "Four bytes a value: exact for every model here."),
    _plain("float16", "Two bytes a value: 11 bits of precision, and nothing beyond 65504."),
    _plain("bfloat16", "Two bytes a value: the range of float32, 8 bits of precision."),
    _scaled("int8", "int8", "One byte a value: -127 to 127, with a scale for each token and head."),
    _scaled("fp8", "float8_e4m3fn", "One byte a value: e4m3, with a scale for each token and head; kind to outliers."),
    KVFormat(
        "int4", "Half a byte a value: 16 steps from least to greatest, in groups of 32 along the head.",
        bits=4, group_size=32, layout=_grouped_layout, write_op="write_kv_int4", attend_op="paged_attention_int4",
    ),
    _kivi(4, "Half a byte a value once it is 128 tokens back (full precision until then): keys by channel."),
    _kivi(2, "A quarter of a byte once it is 128 tokens back, as in kivi4: the smallest cache here."),
)  # fmt: skip

KV_FORMATS: dict[str, KVFormat] = {format.name: format for format in _TABLE}
"""Every format by name. ``KV_FORMATS["kivi2"].with_window(32)`` makes another of the same kind."""


def resolve_format(format: KVFormat | str, dtype: str) -> KVFormat:
    """The format of that name for a model in ``dtype``, which is what "auto" stands for."""
    if dtype not in MODEL_DTYPES:
        raise ValueError(f"KV cache: dtype: expected one of {', '.join(MODEL_DTYPES)}, got {dtype!r}")
    if isinstance(format, str) and format not in KV_FORMATS:
        raise ValueError(f"KV cache: format: expected one of {', '.join(KV_FORMATS)}, got {format!r}")
    found = KV_FORMATS[format] if isinstance(format, str) else format
    if found.layout is None:
        return KV_FORMATS.get(dtype) or _plain(dtype, KV_FORMATS["auto"].summary)
    return found


def block_layout(
    format: KVFormat | str, *, num_kv_heads: int, head_dim: int, block_size: int, dtype: str = "float32"
) -> Pools:
    """The arrays which one layer of one block has, for each pool. Raises ValueError for sizes no block can have."""
    for name, size in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim), ("block_size", block_size)):
        if size < 1:
            raise ValueError(f"KV cache: {name}: expected at least 1, got {size}")
    resolved = resolve_format(format, dtype)
    assert resolved.layout is not None
    return resolved.layout(resolved, BlockShape(block_size, num_kv_heads, head_dim, dtype))


def block_bytes(
    format: KVFormat | str,
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: str = "float32",
) -> tuple[int, ...]:
    """Bytes of one block, all layers and the alignment included, for each pool."""
    pools = block_layout(format, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
    return tuple(num_layers * sum(spec.aligned_bytes for spec in specs) for specs in pools)


def bytes_per_token(
    format: KVFormat | str,
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: str = "float32",
) -> float:
    """What a token costs in all layers: a block's bytes over its tokens. Its copy in a window is not counted.

    Example:
        >>> smollm2 = {"num_layers": 30, "num_kv_heads": 3, "head_dim": 64, "block_size": 16}
        >>> [bytes_per_token(format, **smollm2) for format in ("float32", "int8", "int4", "kivi2")]
        [46080.0, 12240.0, 7200.0, 5040.0]
    """
    sizes = block_bytes(
        format, num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype
    )
    return sizes[0] / block_size


def blocks_for(
    budget_bytes: int,
    format: KVFormat | str,
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: str = "float32",
    num_window_blocks: int = 0,
) -> int:
    """How many blocks fit into ``budget_bytes`` beside the window's. Raises ValueError if not even one does."""
    sizes = block_bytes(
        format, num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype
    )
    left = budget_bytes - sum(num_window_blocks * size for size in sizes[1:])
    if left < sizes[0]:
        raise ValueError(f"KV cache: expected room for a block of {sizes[0]} bytes, got {left} of {budget_bytes} bytes")
    return left // sizes[0]
