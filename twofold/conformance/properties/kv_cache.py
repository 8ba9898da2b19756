"""What the KV cache's ops must do on any backend.

The formats are spelled out here a second time, as plainly as possible and in float64 (`stored`), so that a backend is
judged by what the docstrings promise and not by the reference's arithmetic. Attention is judged by the one tolerance
rule, over what the cache holds after the backend's own writes.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy import ndarray as Array

from reference.kv_cache.coded_rows import CodedRows, WordLayout
from reference.kv_cache.lossless import HEADER_BYTES
from reference.numerics.arrays import dtype_named
from twofold.conformance.backends import assume_supported
from twofold.conformance.strategies.kv_cache import Batch, Layout, Tokens, garbage
from twofold.conformance.tolerance import (
    AttentionOracle,
    assert_within,
    attention_baseline_bound,
    attention_bound,
    attention_oracle,
    baseline_error,
    concatenate_oracles,
)

Backend = Any  # a module or object with the interface's names
OUT_AXES = ("token", "head", "dim")
SUFFIXES = {"plain": "", "int8": "_int8", "fp8": "_fp8", "int4": "_int4", "kivi": "_kivi"}


# ---- a cache on a backend ---------------------------------------------------------------------------------------


class Cache:
    """The arrays of a layout on a backend: strided views of pools that begin full of garbage."""

    def __init__(self, backend: Backend, layout: Layout, seed: int = 0):
        self.backend, self.layout = backend, layout
        self.pools = {name: backend.from_host(pool) for name, pool in garbage(layout, seed).items()}
        self.views = {name: pool[:, 1] for name, pool in self.pools.items()}

    def write(self, tokens: Tokens) -> None:
        """The format's write op, checked to leave its other arguments alone."""
        mappings: list[Array] = [tokens.slot_mapping]
        if tokens.window_slot_mapping is not None and self.layout.format == "kivi":
            mappings.insert(0, tokens.window_slot_mapping)
        packed = self.backend.from_host(tokens.packed.copy())
        placed = [self.backend.from_host(mapping.copy()) for mapping in mappings]
        heads = self.layout.num_kv_heads
        op = getattr(self.backend, f"write_kv{SUFFIXES[self.layout.format]}")
        assert op(packed[:, :heads], packed[:, heads:], *self.views.values(), *placed) is None, "writes return nothing"
        unchanged(self.backend, "k, v", packed, tokens.packed)
        for mapping, host in zip(placed, mappings):
            unchanged(self.backend, "slot_mapping", mapping, host)

    def attend(self, batch: Batch, *, out: Array | None = None, **replaced: Array) -> Array:
        """The format's attention op, checked to leave its arguments alone; ``replaced`` are fields of the batch."""
        names = ["q", "block_table", "seq_lens", "cu_seqlens_q"]
        if batch.layout.format == "kivi":
            names.insert(1, "window_block_table")
        from_host = self.backend.from_host
        host: list[Any] = [replaced.get(name, getattr(batch, name)) for name in names]
        placed = [from_host(x.copy()) for x in host]
        options = {name: from_host(x) if isinstance(x, np.ndarray) else x for name, x in batch.options.items()}
        options |= {} if out is None else {"out": from_host(out)}
        before = self.bytes()

        op = getattr(self.backend, f"paged_attention{SUFFIXES[batch.layout.format]}")
        result = op(placed[0], *self.views.values(), *placed[1:], **options)
        assert out is None or result is options["out"], "a result other than out"
        for name, array, original in zip(names, placed, host):
            unchanged(self.backend, name, array, original)
        for name, pool in self.bytes().items():
            assert same_bits(pool, before[name]), f"attention changed {name}"
        return np.array(self.backend.to_host(result))

    def bytes(self) -> dict[str, Array]:
        """Every byte of the pools, the gaps between the views included."""
        return {name: np.array(self.backend.to_host(pool)) for name, pool in self.pools.items()}

    def arrays(self) -> dict[str, Array]:
        """What the views hold, on the host."""
        return {name: np.array(self.backend.to_host(view)) for name, view in self.views.items()}


