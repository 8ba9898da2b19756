"""What every backend's attention ops must satisfy.

Each property takes a ``backend`` (a module or object with the interface's names) and a drawn case, and raises an
``AssertionError`` that says what is wrong. Results are judged by the one rule of `twofold.conformance.tolerance`. Where
two results of the same backend are compared, each may be off by its bound, so they may differ by twice that.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from reference.numerics.arrays import dtype_named
from twofold.conformance.backends import assume_supported
from twofold.conformance.strategies.attention import AttentionCase, PackedCase, PagedCase, StatesCase, offsets
from twofold.conformance.tolerance import (
    assert_within,
    attention_baseline_bound,
    attention_bound,
    baseline_error,
    lse_bound,
)

Backend = ModuleType | Any
OUT_AXES = ("token", "head", "dim")
LSE_AXES = ("token", "head")


# ---- the ops on a case, results on the host ---------------------------------------------------------------------


def dense_of(backend: Backend, case: AttentionCase) -> np.ndarray:
    """``dense_attention`` of every sequence, packed."""
    parts = [case.host_q[:0, : case.num_heads]]
    for sequence in case.sequences:
        q, k, v = (backend.from_host(x) for x in (sequence.q, sequence.k, sequence.v))
        out = backend.dense_attention(q, k, v, causal=case.causal, **case.options(backend))
        parts.append(backend.to_host(out))
    return np.concatenate(parts)


def flash_of(backend: Backend, case: PackedCase) -> tuple[np.ndarray, np.ndarray]:
    out, lse = backend.flash_attention(*case.arguments(backend), causal=case.causal, **case.options(backend))
    return backend.to_host(out), backend.to_host(lse)


def paged_of(backend: Backend, case: PagedCase) -> np.ndarray:
    return backend.to_host(backend.paged_attention(*case.arguments(backend), **case.options(backend)))


def split_of(backend: Backend, case: PagedCase) -> tuple[np.ndarray, np.ndarray]:
    """``split_paged_attention``, the sinks (if there are any) as one more part."""
    options = case.options(backend)
    sinks = options.pop("sinks", None)
    parts = backend.split_paged_attention(*case.arguments(backend), split_size=case.split_size, **options)
    out_parts, lse_parts = map(backend.to_host, parts)
    if sinks is not None:
        of_sinks = np.broadcast_to(np.asarray(case.sinks).astype(lse_parts.dtype), lse_parts[:1].shape)
        out_parts = np.concatenate([out_parts, np.zeros_like(out_parts[:1])])
        lse_parts = np.concatenate([lse_parts, of_sinks])
    return out_parts, lse_parts


def merged_split_of(backend: Backend, case: PagedCase) -> np.ndarray:
    """The parts put together again, rounded to the dtype of the queries once, by ``out``."""
    parts = map(backend.from_host, split_of(backend, case))
    out = backend.empty((len(case.host_q), case.num_heads, case.head_dim), dtype=case.dtype)
    return backend.to_host(backend.merge_states(*parts, out=out)[0])


# ---- judging ----------------------------------------------------------------------------------------------------


def plain_torch() -> ModuleType:
    """The baseline of the rule; imported when first needed, because it needs torch."""
    from twofold.conformance import plain_torch

    return plain_torch


def out_bound(case: AttentionCase, baseline: np.ndarray) -> np.ndarray:
    """The rule for a case's output, given the plain torch backend's."""
    oracle = case.oracle
    error = baseline_error(baseline, oracle.out)
    return attention_bound(oracle.out, oracle.magnitude, oracle.score_magnitude, case.dtype, error, oracle.value_sum)


def assert_out(backend: Backend, case: AttentionCase, run: Callable[[Backend, Any], np.ndarray], what: str) -> None:
    """The result of ``run`` is right: within the rule; or, for the baseline itself, within what it is held to."""
    oracle, got = case.oracle, run(backend, case)
    assert got.dtype.name == case.dtype, f"{what}: expected the dtype of q, {case.dtype}, got {got.dtype}"
    if backend is plain_torch():
        sizes = oracle.magnitude, oracle.score_magnitude, case.num_keys
        bound = attention_baseline_bound(oracle.out, *sizes, case.dtype, oracle.value_sum)
    else:
        bound = out_bound(case, run(plain_torch(), case))
    assert_within(got, oracle.out, bound, what, OUT_AXES)


def assert_same(case: AttentionCase, got: np.ndarray, expected: np.ndarray, baseline: np.ndarray, what: str) -> None:
    """Two results of one backend that both claim to be the attention of this case."""
    assert_within(got, expected.astype(np.float64), 2 * out_bound(case, baseline), what, OUT_AXES)


# ---- right ------------------------------------------------------------------------------------------------------


def dense_matches_oracle(backend: Backend, case: AttentionCase) -> None:
    """Dense attention is the oracle's, element by element."""
    assume_supported(backend, *case.dtypes)
    assert_out(backend, case, dense_of, "dense_attention")


