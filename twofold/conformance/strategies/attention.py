"""Inputs for the attention ops: packed batches, paged batches and partial states, with the edges drawn on purpose.

Hypothesis draws the structure (lengths, heads, blocks, options); the numbers come from a drawn seed, which keeps an
example cheap. Every case carries ``features``, the names of what it has, and reports them as Hypothesis events, so that
it can be counted how often each was tried.

**Needles.** On random data a key more or less changes little. So most cases hide a needle: one query is aligned with
one key, which then dominates its softmax, and the key stands at a drawn boundary (the first, the last, an edge of a
block, tile, split or window, the first new token, or the first key of the future), or next to it.

**Poison.** Every slot that no sequence owns holds NaN or infinity; so does what surrounds a strided argument.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from hypothesis import event
from hypothesis import strategies as st

from reference.numerics.arrays import dtype_named
from twofold.conformance.backends import assume_supported
from twofold.conformance.tolerance import AttentionOracle, attention_oracle, concatenate_oracles

FLOAT_DTYPES = ("float32", "bfloat16", "float16", "float64")
TILE_EDGES = tuple(edge + shift for edge in (16, 32, 64, 128) for shift in (0, 1, -1))

# What a result file counts; each is to be in at least a fifth of the examples of a paged op.
COUNTED_FEATURES = (
    "two or more sequences",
    "ragged tail",
    "shared blocks",
    "grouped heads",
    "sliding window",
    "poisoned slots",
    "needle",
)


# ---- what every case has ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SequenceInput:
    """One sequence of a batch, on its own."""

    q: np.ndarray  # [num_queries, num_heads, head_dim]
    k: np.ndarray  # [num_keys, num_kv_heads, head_dim]
    v: np.ndarray


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """Several sequences and the options they share; arrays are host arrays of dtype ``dtype``."""

    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sequences: list[SequenceInput]
    causal: bool = True
    scale: float | None = None
    sliding_window: int | None = None
    sinks: np.ndarray | None = None
    logit_cap: float | None = None
    strided: bool = False  # queries are columns of a wider array
    features: frozenset[str] = field(default_factory=frozenset)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of all its arrays of floats."""
        return (self.dtype,)

    @property
    def query_lens(self) -> list[int]:
        return [len(s.q) for s in self.sequences]

    @property
    def cu_seqlens_q(self) -> np.ndarray:
        return offsets(self.query_lens)

    @cached_property
    def host_q(self) -> np.ndarray:
        """The packed queries; where strided, with NaN to both sides of them."""
        parts = [s.q for s in self.sequences] or [np.zeros((0, self.num_heads, self.head_dim))]
        packed = np.concatenate(parts).astype(dtype_named(self.dtype))
        if not self.strided:
            return packed
        wide = np.full((len(packed), self.num_heads + 3, self.head_dim), np.nan, packed.dtype)
        wide[:, 1 : 1 + self.num_heads] = packed
        return wide

    def q(self, backend: Any) -> Any:
        """The packed queries as an array of the backend; where strided, a view of a wider one."""
        assume_supported(backend, self.dtype)
        q = backend.from_host(self.host_q)
        return q[:, 1 : 1 + self.num_heads] if self.strided else q

    def options(self, backend: Any) -> dict[str, Any]:
        """The options of an op by keyword; those at their defaults are left out."""
        sinks = None if self.sinks is None else backend.from_host(self.sinks)
        chosen = {
            "scale": self.scale,
            "sliding_window": self.sliding_window,
            "sinks": sinks,
            "logit_cap": self.logit_cap,
        }
        return {name: value for name, value in chosen.items() if value is not None}

    @cached_property
    def oracle(self) -> AttentionOracle:
        """Of all queries, packed."""
        nothing = np.zeros((0, self.num_kv_heads, self.head_dim))
        none = SequenceInput(np.zeros((0, self.num_heads, self.head_dim)), nothing, nothing)
        return concatenate_oracles([self.oracle_of(s) for s in [none, *self.sequences]])

    def oracle_of(self, sequence: SequenceInput) -> AttentionOracle:
        options = {"scale": self.scale, "sliding_window": self.sliding_window, "logit_cap": self.logit_cap}
        q, k, v = sequence.q, sequence.k, sequence.v
        return attention_oracle(q, k, v, causal=self.causal, sinks=self.sinks, **options)

    @property
    def num_keys(self) -> int:
        """Of the longest sequence."""
        return max((len(s.k) for s in self.sequences), default=0)

    def __repr__(self) -> str:
        lens = [(len(s.q), len(s.k)) for s in self.sequences]
        heads = f"heads={self.num_heads}/{self.num_kv_heads} of {self.head_dim}"
        options = f"causal={self.causal}, scale={self.scale}, sliding_window={self.sliding_window}"
        more = f"sinks={self.sinks is not None}, logit_cap={self.logit_cap}, strided={self.strided}"
        return f"{type(self).__name__}({self.dtype}, (queries, keys)={lens}, {heads}, {options}, {more})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What Hypothesis prints of a failing case: its structure, not its numbers."""
        printer.text(repr(self))