def same_bits(a: Array, b: Array) -> bool:
    """Equal in shape, dtype and every bit, NaN's included."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def unchanged(backend: Backend, what: str, array: Any, original: Array) -> None:
    assert same_bits(np.ascontiguousarray(backend.to_host(array)), original), f"{what} was changed"


def written_cache(backend: Backend, batch: Batch, seed: int = 0) -> Cache:
    """A cache that holds all tokens of a batch."""
    cache = Cache(backend, batch.layout, seed)
    cache.write(batch.everything)
    return cache


# ---- the formats, once more -------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """What a cache means, in float64, [num_blocks, block_size, num_kv_heads, head_dim] each."""

    k: Array
    v: Array
    k_size: Array  # |zero| + |scale * code|: what may cancel to the value, for the tolerance
    v_size: Array


def stored(layout: Layout, arrays: dict[str, Array]) -> Stored:
    """The values that a cache's codes stand for. (KIVI: of its quantized half.)"""
    with np.errstate(all="ignore"):  # where nobody wrote there is garbage, and it is not looked at
        zeros_steps = [_zero_and_steps(layout, side, arrays) for side in "kv"]
        (k_zero, k_steps), (v_zero, v_steps) = zeros_steps
        sizes = [np.abs(zero) + np.abs(steps) for zero, steps in zeros_steps]
        return Stored(k_zero + k_steps, v_zero + v_steps, *sizes)