def flash_matches_oracle(backend: Backend, case: PackedCase) -> None:
    """Tiled attention over packed sequences is the oracle's, and so is its ``lse``."""
    assume_supported(backend, *case.dtypes)
    oracle, (out, lse) = case.oracle, flash_of(backend, case)
    assert_out(
        backend, case, lambda who, case: out if who is backend else flash_of(who, case)[0], "flash_attention: out"
    )
    expected = "float64" if case.dtype == "float64" else "float32"
    assert lse.dtype.name == expected, f"flash_attention: lse: expected {expected}, got {lse.dtype}"
    bound = lse_bound(oracle.lse, oracle.score_magnitude, case.num_keys, expected)
    if backend is not plain_torch():
        _, of_baseline = flash_of(plain_torch(), case)
        bound = bound + 2 * baseline_error(of_baseline[..., None], oracle.lse[..., None])[..., 0]
    assert_within(lse, oracle.lse, bound, "flash_attention: lse", LSE_AXES)


def paged_matches_oracle(backend: Backend, case: PagedCase) -> None:
    """Attention through the block table is the oracle's attention over each sequence's own tokens."""
    assume_supported(backend, *case.dtypes)
    assert_out(backend, case, paged_of, "paged_attention")


def merged_split_matches_oracle(backend: Backend, case: PagedCase) -> None:
    """Attention over ranges of tokens, merged, is the oracle's attention over all of them."""
    assume_supported(backend, *case.dtypes)
    assert_out(backend, case, merged_split_of, "split_paged_attention, merged")