def offsets(lens: Sequence[int]) -> np.ndarray:
    """``cu_seqlens`` of these lengths."""
    return np.concatenate([[0], np.cumsum(lens, dtype=np.int64)]).astype(np.int32)


# ---- drawing the parts ------------------------------------------------------------------------------------------


def draw_heads(draw: Any) -> dict[str, int]:
    """MHA, GQA in every ratio, MQA; head sizes that are and are not powers of two."""
    num_kv_heads = draw(st.integers(1, 3), label="num_kv_heads")
    group = draw(st.sampled_from([1, 2, 3, 4, 8]), label="heads per KV head")
    head_dim = draw(st.sampled_from([8, 1, 16, 24, 64, 80, 128]), label="head_dim")
    return {"num_heads": num_kv_heads * group, "num_kv_heads": num_kv_heads, "head_dim": head_dim}


def draw_options(draw: Any, rng: np.random.Generator, num_heads: int, dtype: np.dtype) -> dict[str, Any]:
    """Every option off, or on at ordinary and at extreme values."""
    sink_size = draw(st.sampled_from([None, None, 1.0, 30.0]), label="size of the sinks")
    sinks = None if sink_size is None else (sink_size * rng.normal(size=num_heads)).astype(dtype)
    return {
        "scale": draw(st.sampled_from([None, None, 0.3, 1.0]), label="scale"),
        "sliding_window": draw(st.one_of(st.none(), st.integers(1, 20), st.sampled_from(TILE_EDGES)), label="window"),
        "logit_cap": draw(st.sampled_from([None, None, 30.0, 1.0]), label="logit_cap"),
        "sinks": sinks,
    }