def _zero_and_steps(layout: Layout, side: str, arrays: dict[str, Array]) -> tuple[Array, Array]:
    cache = arrays[f"{side}_cache"]
    if layout.format == "plain":
        return np.zeros(cache.shape), cache.astype(np.float64)
    scale = arrays[f"{side}_scale"].astype(np.float64)
    if layout.format in ("int8", "fp8"):
        return np.zeros(cache.shape), cache.astype(np.float64) * scale[..., None]
    zero = arrays[f"{side}_zero"].astype(np.float64)
    if layout.format == "kivi" and side == "k":  # a row of scales for group_size tokens
        scale, zero = (np.repeat(x, layout.group_size, axis=1) for x in (scale, zero))
    else:  # a scale for head_dim / num_groups elements
        scale, zero = (np.repeat(x, layout.head_dim // layout.num_groups, axis=-1) for x in (scale, zero))
    return zero, scale * unpacked(cache, layout.bits)


def unpacked(cache: Array, bits: int) -> Array:
    """Codes in the order of the head: byte j holds element j of each part of it, the first in its lowest bits."""
    codes = [cache >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return np.concatenate(codes, axis=-1).astype(np.float64)


def sealed_groups(batch: Batch) -> list[tuple[int, int]]:
    """(sequence, first position) of every group of which all tokens are there."""
    size = batch.layout.group_size
    return [(seq, first) for seq, n in enumerate(batch.seq_lens) for first in range(0, int(n) - size + 1, size)]


def slots_of(table: Array, seq: int, positions: Array, block_size: int) -> tuple[Array, Array]:
    """Block and offset of a sequence's tokens."""
    return table[seq, positions // block_size], positions % block_size


# ---- what is written --------------------------------------------------------------------------------------------


def written_is_gathered(backend: Backend, tokens: Tokens) -> None:
    """What ``write_kv`` writes ``gather_kv`` reads, rounded to the cache's dtype; slot -1 reads zeros."""
    cache = Cache(backend, tokens.layout)
    cache.write(tokens)
    order = np.random.default_rng(len(tokens.k)).permutation(len(tokens.k))
    slots = backend.from_host(tokens.slot_mapping[order])
    k, v = (np.array(backend.to_host(x)) for x in backend.gather_kv(*cache.views.values(), slots))
    for name, got, x in (("k", k, tokens.k), ("v", v, tokens.v)):
        expected = rounded(np.where((tokens.slot_mapping < 0)[:, None, None], 0, x)[order], tokens.layout.dtype)
        assert same_bits(got, expected), f"{name}: expected {expected}, got {got}"


def rounded(x: Array, dtype: str) -> Array:
    """To nearest even by ml_dtypes or NumPy, saturating."""
    largest = float(ml_dtypes.finfo(dtype_named(dtype)).max)
    return np.clip(x.astype(np.float64), -largest, largest).astype(np.float32).astype(dtype_named(dtype))


def only_named_slots_change(backend: Backend, tokens: Tokens) -> None:
    """Every byte outside the named slots, the gaps between a layer's arrays included, stays what it was."""
    cache = Cache(backend, tokens.layout, seed=1)
    before = cache.bytes()
    cache.write(tokens)
    slots = tokens.slot_mapping[tokens.slot_mapping >= 0]
    named = slots // tokens.layout.block_size, slots % tokens.layout.block_size
    for name, after in cache.bytes().items():
        after[named[0], 1, named[1]] = before[name][named[0], 1, named[1]]
        assert same_bits(after, before[name]), f"{name} changed where nobody wrote"


def slots_out_of_range_write_nothing(backend: Backend, op: str, arguments: dict[str, Any]) -> None:
    """A slot beyond the cache is refused, or skipped like -1: never written to some other place."""
    mappings = [name for name in arguments if name.endswith("slot_mapping")]
    written = {}
    num_blocks, block_size = arguments["k_cache"].shape[:2]
    for slot in (-1, num_blocks * block_size, arguments["k_cache"].size):
        spoiled = {name: np.concatenate([[slot], arguments[name][1:]]) for name in mappings}
        call = placed(backend, arguments | spoiled)
        try:
            getattr(backend, op)(**call)
        except ValueError:
            assert slot != -1, f"{op} refused a slot of -1"
            return
        written[slot] = {name: np.array(backend.to_host(x)) for name, x in call.items() if name not in mappings}
    skipped = written.pop(-1)
    for slot, beyond in written.items():
        for name in skipped:
            assert same_bits(skipped[name], beyond[name]), f"{op}: slot {slot}, out of range, changed {name}"


def only_sealed_groups_change(backend: Backend, batch: Batch) -> None:
    """KIVI: the window changes in the named slots, the quantized arrays in the groups that are complete."""
    cache = Cache(backend, batch.layout, seed=1)
    before = cache.bytes()
    cache.write(batch.everything)
    block_size, size = batch.layout.block_size, batch.layout.group_size
    after = cache.bytes()
    for seq, n in enumerate(batch.seq_lens):
        blocks, offsets = slots_of(batch.window_block_table, seq, np.arange(n), block_size)
        for name in ("k_window", "v_window"):
            after[name][blocks, 1, offsets] = before[name][blocks, 1, offsets]
    for seq, first in sealed_groups(batch):
        blocks, offsets = slots_of(batch.block_table, seq, np.arange(first, first + size), block_size)
        for name in ("k_cache", "v_cache", "v_scale", "v_zero"):
            after[name][blocks, 1, offsets] = before[name][blocks, 1, offsets]
        for name in ("k_scale", "k_zero"):
            after[name][blocks, 1, offsets // size] = before[name][blocks, 1, offsets // size]
    for name in after:
        assert same_bits(after[name], before[name]), f"{name} changed where nothing was written or sealed"


# ---- codes ------------------------------------------------------------------------------------------------------

SLACK = 2.0**-21
"""Relative error that float32 may leave in a scale or in a value over its scale: eight roundings. It decides a code
only at a tie, and there both neighbours are as near."""


def codes_are_nearest(backend: Backend, tokens: Tokens) -> None:
    """Scales are what the docstring says, codes are the nearest to value / scale except at ties, and so every stored
    value is within half a step of what was written."""
    assume_supported(backend, tokens.packed.dtype)
    cache = Cache(backend, tokens.layout)
    cache.write(tokens)
    arrays, layout = cache.arrays(), tokens.layout
    rows = tokens.slot_mapping >= 0
    slots = tokens.slot_mapping[rows] // layout.block_size, tokens.slot_mapping[rows] % layout.block_size
    for side, x in (("k", tokens.k), ("v", tokens.v)):
        x, codes = x[rows].astype(np.float64), arrays[f"{side}_cache"][slots]
        scale = arrays[f"{side}_scale"][slots].astype(np.float64)
        if layout.format == "int4":
            zero = arrays[f"{side}_zero"][slots].astype(np.float64)
            in_groups = (*x.shape[:-1], layout.num_groups, -1)
            x, codes = (y.reshape(*y.shape[:-1], *in_groups[-2:]) if y.size else y for y in (x, unpacked(codes, 4)))
            affine_is_nearest(f"{side}", x, codes, scale, zero, bits=4, axis=-1)
        else:
            symmetric_is_nearest(layout.format, side, x, codes.astype(np.float64), scale)


def symmetric_is_nearest(format: str, side: str, x: Array, codes: Array, scale: Array) -> None:
    largest_code, round_code = {"int8": (127.0, np.rint), "fp8": (448.0, e4m3)}[format]
    ideal = np.abs(x).max(axis=-1, initial=0) / largest_code
    tiny = float(np.finfo(np.float32).tiny)
    is_zero = scale == 0
    assert (ideal[is_zero] < tiny * (1 + SLACK)).all(), f"{side}_scale is 0 for rows that are not"
    bound = np.where(is_zero, np.inf, SLACK * ideal)
    assert_within(scale, ideal, bound, f"{side}_scale", ("token", "head"))
    assert (scale[~is_zero] >= tiny * (1 - SLACK)).all(), f"{side}_scale is not a normal float32"
    assert (codes[is_zero] == 0).all(), f"{side}_cache: codes other than 0 under a scale of 0"

    ratio = x / np.where(is_zero, np.inf, ideal)[..., None]
    low, high = round_code(ratio * (1 - SLACK)), round_code(ratio * (1 + SLACK))
    nearest = (codes >= np.minimum(low, high)) & (codes <= np.maximum(low, high))
    assert nearest.all(), f"{side}_cache: {codes[~nearest]} are not the nearest to {ratio[~nearest]}"
    half_step = 0.5 if format == "int8" else np.maximum(np.abs(ratio) / 16, 2.0**-10)
    error = np.abs(x - scale[..., None] * codes)
    allowed = scale[..., None] * (half_step + 2 * SLACK * largest_code) + is_zero[..., None] * 448 * tiny
    assert (error <= allowed).all(), f"{side}: more than half a step off: {error.max()}"


def e4m3(x: Array) -> Array:
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def affine_is_nearest(side: str, x: Array, codes: Array, scale: Array, zero: Array, *, bits: int, axis: int) -> None:
    """``scale`` and ``zero`` lack ``axis`` of ``x`` and ``codes``."""
    largest_code = 2**bits - 1
    if not x.size:
        return
    x = np.clip(x, -65504, 65504)
    low, high = x.min(axis), x.max(axis)
    assert (zero == float16_below(low)).all(), f"{side}_zero: expected {float16_below(low)}, got {zero}"
    ideal = (high - zero) / largest_code
    fits = (scale >= float16_above(ideal * (1 - SLACK))) & (scale <= float16_above(ideal * (1 + SLACK)))
    assert fits.all(), f"{side}_scale: expected {float16_above(ideal)[~fits]}, got {scale[~fits]}"

    step, start = np.expand_dims(scale, axis), np.expand_dims(zero, axis)
    ratio = (x - start) / np.where(step > 0, step, np.inf)
    slack = largest_code * SLACK
    nearest = (codes >= np.rint(ratio - slack)) & (codes <= np.rint(ratio + slack))
    assert nearest.all(), f"{side}_cache: {codes[~nearest]} are not the nearest to {ratio[~nearest]}"
    error = np.abs(x - (start + step * codes))
    allowed = step * (0.5 + slack) + float(np.finfo(np.float32).tiny)
    assert (error <= allowed).all(), f"{side}: more than half a step off: {error.max()}"


def float16_below(x: Array) -> Array:
    """The largest float16 value that is not above x."""
    nearest = x.astype(np.float16)
    with np.errstate(over="ignore"):
        below = np.nextafter(nearest, np.float16(-np.inf))
    return np.where(nearest.astype(np.float64) > x, below, nearest).astype(np.float64)


def float16_above(x: Array) -> Array:
    return -float16_below(-x)


def sealed_codes_are_nearest(backend: Backend, batch: Batch) -> None:
    """KIVI: the window holds the tokens, and of every complete group keys are coded per channel and values per token,
    from what the window holds."""
    arrays, layout = written_cache(backend, batch).arrays(), batch.layout
    for seq, packed in enumerate(batch.packed):
        at = slots_of(batch.window_block_table, seq, np.arange(len(packed)), layout.block_size)
        for name, x in (("k_window", packed[:, : layout.num_kv_heads]), ("v_window", packed[:, layout.num_kv_heads :])):
            assert same_bits(arrays[name][at], rounded(x, layout.dtype)), f"{name}: not what was written"

    for seq, first in sealed_groups(batch):
        positions = np.arange(first, first + layout.group_size)
        window = slots_of(batch.window_block_table, seq, positions, layout.block_size)
        blocks, offsets = slots_of(batch.block_table, seq, positions, layout.block_size)
        group = blocks[0], offsets[0] // layout.group_size
        scale, zero = (arrays[name][group].astype(np.float64) for name in ("k_scale", "k_zero"))
        codes = unpacked(arrays["k_cache"][blocks, offsets], layout.bits)
        keys = arrays["k_window"][window].astype(np.float64)
        affine_is_nearest("k", keys, codes, scale, zero, bits=layout.bits, axis=0)

        scale, zero = (arrays[name][blocks, offsets].astype(np.float64) for name in ("v_scale", "v_zero"))
        codes = unpacked(arrays["v_cache"][blocks, offsets], layout.bits)
        values = arrays["v_window"][window].astype(np.float64)
        shape = (*values.shape[:-1], layout.num_groups, layout.head_dim // layout.num_groups)
        affine_is_nearest("v", values.reshape(shape), codes.reshape(shape), scale, zero, bits=layout.bits, axis=-1)


# ---- attention --------------------------------------------------------------------------------------------------


def plain_torch() -> Backend:
    """The baseline; imported when first needed, because it needs torch."""
    from twofold.conformance import plain_torch

    return plain_torch


def oracle_of(batch: Batch, arrays: dict[str, Array]) -> AttentionOracle:
    """Attention over what a cache holds, in float64. Each of KIVI's queries has keys of its own."""
    options = dict(batch.options)
    window = options.pop("window", None)
    cache = stored(batch.layout, arrays)
    oracles = [empty_oracle(batch)]
    for seq, (seq_len, num_queries) in enumerate(zip(batch.seq_lens, batch.query_lens)):
        first_row = batch.cu_seqlens_q[seq]
        for queries in [range(num_queries)] if window is None else [range(i, i + 1) for i in range(num_queries)]:
            num_keys = max(0, seq_len - num_queries + queries.stop)  # a padded sequence has none, but may have a query
            k, v, k_size, v_size = keys_and_values(batch, arrays, cache, seq, num_keys, window)
            q = batch.q[first_row + queries.start : first_row + queries.stop]
            truth = attention_oracle(q, k, v, **options)
            of_values = attention_oracle(q, k, v_size, **options).magnitude
            of_scores = attention_oracle(q, k_size, v, **options).score_magnitude
            oracles.append(replace(truth, magnitude=of_values, score_magnitude=of_scores))
    return concatenate_oracles(oracles)


def empty_oracle(batch: Batch) -> AttentionOracle:
    """Of no queries, so that there is one more to concatenate than sequences."""
    k = np.zeros((0, batch.layout.num_kv_heads, batch.layout.head_dim))
    return attention_oracle(batch.q[:0], k, k)


def keys_and_values(
    batch: Batch, arrays: dict[str, Array], cache: Stored, seq: int, num_keys: int, window: int | None
) -> list[Array]:
    """The first ``num_keys`` keys and values of a sequence, and their sizes, as the last of those tokens reads them."""
    keys, layout = np.arange(num_keys), batch.layout
    kv = [x[slots_of(batch.block_table, seq, keys, layout.block_size)] for x in cache]
    if window is not None:
        in_full = (keys // layout.group_size + 1) * layout.group_size > num_keys - window
        at = slots_of(batch.window_block_table, seq, keys[in_full], layout.block_size)
        k, v = (arrays[name][at].astype(np.float64) for name in ("k_window", "v_window"))
        kv[0][in_full], kv[1][in_full], kv[2][in_full], kv[3][in_full] = k, v, np.abs(k), np.abs(v)
    return kv


def attention_is_right(backend: Backend, batch: Batch, got: Array, arrays: dict[str, Array], what: str) -> None:
    """``got`` against the oracle over ``arrays``, by the tolerance rule."""
    oracle = oracle_of(batch, arrays)
    assert got.dtype == batch.q.dtype, f"{what}: expected the dtype of q, {batch.q.dtype}, got {got.dtype}"
    magnitudes = oracle.magnitude, oracle.score_magnitude
    baseline = plain_torch()
    if backend is baseline:
        bound = attention_baseline_bound(oracle.out, *magnitudes, int(batch.seq_lens.max(initial=0)), got.dtype)
    else:
        of_baseline = Cache(baseline, batch.layout)
        for name, view in of_baseline.views.items():
            view[:] = baseline.from_host(arrays[name])
        bound = attention_bound(
            oracle.out, *magnitudes, got.dtype, baseline_error(of_baseline.attend(batch), oracle.out)
        )
    assert_within(got, oracle.out, bound + flushed_weights(batch), what, OUT_AXES)


def flushed_weights(batch: Batch) -> float:
    """What is lost where probabilities below float32's smallest normal number are flushed to zero: that number times
    all values a query sees, which in a cache may be as large as the largest written and a step more."""
    largest = max((float(np.abs(x).max(initial=0)) for x in batch.packed), default=0.0)
    return float(np.finfo(np.float32).tiny) * int(batch.seq_lens.max(initial=0)) * 2 * largest


def attends_over_what_is_stored(backend: Backend, batch: Batch) -> None:
    """Attention over a cache is attention over the values that its codes stand for (KIVI: over a query's own mixture
    of those and the window's), padded sequences included."""
    assume_supported(backend, batch.q.dtype)
    cache = written_cache(backend, batch)
    attention_is_right(backend, batch, cache.attend(batch), cache.arrays(), f"attention over {batch.layout.format}")


def unowned_slots_do_not_matter(backend: Backend, batch: Batch) -> None:
    """Whatever lies in slots that no sequence owns, in codes, scales and what ``out`` held, the result has the same
    bits; and it lands in ``out``."""
    results = []
    for seed in (0, 1, 2):
        out = np.full_like(batch.q, np.nan) if seed else None
        results.append(written_cache(backend, batch, seed).attend(batch, out=out))
    for result in results[1:]:
        assert same_bits(result, results[0]), "the result depends on garbage"
    assert np.isfinite(results[0].astype(np.float64)).all(), "the result is not finite"


def padding_of_the_table_does_not_matter(backend: Backend, batch: Batch) -> None:
    """Blocks past a sequence's end, or wholly before what its queries see, may be -1 or anybody's, full of garbage."""
    layout, cache = batch.layout, written_cache(backend, batch)
    window, sliding_window = batch.options.get("window"), batch.options.get("sliding_window")
    expected = cache.attend(batch)
    for before in ("nobody's", "another's"):
        changed = {}
        for name, num_blocks in (("block_table", layout.num_blocks), ("window_block_table", layout.num_window_blocks)):
            changed[name] = table = getattr(batch, name).copy()
            free = sorted(set(range(num_blocks)) - set(table.ravel().tolist()))
            another = free[0] if free else num_blocks - 1
            for seq, row in enumerate(table):
                row[-(-batch.seq_lens[seq] // layout.block_size) :] = another
                first_query = batch.seq_lens[seq] - batch.query_lens[seq]
                unread = 0 if sliding_window is None else first_query + 1 - sliding_window
                if name == "window_block_table" and window is not None:
                    unread = max(unread, first_query + 1 - window)
                row[: max(unread, 0) // layout.block_size] = -1 if before == "nobody's" else another
        got = cache.attend(batch, **changed)
        assert same_bits(got, expected), f"the result depends on blocks that no query reads, when they are {before}"


def blocks_out_of_range_are_none(backend: Backend, batch: Batch) -> None:
    """A block that the cache does not have is as good as -1: no query sees a key of it. (Nobody checks values.)"""
    cache, results = written_cache(backend, batch), []
    for block_id in (-1, batch.layout.num_blocks, 2**31 - 1, -(2**31)):
        table = batch.block_table.copy()
        table[0, 0] = table[-1, 1] = block_id
        results.append(cache.attend(batch, block_table=table))
        assert same_bits(results[-1], results[0]), f"block {block_id} is not as good as none"
    assert not same_bits(results[0], cache.attend(batch)), "nobody missed the first block"


# ---- laws -------------------------------------------------------------------------------------------------------


def chunked_is_whole(backend: Backend, batch: Batch, cuts: list[list[int]]) -> None:
    """Writing and attending to sequences in chunks leaves the same bits in the cache as writing them in one piece, and
    every token's attention is that of one piece, within the rule.

    Args:
        cuts: Where each sequence is cut; chunk c of every sequence is in step c.
    """
    cache, whole = Cache(backend, batch.layout), written_cache(backend, batch)
    got = np.zeros_like(batch.q)
    starts = batch.cu_seqlens_q
    for step in range(max((len(cut) - 1 for cut in cuts), default=0)):
        spans = [(seq, cut[step], cut[step + 1]) for seq, cut in enumerate(cuts) if step + 1 < len(cut)]
        cache.write(batch.tokens(spans))
        rows = np.concatenate([np.arange(starts[seq] + first, starts[seq] + end) for seq, first, end in spans])
        lens = np.array([cut[min(step + 1, len(cut) - 1)] for cut in cuts], np.int32)
        counts = np.zeros(len(cuts), np.int32)
        counts[[seq for seq, *_ in spans]] = [end - first for _, first, end in spans]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        got[rows] = cache.attend(batch, q=batch.q[rows], seq_lens=lens, cu_seqlens_q=offsets)
    chunks = cache.bytes()
    for name, pool in whole.bytes().items():
        assert same_bits(chunks[name], pool), f"{name}: chunks left other bits than the whole"
    attention_is_right(backend, batch, got, whole.arrays(), "attention in chunks")


def rewriting_seals_again(backend: Backend, batch: Batch, kept: list[int]) -> None:
    """KIVI: tokens written, forgotten from ``kept`` on, and written again with other contents leave the same bits as
    if only the latter had been written."""
    other = [np.concatenate([x[:n], x[n:][::-1] * 2]) for x, n in zip(batch.packed, kept)]
    cache, expected = Cache(backend, batch.layout), written_cache(backend, batch)
    cache.write(replace(batch, packed=other).everything)
    cache.write(batch.tokens([(seq, n, int(end)) for seq, (n, end) in enumerate(zip(kept, batch.seq_lens))]))
    rewritten = cache.bytes()
    for name, pool in expected.bytes().items():
        assert same_bits(rewritten[name], pool), f"{name} remembers what was forgotten"


def wide_window_is_plain(backend: Backend, batch: Batch) -> None:
    """KIVI with a window that covers every sequence is ``paged_attention`` over the window's blocks."""
    batch = replace(batch, options=batch.options | {"window": int(batch.seq_lens.max(initial=0))})
    cache = written_cache(backend, batch)
    plain = replace(
        batch,
        layout=replace(batch.layout, format="plain", num_blocks=batch.layout.num_window_blocks),
        block_table=batch.window_block_table,
        options={name: value for name, value in batch.options.items() if name != "window"},
    )
    arrays = {name.replace("window", "cache"): cache.arrays()[name] for name in ("k_window", "v_window")}
    attention_is_right(backend, plain, cache.attend(batch), arrays, "KIVI with a wide window")


def copied_blocks_are_deep_copies(backend: Backend, batch: Batch) -> None:
    """Sequences whose blocks were copied attend from the copies as they did from the sources, bit for bit, and the
    sources may then be overwritten."""
    sizes = {"block_table": batch.layout.num_blocks, "window_block_table": batch.layout.num_window_blocks}
    doubled = {"num_blocks": 2 * sizes["block_table"], "num_window_blocks": 2 * sizes["window_block_table"]}
    batch = replace(batch, layout=replace(batch.layout, **doubled))
    cache = written_cache(backend, batch)
    expected = cache.attend(batch)

    for name, pool in cache.pools.items():
        table = "window_block_table" if name.endswith("_window") else "block_table"
        rows = pool.reshape(len(pool), int(np.prod(pool.shape[1:])))
        sources = np.unique(getattr(batch, table))
        sources = sources[sources >= 0]
        ids = backend.from_host(sources)
        assert backend.copy_blocks(rows, ids, backend.from_host(sources + sizes[table])) is None, (
            "copies return nothing"
        )
        rows[ids] = backend.from_host(garbage_like(np.asarray(backend.to_host(rows))[sources]))
    tables = {name: getattr(batch, name) for name in sizes}
    copies = {name: np.where(table < 0, table, table + np.int32(sizes[name])) for name, table in tables.items()}
    assert same_bits(cache.attend(batch, **copies), expected), "a copy does not attend as its source did"


def garbage_like(x: Array) -> Array:
    """Random bytes of a shape and dtype."""
    shape = (*x.shape[:-1], x.shape[-1] * x.itemsize)
    return np.random.default_rng(3).integers(0, 256, shape, np.uint8).view(x.dtype)


def swapped_blocks_come_back(backend: Backend, pool: Array, block_ids: Array, new_ids: Array) -> None:
    """Rows that are swapped out survive whatever happens to the pool, and come back bit for bit elsewhere, touching no
    other row. The pool is the left half of a wider one, so its rows are strided."""
    width = pool.shape[1] // 2
    wide = backend.from_host(pool.copy())
    rows = backend.swap_out(wide[:, :width], backend.from_host(block_ids))
    unchanged(backend, "the pool", wide, pool)
    wide[:, :width] = wide[:, width:]
    expected = np.array(backend.to_host(wide))
    unchanged(backend, "what was swapped out", rows, pool[block_ids, :width])
    assert backend.swap_in(rows, wide[:, :width], backend.from_host(new_ids)) is None, "swap_in returns nothing"
    expected[new_ids, :width] = pool[block_ids, :width]
    unchanged(backend, "a row that was not swapped in", wide, expected)


def copies_move_only_their_targets(backend: Backend, pool: Array, source_ids: Array, target_ids: Array) -> None:
    """``copy_blocks`` makes every target row its source, for any dtype, and touches nothing else."""
    width = pool.shape[1] // 2
    wide = backend.from_host(pool.copy())
    backend.copy_blocks(wide[:, :width], backend.from_host(source_ids), backend.from_host(target_ids))
    expected = pool.copy()
    for source, target in zip(source_ids, target_ids):
        expected[target, :width] = pool[source, :width]
    unchanged(backend, "a row that was no target", wide, expected)


# ---- lossless ---------------------------------------------------------------------------------------------------


def lossless_is_lossless(backend: Backend, words: Array, format: str) -> None:
    """Every word comes back, no block is larger than stored with its header, and what lies behind a block's size is
    never read."""
    num_blocks, num_values = words.shape
    placed = backend.from_host(words.copy())
    codes, sizes = (np.array(backend.to_host(x)) for x in backend.encode_lossless(placed, format=format))
    unchanged(backend, "words", placed, words)
    assert codes.shape == (num_blocks, 4 + 2 * num_values), f"expected room for stored blocks, got {codes.shape}"
    assert codes.dtype == np.uint8, f"codes: expected uint8, got {codes.dtype}"
    assert sizes.dtype == np.int64, f"sizes: expected int64, got {sizes.dtype}"
    assert (sizes <= 4 + 2 * num_values).all(), f"a block grew: {sizes}"
    for row, size in zip(codes, sizes):
        row[size:] = 0xA5
    place = backend.from_host
    back = backend.decode_lossless(place(codes), place(sizes), num_values=num_values, format=format)
    back = np.array(backend.to_host(back))
    wrong = np.argwhere(back != words)
    assert same_bits(back, words), f"{len(wrong)} words changed, the first at block and value {wrong[:1]}"


def lossless_codes_are_the_oracles(backend: Backend, oracle: Backend, words: Array, format: str) -> None:
    """The choice of width and base is part of the contract, so a block coded on one backend is read on another."""
    got, expected = (
        [np.array(b.to_host(x)) for x in b.encode_lossless(b.from_host(words.copy()), format=format)]
        for b in (backend, oracle)
    )
    assert same_bits(got[1], expected[1]), f"sizes: expected {expected[1]}, got {got[1]}"
    assert same_bits(got[0], expected[0]), "codes: not the oracle's bytes"


def coded_rows_come_back(backend: Backend, words: Array, layout: WordLayout) -> None:
    """Rows come back bit for bit, those and in the order asked for; none has grown by more than a header."""
    rows = np.ascontiguousarray(words).view(np.uint8)
    coded = CodedRows.encode(backend.from_host(rows.copy()), layout, backend)
    assert len(coded) == len(rows)
    assert coded.nbytes <= rows.nbytes + HEADER_BYTES * len(rows), f"{rows.nbytes} bytes grew to {coded.nbytes}"
    order = [*range(len(rows))][::-2]
    for got, expected in ((coded, rows), (coded[order], rows[order])):
        back = np.array(backend.to_host(got.decode(backend)))
        assert back.dtype == np.uint8, f"rows: expected uint8, got {back.dtype}"
        assert same_bits(back, expected), f"{np.count_nonzero(back != expected)} bytes changed"


# ---- the door ---------------------------------------------------------------------------------------------------


def refuses(backend: Backend, op: str, arguments: dict[str, Any], **changed: Any) -> None:
    """The op takes ``arguments``, and raises a ValueError that names an argument when some are replaced."""
    call, message = getattr(backend, op), None
    call(**placed(backend, arguments))
    try:
        call(**placed(backend, arguments | changed))
    except ValueError as error:
        message = str(error)
    assert message is not None, f"{op} accepted a wrong {', '.join(changed)}"
    assert any(name in message for name in arguments), f"{op}: the error names no argument: {message}"


def placed(backend: Backend, arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: backend.from_host(x.copy()) if isinstance(x, np.ndarray) else x for n, x in arguments.items()}


def refuses_wrong_arrays(
    backend: Backend, op: str, arguments: dict[str, Any], fine: Collection[tuple[str, int | str]] = ()
) -> None:
    """Every array argument is refused with an axis too short, an axis too many, or another kind of dtype.

    Args:
        fine: (argument, axis) and (argument, "dtype") of changes that make just another call.
    """
    for name, array in arguments.items():
        if isinstance(array, np.ndarray):
            wrong = {axis: np.delete(array, 0, axis) for axis in range(array.ndim)}
            wrong |= {"axes": array[None], "dtype": array.astype(np.float32 if array.dtype.kind in "iu" else np.int64)}
            for change, changed in wrong.items():
                if (name, change) not in fine:
                    refuses(backend, op, arguments, **{name: changed})