def split_parts_are_partial(backend: Backend, case: PagedCase) -> None:
    """There are as many parts as the shapes say, in float32 or float64, and a part without keys is (0, -inf)."""
    assume_supported(backend, *case.dtypes)
    options = case.options(backend)
    options.pop("sinks", None)
    parts = backend.split_paged_attention(*case.arguments(backend), split_size=case.split_size, **options)
    out_parts, lse_parts = map(backend.to_host, parts)
    num_parts = max(1, -(-case.block_table.shape[1] * case.block_size // case.split_size))
    shape = (num_parts, len(case.host_q), case.num_heads)
    what = "split_paged_attention"
    assert out_parts.shape == (*shape, case.head_dim), f"{what}: expected parts {shape} x head_dim, {out_parts.shape}"
    assert lse_parts.shape == shape, f"{what}: expected lse_parts {shape}, got {lse_parts.shape}"
    dtype = "float64" if case.dtype == "float64" else "float32"
    dtypes = {out_parts.dtype.name, lse_parts.dtype.name}
    assert dtypes == {dtype}, f"{what}: expected parts in {dtype}, got {dtypes}"

    starts = case.split_size * np.arange(num_parts)[:, None]
    lens = np.array([n for n, queries in zip(case.seq_lens, case.query_lens) for _ in range(queries)], np.int64)
    unseen = starts >= lens  # whatever the window does
    assert np.isneginf(lse_parts[unseen]).all(), f"{what}: a part beyond its sequence has an lse above -inf"
    assert (out_parts[np.isneginf(lse_parts)] == 0).all(), f"{what}: a part without keys is not 0"


def merge_matches_oracle(backend: Backend, case: StatesCase) -> None:
    """Merged states are the weighted mean of the parts, and poison in a part without keys is not read."""
    assume_supported(backend, *case.dtypes)
    got, lse = map(backend.to_host, backend.merge_states(*case.arguments(backend)))
    dtype = "float64" if case.out_parts.dtype == np.float64 else "float32"
    assert (got.dtype, lse.dtype.name) == (case.out_parts.dtype, dtype), f"merge_states: got {got.dtype}, {lse.dtype}"
    expected, expected_lse, magnitude = merge_in_float64(case)
    size = lse_size(case)
    bound = attention_bound(expected, magnitude, size, got.dtype)
    assert_within(got, expected, bound, "merge_states: out", OUT_AXES)
    assert_within(
        lse, expected_lse, lse_bound(expected_lse, size, len(case.lse_parts), dtype), "merge_states: lse", LSE_AXES
    )


def merge_in_float64(case: StatesCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The merged output and lse, and the weighted mean of the parts' absolute values; nothing shared with the op."""
    lse_parts = case.lse_parts.astype(np.float64)
    lse = np.logaddexp.reduce(lse_parts, axis=0)
    with np.errstate(invalid="ignore"):  # -inf - -inf: a row without keys
        weights = np.nan_to_num(np.exp(lse_parts - lse))[..., None]
    parts = np.where(np.isneginf(lse_parts)[..., None], 0, case.out_parts.astype(np.float64))
    return (weights * parts).sum(axis=0), lse, (weights * np.abs(parts)).sum(axis=0)


def lse_size(case: StatesCase) -> np.ndarray:
    """The largest |lse| of a row's parts: what stands for the size of scores when states are merged."""
    return np.where(np.isneginf(case.lse_parts), 0, np.abs(case.lse_parts)).max(axis=0).astype(np.float64)


# ---- laws -------------------------------------------------------------------------------------------------------


def flash_equals_dense(backend: Backend, case: PackedCase) -> None:
    """Packing sequences and tiling their keys changes nothing."""
    assume_supported(backend, *case.dtypes)
    baseline = flash_of(plain_torch(), case)[0]
    assert_same(case, flash_of(backend, case)[0], dense_of(backend, case), baseline, "flash against dense")


def paged_equals_dense(backend: Backend, case: PagedCase) -> None:
    """Where keys and values lie changes nothing."""
    assume_supported(backend, *case.dtypes)
    expected = dense_of(backend, case)
    assert_same(case, paged_of(backend, case), expected, paged_of(plain_torch(), case), "paged against dense")


def split_equals_whole(backend: Backend, case: PagedCase) -> None:
    """Attention over ranges of tokens, merged, is attention over all of them."""
    assume_supported(backend, *case.dtypes)
    got, expected = merged_split_of(backend, case), paged_of(backend, case)
    assert_same(case, got, expected, paged_of(plain_torch(), case), "split against whole")


def chunked_equals_whole(backend: Backend, case: PagedCase, cut: int) -> None:
    """The same queries in two steps, the earlier ones while the later tokens were not there, change nothing."""
    assume_supported(backend, *case.dtypes)
    firsts = [(cut + seq) % (n + 1) for seq, n in enumerate(case.query_lens)]
    early = [replace(s, q=s.q[:n], k=s.k[: len(s.k) - len(s.q) + n]) for s, n in zip(case.sequences, firsts)]
    late = [replace(s, q=s.q[n:]) for s, n in zip(case.sequences, firsts)]
    seq_lens = np.array([len(s.k) if len(s.q) else 0 for s in early], np.int32)
    chunks = [
        np.split(paged_of(backend, chunk), chunk.cu_seqlens_q[1:-1])
        for chunk in (replace(case, sequences=early, seq_lens=seq_lens), replace(case, sequences=late))
    ]
    got = np.concatenate([case.host_q[:0, : case.num_heads], *(rows for pair in zip(*chunks) for rows in pair)])
    expected = paged_of(backend, case)
    assert_same(case, got, expected, paged_of(plain_torch(), case), "in chunks against whole")


def alone_equals_batched(backend: Backend, case: PagedCase) -> None:
    """What a sequence is batched with changes nothing."""
    assume_supported(backend, *case.dtypes)
    batched, baseline = paged_of(backend, case), paged_of(plain_torch(), case)
    for seq, rows in sequence_rows(case):
        one = slice(seq, seq + 1)
        alone = replace(
            case, sequences=case.sequences[one], block_table=case.block_table[one], seq_lens=case.seq_lens[one]
        )
        got = paged_of(backend, alone)
        assert_same(alone, got, batched[rows], baseline[rows], f"sequence {seq} alone against batched")


def merging_in_two_steps_changes_nothing(backend: Backend, case: StatesCase, cut: int) -> None:
    """Merging is associative: some of the parts first, then the rest."""
    assume_supported(backend, *case.dtypes)
    whole = backend.to_host(backend.merge_states(*case.arguments(backend))[0])
    cut = cut % len(case.out_parts)
    groups = [StatesCase(case.out_parts[s], case.lse_parts[s]) for s in (slice(0, cut), slice(cut, None))]
    merged = [map(backend.to_host, backend.merge_states(*g.arguments(backend))) for g in groups if len(g.out_parts)]
    twice = StatesCase(*(np.stack(arrays) for arrays in zip(*merged)))
    got = backend.to_host(backend.merge_states(*twice.arguments(backend))[0])
    _assert_same_merge(case, got, whole, 3, "merged in two steps against one")


def merging_in_any_order_changes_nothing(backend: Backend, case: StatesCase) -> None:
    """Merging is commutative."""
    assume_supported(backend, *case.dtypes)
    whole = backend.to_host(backend.merge_states(*case.arguments(backend))[0])
    reverse = StatesCase(case.out_parts[::-1].copy(), case.lse_parts[::-1].copy())
    got = backend.to_host(backend.merge_states(*reverse.arguments(backend))[0])
    _assert_same_merge(case, got, whole, 2, "merged in reverse")


def _assert_same_merge(case: StatesCase, got: np.ndarray, whole: np.ndarray, num_merges: int, what: str) -> None:
    expected, _, magnitude = merge_in_float64(case)
    bound = attention_bound(expected, magnitude, lse_size(case), got.dtype)
    assert_within(got, whole.astype(np.float64), num_merges * bound, what, OUT_AXES)


# ---- the contract -----------------------------------------------------------------------------------------------


def sequence_rows(case: AttentionCase) -> Iterator[tuple[int, slice]]:
    """The rows of each sequence in the packed batch."""
    ends = offsets(case.query_lens)
    return ((seq, slice(ends[seq], ends[seq + 1])) for seq in range(len(case.sequences)))


def arguments_are_unchanged(backend: Backend, op: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """The op leaves every argument as it was, bit for bit, poison included."""
    arrays = [*arguments, *(x for x in options.values() if hasattr(x, "shape"))]
    assume_supported(backend, *(str(x.dtype).removeprefix("torch.") for x in arrays))
    before = [np.array(backend.to_host(x)).tobytes() for x in arrays]
    getattr(backend, op)(*arguments, **options)
    for index, (x, content) in enumerate(zip(arrays, before)):
        assert np.array(backend.to_host(x)).tobytes() == content, f"{op}: array argument {index} was changed"


def out_is_honoured(
    backend: Backend,
    run: Callable[[Any], Any],
    dtype: str,
    ref64: np.ndarray,
    bound: np.ndarray,
    what: str,
) -> None:
    """The result is written to ``out``, which starts as NaN and is a view, and to nothing around it; it is returned.

    ``run(out)`` runs the op, and returns what it returns first.
    """
    shape = (len(ref64) + 2, *ref64.shape[1:])
    around = backend.from_host(np.full(shape, np.nan, dtype_named(dtype)))
    out = around[1:-1]
    assert run(out) is out, f"{what}: did not return out"
    written = backend.to_host(around)
    assert_within(written[1:-1], ref64, bound, f"{what}: out", OUT_AXES)
    edges = np.concatenate([written[:1], written[-1:]]).astype(np.float64)
    assert np.isnan(edges).all(), f"{what}: wrote beside out"


def dense_honours_out(backend: Backend, case: AttentionCase) -> None:
    """``dense_attention`` of the case's one sequence writes to ``out``."""
    assume_supported(backend, *case.dtypes)
    (s,) = case.sequences
    arguments = case.q(backend), backend.from_host(s.k), backend.from_host(s.v)
    options = case.options(backend) | {"causal": case.causal}
    bound = out_bound(case, dense_of(plain_torch(), case))

    def run(out: Any) -> Any:
        return backend.dense_attention(*arguments, out=out, **options)

    out_is_honoured(backend, run, case.dtype, case.oracle.out, bound, "dense_attention")


def flash_honours_out(backend: Backend, case: PackedCase) -> None:
    """``flash_attention`` writes its output to ``out``."""
    assume_supported(backend, *case.dtypes)
    arguments, options = case.arguments(backend), case.options(backend) | {"causal": case.causal}
    bound = out_bound(case, flash_of(plain_torch(), case)[0])

    def run(out: Any) -> Any:
        return backend.flash_attention(*arguments, out=out, **options)[0]

    out_is_honoured(backend, run, case.dtype, case.oracle.out, bound, "flash_attention")


def paged_honours_out(backend: Backend, case: PagedCase) -> None:
    """``paged_attention`` writes to ``out``, the rows of padded sequences too."""
    assume_supported(backend, *case.dtypes)
    arguments, options = case.arguments(backend), case.options(backend)
    bound = out_bound(case, paged_of(plain_torch(), case))

    def run(out: Any) -> Any:
        return backend.paged_attention(*arguments, out=out, **options)

    out_is_honoured(backend, run, case.dtype, case.oracle.out, bound, "paged_attention")


def merge_honours_out(backend: Backend, case: StatesCase, dtype: str) -> None:
    """``merge_states`` writes its output to ``out``, rounded to the dtype that ``out`` has."""
    assume_supported(backend, *case.dtypes)
    expected, _, magnitude = merge_in_float64(case)
    bound = attention_bound(expected, magnitude, lse_size(case), dtype)

    def run(out: Any) -> Any:
        return backend.merge_states(*case.arguments(backend), out=out)[0]

    out_is_honoured(backend, run, dtype, expected, bound, "merge_states")


# ---- the door ---------------------------------------------------------------------------------------------------


def refuses(backend: Backend, op: str, argument: str, arguments: dict[str, Any], because: str) -> None:
    """The op raises a ``ValueError`` that names itself and the argument."""
    message = None
    try:
        getattr(backend, op)(**{name: _to(backend, x) for name, x in arguments.items()})
    except ValueError as error:
        message = str(error)
    assert message is not None, f"{op}: {because}: expected a ValueError, got a result"
    named = op in message and argument in message
    assert named, f"{op}: {because}: the message does not name both {op} and {argument}: {message}"


def dense_arguments() -> dict[str, Any]:
    q, kv = np.ones((3, 4, 8), np.float32), np.ones((5, 2, 8), np.float32)
    return {"q": q, "k": kv, "v": kv}


def flash_arguments() -> dict[str, Any]:
    return dense_arguments() | {
        "cu_seqlens_q": np.array([0, 1, 3], np.int32),
        "cu_seqlens_k": np.array([0, 2, 5], np.int32),
    }


def paged_arguments() -> dict[str, Any]:
    cache = np.ones((4, 2, 2, 8), np.float32)
    return {
        "q": np.ones((3, 4, 8), np.float32),
        "k_cache": cache,
        "v_cache": cache,
        "block_table": np.array([[3, -1], [1, 0]], np.int32),
        "seq_lens": np.array([2, 3], np.int32),
        "cu_seqlens_q": np.array([0, 1, 3], np.int32),
    }


def merge_arguments() -> dict[str, Any]:
    return {"out_parts": np.ones((2, 3, 4, 8), np.float32), "lse_parts": np.ones((2, 3, 4), np.float32)}


VALID = {
    "dense_attention": dense_arguments,
    "flash_attention": flash_arguments,
    "paged_attention": paged_arguments,
    "split_paged_attention": lambda: paged_arguments() | {"split_size": 2},
    "merge_states": merge_arguments,
}


def bad_shapes(op: str) -> Iterator[tuple[str, Any, str]]:
    """(argument, value, because): wrong shapes, dtypes and host scalars, which every backend refuses.

    The value is a dictionary where more than one argument has to change.
    """
    arguments = VALID[op]()
    for name, x in arguments.items():
        if isinstance(x, np.ndarray):
            yield name, x[..., 0], "an axis too few"
            wrong_kind = x.astype(np.float32) if x.dtype.kind == "i" else x.astype(np.int32)
            yield name, wrong_kind, f"dtype {wrong_kind.dtype}"
    if op == "merge_states":
        yield "out_parts", arguments["out_parts"][:0], "no part"
        yield "lse_parts", arguments["lse_parts"][:, :2], "a token too few"
        yield "out", np.ones((2, 4, 8), np.float32), "out a token short"
        return
    k, v = ("k_cache", "v_cache") if "paged" in op else ("k", "v")
    yield "q", arguments["q"][:, :3], "3 heads over 2 KV heads"
    yield "q", arguments["q"][..., :7], "head_dim unlike the keys'"
    yield v, arguments[v][..., :7], f"head_dim unlike {k}'s"
    yield v, arguments[v][1:], f"fewer than {k}"
    yield "sliding_window", 0, "a window of nothing"
    yield "logit_cap", 0.0, "a cap of 0"
    yield "logit_cap", float("nan"), "a cap that is no number"
    yield "scale", float("inf"), "a scale that is not finite"
    if op != "split_paged_attention":
        yield "sinks", np.ones(3, np.float32), "3 sinks for 4 heads"
        yield "out", np.ones((2, 4, 8), np.float32), "out a token short"
        yield "out", np.ones((3, 4, 8), np.float16), "out in another dtype"
    else:
        yield "split_size", 0, "parts of nothing"
    if "paged" in op:
        slotless = arguments["k_cache"][:, :0]
        yield "k_cache", {"k_cache": slotless, "v_cache": slotless}, "blocks without slots"
        yield "block_table", arguments["block_table"][:1], "a row too few"
        yield "seq_lens", arguments["seq_lens"][:1], "a length too few"


def bad_values(op: str) -> Iterator[tuple[str, Any, str]]:
    """(argument, value, because): what a backend refuses if it reads values, as the reference does."""
    for name in ("cu_seqlens_q", "cu_seqlens_k") if op == "flash_attention" else ("cu_seqlens_q",):
        good = VALID[op]()[name]
        yield name, good - 1, "offsets from -1"
        yield name, good - np.array([0, 0, 1], np.int32), "offsets that end early"
        yield name, np.array([0, good[-1] + 1, good[-1]], np.int32), "offsets that fall"
    if op == "flash_attention":
        yield "cu_seqlens_k", np.array([0, 5], np.int32), "fewer sequences of keys than of queries"
        return
    yield "block_table", np.array([[4, -1], [1, 0]], np.int32), "a block id out of range"
    yield "block_table", np.array([[-2, -1], [1, 0]], np.int32), "a block id below -1"
    yield "block_table", np.array([[3, -1], [-1, 0]], np.int32), "a hole that a query sees"
    yield "block_table", np.array([[3, -1], [1, -1]], np.int32), "a sequence longer than its blocks"
    yield "seq_lens", np.array([2, 5], np.int32), "a sequence longer than its row"
    yield "seq_lens", np.array([2, 1], np.int32), "more queries than tokens"
    yield "seq_lens", np.array([-1, 3], np.int32), "a negative length"


def refuses_bad_shapes(backend: Backend, op: str) -> None:
    """A wrong shape, dtype or host scalar raises a ``ValueError`` that names the argument."""
    getattr(backend, op)(**{name: _to(backend, x) for name, x in VALID[op]().items()})  # what is varied is valid
    for argument, value, because in bad_shapes(op):
        changes = value if isinstance(value, dict) else {argument: value}
        refuses(backend, op, argument, VALID[op]() | changes, because)


def refuses_bad_values(backend: Backend, op: str) -> None:
    """An id, a length or an offset out of range raises a ``ValueError`` that names the argument."""
    for argument, value, because in bad_values(op):
        refuses(backend, op, argument, VALID[op]() | {argument: value}, because)


def _to(backend: Backend, x: Any) -> Any:
    return backend.from_host(x) if isinstance(x, np.ndarray) else x