@dataclass(frozen=True)
class Numbers:
    """How large the numbers of a case are."""

    q: float
    k: float
    v: float

    def draw_kv(self, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        return self.k * rng.normal(size=shape), self.v * rng.normal(size=shape).clip(-6, 6)


# Ordinary; all weights equal; one-hot softmaxes; values near the end of float16; small everything.
NUMBERS = (Numbers(1, 1, 1), Numbers(0, 1, 1), Numbers(10, 10, 1), Numbers(1, 1, 1e4), Numbers(1e-3, 1e-3, 1e-3))


def draw_boundary(
    draw: Any, num_queries: int, num_keys: int, row: int, window: int | None, edges: Iterable[int]
) -> int:
    """A key at a boundary, or next to one: seen by that query, or just not."""
    position = num_keys - num_queries + row
    spots = {"first": 0, "last": num_keys - 1, "first new": num_keys - num_queries, "own": position}
    if window is not None:
        spots["last hidden by the window"] = position - window
    spots |= {f"edge of {edge}": position // edge * edge for edge in edges}
    spot = draw(st.sampled_from(sorted(spots)), label="the needle's boundary")
    shift = draw(st.sampled_from([0, 1, -1]), label="its distance from it")
    return min(max(spots[spot] + shift, 0), num_keys - 1)


def place_needle(
    rng: np.random.Generator, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float | None, v_size: float
) -> None:
    """Align one query [num_heads, head_dim] with one key [num_kv_heads, head_dim]: score 20, and a value of its own.

    The products of a score differ in size: equal ones would all round the same way, and the tolerance rule rests on
    rounding errors that are independent.
    """
    num_heads, head_dim = q.shape
    head = int(rng.integers(num_heads))
    kv_head = head // (num_heads // len(k))
    q[head] = rng.choice([-1.0, 1.0], head_dim) * rng.uniform(0.5, 1.5, head_dim)
    k[kv_head] = q[head] * 20 / ((q[head] ** 2).sum() * (head_dim**-0.5 if scale is None else scale))
    v[kv_head] = 5 * v_size * rng.choice([-1.0, 1.0], head_dim)


def report(features: dict[str, bool]) -> frozenset[str]:
    """The features that are there, also told to Hypothesis."""
    present = frozenset(name for name, there in features.items() if there)
    for name in sorted(present):
        event(name)
    return present


# ---- packed batches: dense and flash ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, repr=False)
class PackedCase(AttentionCase):
    """Sequences with keys of their own, as ``flash_attention`` takes them."""

    @property
    def cu_seqlens_k(self) -> np.ndarray:
        return offsets([len(s.k) for s in self.sequences])

    def arguments(self, backend: Any) -> tuple[Any, ...]:
        """What ``flash_attention`` takes by position."""
        nothing = np.zeros((0, self.num_kv_heads, self.head_dim), dtype_named(self.dtype))
        k = np.concatenate([nothing, *(s.k for s in self.sequences)])
        v = np.concatenate([nothing, *(s.v for s in self.sequences)])
        return (self.q(backend), *map(backend.from_host, (k, v, self.cu_seqlens_q, self.cu_seqlens_k)))


@st.composite
def packed_cases(
    draw: Any, *, dtypes: Sequence[str] = FLOAT_DTYPES, min_seqs: int = 0, max_seqs: int = 4
) -> PackedCase:
    """Ragged sequences, some empty, with as many, more or fewer keys than queries."""
    dtype = dtype_named(draw(st.sampled_from(dtypes), label="dtype"))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    heads = draw_heads(draw)
    options = draw_options(draw, rng, heads["num_heads"], dtype)
    numbers = draw(st.sampled_from(NUMBERS), label="numbers")
    lengths = st.one_of(st.integers(0, 20), st.sampled_from(TILE_EDGES))

    sequences, needle = [], False
    for _ in range(draw(st.integers(min_seqs, max_seqs), label="num_seqs")):
        num_queries = draw(lengths, label="num_queries")
        same = draw(st.booleans(), label="as many keys")
        num_keys = num_queries if same else draw(lengths, label="num_keys")
        q = numbers.q * rng.normal(size=(num_queries, heads["num_heads"], heads["head_dim"]))
        k, v = numbers.draw_kv(rng, (num_keys, heads["num_kv_heads"], heads["head_dim"]))
        if num_queries and num_keys and draw(st.integers(0, 3), label="needle") > 0:
            row = draw(st.integers(0, num_queries - 1), label="the needle's query")
            window = options["sliding_window"]
            key = draw_boundary(draw, num_queries, num_keys, row, window, (16, 64))
            place_needle(rng, q[row], k[key], v[key], options["scale"], numbers.v)
            needle = True
        sequences.append(SequenceInput(*(x.astype(dtype) for x in (q, k, v))))

    case = PackedCase(
        dtype=dtype.name,
        sequences=sequences,
        causal=draw(st.sampled_from([True, True, False]), label="causal"),
        strided=draw(st.booleans(), label="strided"),
        features=report(
            {
                "two or more sequences": len(sequences) > 1,
                "grouped heads": heads["num_heads"] > heads["num_kv_heads"],
                "sliding window": options["sliding_window"] is not None,
                "needle": needle,
            }
        ),
        **heads,
        **options,
    )
    return case


# ---- paged batches ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, repr=False)
class PagedCase(AttentionCase):
    """A step of an engine: sequences whose keys and values lie in the blocks of a cache."""

    pool: np.ndarray  # [num_blocks, ..., block_size, num_kv_heads, head_dim]: the caches and more, in its own dtype
    layer: int  # the caches are pool[:, layer, 0] and pool[:, layer, 1]
    block_table: np.ndarray
    seq_lens: np.ndarray
    split_size: int

    @property
    def dtypes(self) -> tuple[str, ...]:
        return self.dtype, self.pool.dtype.name

    @property
    def block_size(self) -> int:
        return self.pool.shape[3]

    def caches(self, backend: Any) -> tuple[Any, Any]:
        """k_cache and v_cache, views of one pool, as in the engine."""
        assume_supported(backend, self.pool.dtype)
        pool = backend.from_host(self.pool)
        return pool[:, self.layer, 0], pool[:, self.layer, 1]

    def arguments(self, backend: Any) -> tuple[Any, ...]:
        """What ``paged_attention`` takes by position."""
        tables = map(backend.from_host, (self.block_table, self.seq_lens, self.cu_seqlens_q))
        return (self.q(backend), *self.caches(backend), *tables)

    def __repr__(self) -> str:
        paging = f"block_size={self.block_size}, seq_lens={self.seq_lens.tolist()}, split_size={self.split_size}"
        table = f"block_table={self.block_table.tolist()}"
        return f"{super().__repr__()[:-1]}, cache={self.pool.dtype}, {paging}, {table})"


KINDS = ("decode", "chunk", "prefill", "padded", "idle")


@dataclass
class Layout:
    """Who has which blocks, before any number is drawn."""

    block_size: int
    query_lens: list[int]
    seq_lens: list[int]
    block_ids: list[list[int]]
    num_blocks: int
    shared: bool


def draw_layout(draw: Any, rng: np.random.Generator, max_seqs: int) -> Layout:
    """Prefills, chunks, decodes, idle and padded rows over blocks in any order, some of them shared."""
    block_size = draw(st.sampled_from([4, 16, 1, 3, 5, 24, 32]), label="block_size")
    edges = [max(1, n * block_size + shift) for n in (1, 2, 3) for shift in (0, 1, -1)]
    lengths = st.one_of(st.integers(1, 3 * block_size), st.sampled_from([*edges, *TILE_EDGES]))
    query_lens, seq_lens, tokens_shared, num_ids = [], [], [], 0
    names: list[list[int]] = []  # of blocks, to be shuffled
    for seq in range(draw(st.integers(0, max_seqs), label="num_seqs")):
        kind = draw(st.sampled_from(KINDS), label="kind")
        seq_len = 0 if kind == "padded" else draw(lengths, label="seq_len")
        fewest, most = {"decode": (1, 1), "chunk": (1, seq_len), "prefill": (seq_len, seq_len)}.get(kind, (0, 0))
        if kind == "padded":
            most = 1  # a row of a graph that was captured for more sequences
        query_lens.append(draw(st.integers(fewest, most), label="num_queries"))
        seq_lens.append(seq_len)

        # Its first tokens may be those of an earlier sequence: whole blocks, or all it has if it is a fork.
        donor = draw(st.integers(0, seq), label="shares a prefix with (0: nobody)") - 1
        common = min(seq_len, seq_lens[donor]) if donor >= 0 else 0
        num_shared = -(-common // block_size) if common == seq_len else common // block_size
        own = list(range(num_ids, num_ids + -(-seq_len // block_size) - num_shared))
        num_ids += len(own)
        names.append([*names[donor][:num_shared], *own] if num_shared else own)
        tokens_shared.append(num_shared)
    num_blocks = num_ids + draw(st.integers(1, 3), label="blocks of nobody")
    place = rng.permutation(num_blocks) if draw(st.booleans(), label="shuffled blocks") else np.arange(num_blocks)
    block_ids = [[int(place[name]) for name in row] for row in names]
    return Layout(block_size, query_lens, seq_lens, block_ids, num_blocks, any(tokens_shared))


@st.composite
def paged_cases(
    draw: Any, *, dtypes: Sequence[str] = FLOAT_DTYPES, max_seqs: int = 4, mixed_dtypes: bool = True
) -> PagedCase:
    """Steps of an engine. ``mixed_dtypes``: the cache may be stored in another dtype than the queries'."""
    dtype = dtype_named(draw(st.sampled_from(dtypes), label="dtype"))
    mixed = mixed_dtypes and draw(st.integers(0, 3), label="cache of another dtype") == 3
    cache_dtype = dtype_named(draw(st.sampled_from(dtypes), label="dtype of the cache")) if mixed else dtype
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    heads = draw_heads(draw)
    options = draw_options(draw, rng, heads["num_heads"], dtype)
    window = options["sliding_window"]
    numbers = draw(st.sampled_from(NUMBERS), label="numbers")
    layout = draw_layout(draw, rng, max_seqs)
    block_size = layout.block_size

    num_layers = draw(st.sampled_from([1, 3]), label="layers in a block")
    layer = num_layers // 2
    poison = draw(st.sampled_from([np.nan, np.inf]), label="poison")
    shape = (block_size, heads["num_kv_heads"], heads["head_dim"])
    pool = np.full((layout.num_blocks, num_layers, 2, *shape), poison)
    k_cache, v_cache = pool[:, layer, 0], pool[:, layer, 1]

    # What is owned: the tokens of each sequence, except blocks released because the window is past them. The table
    # may still name those, whoever has them now.
    release = window is not None and draw(st.booleans(), label="blocks are released")
    stale = release and draw(st.booleans(), label="released blocks stay in the table")
    width = max(map(len, layout.block_ids), default=0) + draw(
        st.sampled_from([0, 0, 1, 2]), label="padding of the table"
    )
    table = np.full((len(layout.seq_lens), width), -1, np.int32)
    first_kept = np.zeros(len(layout.seq_lens), np.int32)
    for seq, (ids, seq_len) in enumerate(zip(layout.block_ids, layout.seq_lens)):
        oldest = seq_len - max(layout.query_lens[seq], 1) + 1 - window if release and window else 0
        first_kept[seq] = max(oldest, 0) // block_size
        for index, block in enumerate(ids):
            if index >= first_kept[seq] or stale:
                table[seq, index] = block
            if index < first_kept[seq]:
                continue
            size = min(block_size, seq_len - index * block_size)
            unwritten = ~np.isfinite(k_cache[block, :size, 0, 0])  # a shared block has its tokens already
            for cache, values in zip((k_cache, v_cache), numbers.draw_kv(rng, shape)):
                cache[block, :size][unwritten] = values[:size][unwritten]

    queries = [numbers.q * rng.normal(size=(n, heads["num_heads"], heads["head_dim"])) for n in layout.query_lens]
    capacity = width * block_size
    num_parts = draw(st.integers(1, 6), label="parts")
    split_size = max(1, capacity // num_parts + draw(st.integers(-1, 1), label="split size off by"))

    busy = [seq for seq, n in enumerate(layout.query_lens) if n and layout.seq_lens[seq]]
    needle = False
    if busy and draw(st.integers(0, 3), label="needle") > 0:
        seq = draw(st.sampled_from(busy), label="the needle's sequence")
        row = draw(st.integers(0, layout.query_lens[seq] - 1), label="the needle's query")
        num_queries, seq_len = layout.query_lens[seq], layout.seq_lens[seq]
        key = draw_boundary(draw, num_queries, seq_len, row, window, (block_size, split_size, 64))
        block = table[seq, key // block_size]
        if needle := block >= 0:
            slot = block, key % block_size
            place_needle(rng, queries[seq][row], k_cache[slot], v_cache[slot], options["scale"], numbers.v)

    pool = pool.astype(cache_dtype)
    sequences = []
    for q, row, first, seq_len in zip(queries, table, first_kept, layout.seq_lens):
        kv = np.zeros((2, seq_len, *shape[1:]), cache_dtype)
        for t in range(first * block_size, seq_len):  # a released token is hidden: zeros do
            if row[t // block_size] >= 0:
                kv[:, t] = pool[row[t // block_size], layer, :, t % block_size]
        sequences.append(SequenceInput(q.astype(dtype), *kv))

    return PagedCase(
        dtype=dtype.name,
        sequences=sequences,
        strided=draw(st.booleans(), label="strided"),
        pool=pool,
        layer=layer,
        block_table=table,
        seq_lens=np.array(layout.seq_lens, np.int32),
        split_size=split_size,
        features=report(
            {
                "two or more sequences": len(sequences) > 1,
                "ragged tail": any(n % block_size for n in layout.seq_lens),
                "shared blocks": layout.shared,
                "grouped heads": heads["num_heads"] > heads["num_kv_heads"],
                "sliding window": window is not None,
                "poisoned slots": True,
                "needle": bool(needle),
                "released blocks": bool(first_kept.any()),
            }
        ),
        **heads,
        **options,
    )


# ---- partial states ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StatesCase:
    """Parts of one attention: some see no key and hold poison, some dwarf the others, some rows have no key at all."""

    out_parts: np.ndarray
    lse_parts: np.ndarray

    @property
    def dtypes(self) -> tuple[str, ...]:
        return (self.out_parts.dtype.name,)

    def arguments(self, backend: Any) -> tuple[Any, Any]:
        return backend.from_host(self.out_parts), backend.from_host(self.lse_parts)

    def __repr__(self) -> str:
        return f"StatesCase({self.out_parts.dtype} {self.out_parts.shape}, lse_parts={self.lse_parts.tolist()})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


@st.composite
def states_cases(draw: Any, *, dtypes: Sequence[str] = FLOAT_DTYPES) -> StatesCase:
    """States to merge, from one part to many."""
    dtype = dtype_named(draw(st.sampled_from(dtypes), label="dtype"))
    num_parts = draw(st.integers(1, 5), label="num_parts")
    shape = (num_parts, draw(st.integers(0, 3), label="num_tokens"), draw(st.sampled_from([1, 3]), label="num_heads"))
    head_dim = draw(st.sampled_from([1, 24, 64, 80, 128]), label="head_dim")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    spread = draw(st.sampled_from([1.0, 0.0, 40.0]), label="spread of lse")
    middle = draw(st.sampled_from([0.0, -200.0, 200.0]), label="middle of lse")
    empty = rng.random(shape) < draw(st.sampled_from([0.0, 0.4, 1.0]), label="share without keys")
    lse = (middle + spread * rng.normal(size=shape)).astype(np.float64 if dtype == np.float64 else np.float32)
    out = rng.normal(size=(*shape, head_dim)).astype(dtype)
    lse[empty], out[empty] = -np.inf, draw(st.sampled_from([np.nan, np.inf]), label="poison")
    report({"a row without keys": bool(empty.all(axis=0).any()), "a part without keys": bool(empty.any())})
    return StatesCase(out, lse)
