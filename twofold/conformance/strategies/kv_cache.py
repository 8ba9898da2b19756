"""Drawn inputs of the KV cache's ops: layouts, tokens to write, and batches whose blocks are shuffled, shared, ragged.

What is drawn is structure (lengths, ids, kinds of values); the numbers come from a drawn seed. Edges come on purpose:
no tokens, one token, blocks of one token, padded sequences, windows of 0 and beyond the end, rows of zeros, ties,
values beyond float16, and NaN where nobody has a slot.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from numpy import ndarray as Array

from reference.numerics.arrays import dtype_named
from twofold.conformance.strategies.attention import report

FORMATS = ("plain", "int8", "fp8", "int4", "kivi")
FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


# ---- what a cache is made of ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The sizes of one layer's cache in some format."""

    format: str
    num_blocks: int
    num_window_blocks: int  # KIVI's second pool
    block_size: int
    num_kv_heads: int
    head_dim: int
    num_groups: int  # of a head that share a scale (int4, KIVI's values)
    group_size: int  # tokens of a group of KIVI's keys
    bits: int  # KIVI
    dtype: str  # of the plain cache and of KIVI's window

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every array, in the order in which the ops take them."""
        slots = (self.num_blocks, self.block_size, self.num_kv_heads)
        window = (self.num_window_blocks, *slots[1:], self.head_dim)
        key_groups = (self.num_blocks, self.block_size // self.group_size, self.num_kv_heads, self.head_dim)
        codes = {
            "plain": (self.head_dim, self.dtype),
            "int8": (self.head_dim, "int8"),
            "fp8": (self.head_dim, "float8_e4m3fn"),
            "int4": (self.head_dim // 2, "uint8"),
            "kivi": (self.head_dim * self.bits // 8, "uint8"),
        }
        size, dtype = codes[self.format]
        caches = dict.fromkeys(("k_cache", "v_cache"), ((*slots, size), dtype))
        per_head = dict.fromkeys(("k_scale", "v_scale"), (slots, "float32"))
        grouped = dict.fromkeys(("k_scale", "k_zero", "v_scale", "v_zero"), ((*slots, self.num_groups), "float16"))
        keys = dict.fromkeys(("k_scale", "k_zero"), (key_groups, "float16"))
        scales = {"plain": {}, "int8": per_head, "fp8": per_head, "int4": grouped, "kivi": grouped | keys}
        windows = {name: (window, self.dtype) for name in ("k_window", "v_window") if self.format == "kivi"}
        return windows | caches | scales[self.format]


@cache
def one_of(*options: Any) -> st.SearchStrategy:
    """``sampled_from``, made once: making strategies takes longer than drawing from them."""
    return st.sampled_from(options)


@cache
def divisors(number: int) -> tuple[int, ...]:
    return tuple(n for n in range(1, number + 1) if number % n == 0)


@st.composite
def layouts(draw, format: str, num_blocks: int | None = None) -> Layout:
    """Small caches: blocks from one token up, sizes that are no powers of two, every bit width."""
    bits = draw(one_of(4, 2), label="bits") if format == "kivi" else 4
    block_size = draw(one_of(1, 2, 3, 4, 6, 8), label="block_size")
    head_dim = draw(one_of(4, 8, 12) if bits == 2 else one_of(2, 4, 8, 12), label="head_dim")
    size = st.integers(1, 6)
    return Layout(
        format,
        num_blocks=draw(size, label="num_blocks") if num_blocks is None else num_blocks,
        num_window_blocks=0,
        block_size=block_size,
        num_kv_heads=draw(one_of(1, 2, 3), label="num_kv_heads"),
        head_dim=head_dim,
        num_groups=draw(one_of(*divisors(head_dim)[:3]), label="num_groups") if format in ("int4", "kivi") else 1,
        group_size=draw(one_of(*divisors(block_size)), label="group_size") if format == "kivi" else 1,
        bits=bits,
        dtype=draw(one_of(*FLOATS), label="cache dtype") if format in ("plain", "kivi") else "float32",
    )


def garbage(layout: Layout, seed: int) -> dict[str, Array]:
    """What a pool holds before anybody writes: seed 0 is NaN wherever that can be said, other seeds are random bytes.

    Each array is column 1 of three, ``big[:, 1]``: a view with gaps, as a layer's arrays are views of the pool.
    """
    rng = np.random.default_rng(seed)
    pools = {}
    for name, (shape, dtype) in layout.arrays.items():
        numbers = dtype_named(dtype)
        big = (shape[0], 3, *shape[1:])
        noise = rng.integers(0, 256, (*big[:-1], big[-1] * numbers.itemsize), np.uint8).view(numbers)
        has_nan = seed == 0 and dtype not in ("int8", "uint8")
        pools[name] = np.full(big, np.nan, numbers) if has_nan else noise
    return pools


# ---- values -----------------------------------------------------------------------------------------------------

ORDINARY = ("normal", "outlier channels", "constant rows", "zeros", "ties", "offset")
EXTREME = ("tiny", "subnormal scales", "huge", "beyond float16", "one huge")


def values(rng: np.random.Generator, shape: tuple[int, ...], kind: str, dtype: str) -> Array:
    """Finite numbers of a kind, [..., head_dim]."""
    x = rng.normal(size=shape)
    if kind == "outlier channels":
        x = x * np.where(rng.random(shape[-1]) < 0.3, 60.0, 1.0)
    elif kind == "constant rows":
        x = np.broadcast_to(x[..., :1], shape)
    elif kind == "zeros":
        x = x * (rng.random(shape[:-1]) < 0.5)[..., None]
    elif (
        kind == "ties"
    ):  # steps of 1 from a zero of 0, or of 1 / 16 with e4m3's largest as the largest: halves are ties
        x = np.floor(rng.random(shape) * 31) / 2
        x[..., 0], x[..., -1] = rng.choice([15.0, 127.0, 448.0]), 0.0
    elif kind == "offset":
        x = 40.0 + x / 50
    elif kind in ("tiny", "subnormal scales", "huge", "beyond float16"):
        x = x * {"tiny": 1e-30, "subnormal scales": 1e-37, "huge": 3e37, "beyond float16": 1e5}[kind]
    elif kind == "one huge":
        x.reshape(-1)[: min(x.size, 1)] = 1e30
    numbers = dtype_named(dtype)
    largest = float(ml_dtypes.finfo(numbers).max)
    return np.clip(x, -largest, largest).astype(numbers)


# ---- tokens to write --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """New tokens and their slots. ``k`` and ``v`` are slices of one packed array, as a qkv projection makes them."""

    layout: Layout
    kind: str
    packed: Array  # [num_tokens, 2 * num_kv_heads, head_dim]; NaN where the slot is -1
    slot_mapping: Array
    window_slot_mapping: Array | None = None

    @property
    def k(self) -> Array:
        return self.packed[:, : self.layout.num_kv_heads]

    @property
    def v(self) -> Array:
        return self.packed[:, self.layout.num_kv_heads :]


@st.composite
def tokens(draw, format: str, *, dtypes: tuple[str, ...] = tuple(FLOATS)) -> Tokens:
    """Tokens for slots anywhere in the cache, some of them skipped. (KIVI's come in order: see `batches`.)"""
    layout = draw(layouts(format))
    num_slots = layout.num_blocks * layout.block_size
    num_tokens = draw(st.integers(0, min(num_slots, 9)), label="num_tokens")
    kind = draw(one_of(*ORDINARY, *EXTREME), label="kind")
    dtype = draw(one_of(*dtypes), label="dtype of k and v")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    slots = rng.permutation(num_slots)[:num_tokens].astype(np.int64)
    slots[rng.random(num_tokens) < draw(one_of(0.0, 0.3, 1.0), label="share skipped")] = -1
    packed = values(rng, (num_tokens, 2 * layout.num_kv_heads, layout.head_dim), kind, dtype)
    packed[slots < 0] = np.nan
    return Tokens(layout, kind, packed, slots)


# ---- batches of sequences ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Sequences in a paged cache, and a step's queries: the last tokens of each."""

    layout: Layout
    kind: str
    seq_lens: Array
    query_lens: Array
    block_table: Array
    window_block_table: Array
    packed: list[Array]  # of each sequence, [seq_len, 2 * num_kv_heads, head_dim]
    shared: int  # the first tokens of sequence 1 that are those of sequence 0, in the same blocks
    q: Array  # [sum(query_lens), num_heads, head_dim]
    options: dict[str, Any] = field(default_factory=dict)  # of the attention
    features: frozenset[str] = frozenset()  # what it has; see `strategies.attention`

    @property
    def cu_seqlens_q(self) -> Array:
        return np.concatenate([[0], np.cumsum(self.query_lens)]).astype(np.int32)

    @property
    def num_sequences(self) -> int:
        return len(self.seq_lens)

    def tokens(self, spans: list[tuple[int, int, int]]) -> Tokens:
        """The tokens [first, end) of each (sequence, first, end), one after the other, with their slots."""
        places = [(seq, position) for seq, first, end in spans for position in range(first, end)]
        seqs, positions = np.array(places, np.int64).reshape(-1, 2).T
        block_size = self.layout.block_size
        slots = (
            table[seqs, positions // block_size] * np.int64(block_size) + positions % block_size
            for table in (self.block_table, self.window_block_table)
        )
        width = (2 * self.layout.num_kv_heads, self.layout.head_dim)
        packed = [self.packed[seq][first:end] for seq, first, end in spans]
        empty = np.zeros((0, *width), self.q.dtype)
        return Tokens(self.layout, self.kind, np.concatenate([empty, *packed]), next(slots), next(slots))

    @property
    def everything(self) -> Tokens:
        """All tokens of all sequences, shared ones once."""
        return self.tokens([(s, self.shared if s == 1 else 0, int(n)) for s, n in enumerate(self.seq_lens)])


@cache
def lengths(block_size: int) -> st.SearchStrategy[list[int]]:
    """Of up to three sequences: none, ragged, full blocks, padded ones."""
    length = st.one_of(st.integers(0, 3 * block_size + 1), one_of(1, block_size, 2 * block_size))
    return st.lists(length, min_size=0, max_size=3)


@cache
def windows(group_size: int, longest: int) -> st.SearchStrategy[int]:
    """KIVI's windows: none, around a group, anywhere, and beyond the longest sequence."""
    around = (0, 1, group_size - 1, group_size, group_size + 1, longest + 5)
    return st.one_of(one_of(*around), st.integers(0, longest + 1))


@st.composite
def batches(
    draw,
    format: str,
    *,
    options: bool = True,
    share: bool = True,
    whole: bool = False,
    layout: Layout | None = None,
    most_queries: int | None = None,
    kind: str | None = None,
) -> Batch:
    """A batch of up to three sequences, among them padded ones and decodes, in shuffled and perhaps shared blocks.

    Args:
        options: Draw scale, sliding window, sinks and cap as well.
        share: Let two sequences share blocks.
        whole: Every token is a query.
        layout: The cache's, whose dtype is then that of q, k and v as well (None: any).
        most_queries: A sequence has at most so many.
        kind: Of the values that are stored (None: any ordinary one).
    """
    given = layout
    layout = draw(layouts(format, num_blocks=0)) if given is None else given
    block_size = layout.block_size
    seq_lens = np.array(draw(lengths(block_size), label="seq_lens"), np.int32)
    shared = 0
    if share and len(seq_lens) > 1 and draw(one_of(True, True, False), label="share a prefix"):
        shared = int(seq_lens[0]) // block_size * block_size
        seq_lens[1] = shared + min(seq_lens[1], block_size)  # its own tokens follow, if there are any
    queries = [n if whole else draw(one_of(1, n, (n + 1) // 2), label="queries") for n in seq_lens.tolist()]
    if most_queries is not None:
        queries = [min(most_queries, n) for n in queries]
    query_lens = np.array(queries, np.int32)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    kind = draw(one_of(*ORDINARY), label="kind") if kind is None else kind
    dtype = draw(one_of(*FLOATS), label="dtype of q, k and v") if given is None else given.dtype

    width = (2 * layout.num_kv_heads, layout.head_dim)
    packed = [values(rng, (int(n), *width), kind, dtype) for n in seq_lens]
    if shared:
        packed[1][:shared] = packed[0][:shared]

    blocks_of = -(-seq_lens // block_size)
    spare = draw(st.integers(0, 2), label="spare blocks")
    padding = draw(st.integers(0, 2), label="padding of the table")
    num_blocks = int(blocks_of.sum()) + spare
    layout = replace(layout, num_blocks=num_blocks, num_window_blocks=num_blocks + 1)
    tables = [shuffled_table(rng, blocks_of, blocks, padding) for blocks in (num_blocks, num_blocks + 1)]
    for table in tables if shared else ():
        table[1, : shared // block_size] = table[0, : shared // block_size]

    num_heads = layout.num_kv_heads * draw(one_of(1, 2, 3), label="queries a head")
    q = values(rng, (sum(queries), num_heads, layout.head_dim), "normal", dtype)
    needle = bool(sum(queries)) and draw(one_of(True, True, False), label="needle")
    if needle:
        draw(needles(q, queries, packed, layout))
    chosen = draw(attention_options(num_heads, rng, dtype)) if options else {}
    if format == "kivi":
        chosen["window"] = draw(windows(layout.group_size, int(seq_lens.max(initial=0))), label="window")
    features = report(
        {
            "two or more sequences": len(seq_lens) > 1,
            "ragged tail": bool((seq_lens % block_size).any()),
            "shared blocks": shared > 0,
            "grouped heads": num_heads > layout.num_kv_heads,
            "sliding window": "sliding_window" in chosen,
            "poisoned slots": num_blocks * block_size > seq_lens.sum() - shared,
            "needle": needle,
            "keys of both kinds": _both_kinds(layout, seq_lens, query_lens, chosen.get("window")),
        }
    )
    return Batch(layout, kind, seq_lens, query_lens, tables[0], tables[1], packed, shared, q, chosen, features)


def shuffled_table(rng: np.random.Generator, blocks_of: Array, num_blocks: int, padding: int = 0) -> Array:
    """A table that gives each sequence so many blocks of a pool, in no order; -1 where it has none."""
    order = rng.permutation(num_blocks)
    table = np.full((len(blocks_of), int(blocks_of.max(initial=0)) + padding), -1, np.int32)
    for row, count, start in zip(table, blocks_of, np.cumsum([0, *blocks_of])):
        row[:count] = order[start : start + count]
    return table


def _both_kinds(layout: Layout, seq_lens: Array, query_lens: Array, window: int | None) -> bool:
    """Does a query read some keys quantized and others in full?"""
    return window is not None and bool((seq_lens[query_lens > 0] - window >= layout.group_size).any() and window > 0)


@st.composite
def needles(draw, q: Array, queries: list[int], packed: list[Array], layout: Layout) -> None:
    """Turn all queries of a sequence towards one key at an edge: of the sequence, or of a block or group, or beside it.
    Whoever drops or misplaces that key gets something else entirely."""
    seq = draw(st.integers(0, len(packed) - 1), label="needle's sequence")
    length, size = len(packed[seq]), max(layout.group_size, layout.block_size // 2)
    edges = {edge + step for edge in (*range(0, length, size), length - 1) for step in (-1, 0, 1)}
    position = draw(one_of(*sorted(edges & set(range(length))) or [None]), label="needle")
    if position is not None:
        key = packed[seq][position, : layout.num_kv_heads].astype(np.float64)
        aligned = 12 * key / np.maximum(np.linalg.norm(key, axis=-1, keepdims=True), 1e-3)
        rows = slice(sum(queries[:seq]), sum(queries[: seq + 1]))
        q[rows] = np.repeat(aligned, q.shape[1] // layout.num_kv_heads, axis=0).astype(q.dtype)


def decode_batch(
    format: str,
    seq_lens: tuple[int, ...],
    *,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    query_lens: tuple[int, ...] | None = None,
    num_groups: int = 2,
    bits: int = 4,
    block_size: int = 16,
    group_size: int | None = None,
    dtype: str = "bfloat16",
    **options: Any,
) -> Batch:
    """A batch that is chosen, not drawn, because it is long, or has many heads, or is of one layout among many.

    Args:
        group: Queries' heads for each KV head.
        query_lens: One query of each sequence if None.
        group_size: A block if None.
        options: Of the attention.
    """
    rng, lens = np.random.default_rng(len(seq_lens)), np.array(seq_lens, np.int32)
    blocks_of = -(-lens // block_size)
    num_blocks = int(blocks_of.sum())
    layout = Layout(
        format, num_blocks, num_blocks + 1, block_size, num_kv_heads, head_dim, num_groups, group_size or block_size,
        bits, dtype,
    )  # fmt: skip
    table, window_table = (shuffled_table(rng, blocks_of, blocks) for blocks in (num_blocks, num_blocks + 1))
    packed = [values(rng, (n, 2 * num_kv_heads, head_dim), "normal", dtype) for n in seq_lens]
    queries = np.ones_like(lens) if query_lens is None else np.array(query_lens, np.int32)
    q = values(rng, (int(queries.sum()), num_kv_heads * group, head_dim), "normal", dtype)
    return Batch(layout, "normal", lens, queries, table, window_table, packed, 0, q, options)


@st.composite
def decodes(draw, format: str, **options) -> Batch:
    """Decodes as models have them, and a few queries at once: large heads in two-byte floats, blocks of 16 and 32."""
    head_dim = draw(one_of(64, 128), label="head_dim")
    num_groups = draw(one_of(1, 2, 4) if head_dim == 128 else one_of(1, 2), label="num_groups")
    layout = Layout(
        format,
        num_blocks=0,
        num_window_blocks=0,
        block_size=draw(one_of(16, 32), label="block_size"),
        num_kv_heads=draw(one_of(1, 2, 3, 4), label="num_kv_heads"),
        head_dim=head_dim,
        num_groups=num_groups if format == "int4" else 1,
        group_size=1,
        bits=4,
        dtype=draw(one_of("bfloat16", "float16"), label="dtype"),
    )
    most = draw(one_of(1, 1, 2), label="most queries")
    return draw(batches(format, layout=layout, most_queries=most, **options))


OPTIONS = ((), ("scale",), ("sliding_window",), ("sinks",), ("logit_cap", "scale"), ("sinks", "sliding_window"))


@st.composite
def attention_options(draw, num_heads: int, rng: np.random.Generator, dtype: str) -> dict[str, Any]:
    """The keyword arguments that every attention takes, each now and then."""
    some = {
        "scale": one_of(0.3, 1.0),
        "sliding_window": one_of(1, 2, 3, 5, 9),
        "sinks": st.just(rng.normal(size=num_heads).astype(FLOATS[dtype])),
        "logit_cap": one_of(0.5, 8.0),
    }
    return {name: draw(some[name], label=name) for name in draw(one_of(*OPTIONS), label="options")}


@st.composite
def cuts(draw, length: int) -> list[int]:
    """Where a sequence is cut into chunks: from one chunk to a token at a time; begins with 0, ends with ``length``."""
    is_cut = draw(st.integers(0, 2 ** max(length - 1, 0) - 1), label="cuts, a bit each")
    return [0, *(place + 1 for place in range(length - 1) if is_cut >> place & 1), length]


# ---- calls to spoil ---------------------------------------------------------------------------------------------


def valid_calls(format: str) -> dict[str, dict[str, Any]]:
    """A write and an attention of a format that are in order, by op, with all arguments by name."""
    layout = Layout(format, 2, 2, 4, 2, 8, num_groups=2, group_size=2, bits=4, dtype="float32")
    caches = {name: np.zeros(shape, dtype_named(dtype)) for name, (shape, dtype) in layout.arrays.items()}
    kv = np.ones((3, layout.num_kv_heads, layout.head_dim), np.float32)
    slots, table = np.array([4, 5, 0]), np.array([[1], [0]], np.int32)
    window_slots = {"window_slot_mapping": slots} if format == "kivi" else {}
    window_table = {"window_block_table": table} if format == "kivi" else {}
    tables = {"block_table": table, "seq_lens": np.array([3, 2], np.int32), "cu_seqlens_q": np.array([0, 2, 3])}
    q = np.ones((3, 2 * layout.num_kv_heads, layout.head_dim), np.float32)
    suffix = "" if format == "plain" else f"_{format}"
    return {
        f"write_kv{suffix}": {"k": kv, "v": kv, **caches, **window_slots, "slot_mapping": slots},
        f"paged_attention{suffix}": {
            "q": q,
            **caches,
            **window_table,
            **tables,
            **({"window": 1} if window_table else {}),
        },
    }


# ---- pools of rows, and words -----------------------------------------------------------------------------------


@st.composite
def pools(draw) -> tuple[Array, Array, Array]:
    """A pool of rows of any dtype, with source and target blocks of a copy: sources may repeat, targets do not."""
    num_blocks = draw(st.integers(0, 7), label="num_blocks")
    dtype = draw(one_of("uint8", "int8", "float32", "float16", "bfloat16", "float8_e4m3fn"), label="dtype")
    numbers = dtype_named(dtype)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    width = draw(st.integers(1, 5), label="row length")
    pool = rng.integers(0, 256, (num_blocks, 2 * width * numbers.itemsize), np.uint8).view(numbers)
    num_copies = draw(st.integers(0, max(num_blocks - 1, 0)), label="num_copies")
    order = rng.permutation(num_blocks)
    sources = rng.choice(order[num_copies:], num_copies) if num_copies else order[:0]
    integers = draw(one_of(np.int32, np.int64), label="dtype of the ids")
    return pool, sources.astype(integers), order[:num_copies].astype(integers)


def every_word(order: str) -> Array:
    """All patterns of two bytes: "ascending", in rows that share an exponent, or "shuffled", where no row does."""
    patterns = np.arange(2**16).astype(np.uint16)
    if order == "shuffled":
        patterns = np.random.default_rng(0).permutation(patterns)
    return patterns.reshape(64, 1024)


@st.composite
def words(draw) -> tuple[Array, str]:
    """Blocks of 16-bit words: numbers as a cache holds them, and patterns that are as bad as can be for the coder."""
    format = draw(one_of("bfloat16", "float16"), label="format")
    shape = draw(st.integers(0, 4), label="num_blocks"), draw(st.integers(0, 70), label="num_values")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    kinds = one_of("normal", "every pattern", "zeros", "subnormal", "inf and NaN", "escapes at the ends")
    blocks = np.zeros(shape, np.uint16)
    for block in blocks:
        kind = draw(kinds, label="kind")
        ordinary = rng.normal(size=shape[1]).astype(FLOATS[format]).view(np.uint16)
        if kind in ("normal", "inf and NaN", "escapes at the ends"):
            block[:] = ordinary
        if kind == "every pattern":
            block[:] = rng.integers(0, 2**16, shape[1])
        elif kind == "subnormal":
            block[:] = rng.integers(0, 128, shape[1]) | rng.integers(0, 2, shape[1]) << 15
        elif kind == "inf and NaN":
            special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0]).astype(FLOATS[format]).view(np.uint16)
            block[:] = np.where(rng.random(shape[1]) < 0.3, rng.choice(special, shape[1]), ordinary)
        elif kind == "escapes at the ends" and shape[1]:
            block[[0, -1]] = [0xFFFF, 0x0001]
    return blocks, format
