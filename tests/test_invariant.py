"""The batch-invariant backend: a token's result is bit for bit the same alone and in any company.

No tolerance and no second try. Small inputs that Hypothesis draws run everywhere; sizes of real layers need a GPU.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fast
import reference
from fast import invariant
from fast.attention import invariant_attention
from fast.linear import _descriptors, _matmul
from fast.linear._descriptors import BLOCKS, choose_block, matmul_described
from fast.linear._matmul import TILES, choose_tile, matmul
from fast.linear._split import split_linear, unsplit
from reference.kv_cache.formats import KV_FORMATS
from reference.model.decoder import Decoder
from twofold.conformance.properties import fusion as fusion_properties
from twofold.conformance.properties import kv_cache as cache_properties
from twofold.conformance.properties import linear as linear_properties
from twofold.conformance.properties import model as model_properties
from twofold.conformance.properties import parity
from twofold.conformance.properties.fusion import run
from twofold.conformance.strategies import fusion as fusion_calls
from twofold.conformance.strategies.kv_cache import Batch, Layout, batches, values
from twofold.conformance.strategies.linear import LINEAR_OPS, linear_calls, lora_calls
from twofold.conformance.strategies.model import random_model

TOKENS = [5, 9, 96, 0, 33, 33, 7, 61, 2, 18, 44, 90, 12]
CODED = ["int8", "fp8", "int4", "kivi"]
HAS_GPU = torch.cuda.is_available()
PER_TOKEN = ("x", "residual", "gate_up", "base", "adapter_ids", "token_ids", "q", "k", "v", "positions", "slot_mapping")
few = settings(max_examples=50 if HAS_GPU else 20)


@pytest.mark.parametrize("name", reference.__all__)
def test_every_op_is_there(name):
    parity.has_every_op(invariant)
    parity.signature_agrees(invariant, name)


def test_what_it_lacks_it_says():
    with pytest.raises(AttributeError, match="no attribute 'convolution'"):
        _ = invariant.convolution


def rows_stay_the_same(call, order) -> None:
    """The tokens of ``order``, alone and among all, have the same bits in every result."""
    whole = run(invariant, call)
    picked = call.with_arrays(**{name: a[order] for name, a in call.arrays.items() if name in PER_TOKEN})
    for name, got in run(invariant, picked).items():
        expected = whole[name] if name in call.mutates else whole[name][order]
        same = np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(expected).tobytes()
        assert same, f"{call.op}: {name}: tokens {order} differ from themselves in the batch"


def some_tokens(data, num_tokens: int) -> np.ndarray:
    """Some of the tokens, in another order and some of them twice: their places in the batch change."""
    chosen = data.draw(st.lists(st.integers(0, num_tokens - 1), max_size=9), "tokens") if num_tokens else []
    return np.array(chosen, np.intp)


@few
@given(call=linear_calls("linear"), data=st.data())
def test_linear(call, data):
    linear_properties.matches_the_oracle(invariant, call)
    rows_stay_the_same(call, some_tokens(data, len(call.arrays["x"])))


@settings(max_examples=50 if HAS_GPU else 4)
@pytest.mark.parametrize("op", [op for op in LINEAR_OPS if op != "linear"])
@given(data=st.data())
def test_quantized_and_sparse_layers(op, data):
    call = data.draw(linear_calls(op))
    rows_stay_the_same(call, some_tokens(data, len(call.arrays["x"])))


@few
@given(call=lora_calls(), data=st.data())
def test_lora(call, data):
    rows_stay_the_same(call, some_tokens(data, len(call.arrays["x"])))


@few
@given(call=fusion_calls.norm_calls() | fusion_calls.linear_add_calls() | fusion_calls.swiglu_calls(), data=st.data())
def test_fused_layers(call, data):
    fusion_properties.matches_the_oracle(invariant, call)
    num_tokens = next(len(array) for name, array in call.arrays.items() if name in PER_TOKEN)
    rows_stay_the_same(call, some_tokens(data, num_tokens))


@few
@given(call=fusion_calls.embedding_calls() | fusion_calls.rotary_calls("rotary"), data=st.data())
def test_embedding_and_rotary(call, data):
    num_tokens = next(len(array) for name, array in call.arrays.items() if name in PER_TOKEN)
    rows_stay_the_same(call, some_tokens(data, num_tokens))


@pytest.fixture
def short_parts(monkeypatch):
    """Parts so short that drawn sequences have several."""
    monkeypatch.setattr(invariant_attention, "SPLIT", 10)


@settings(max_examples=30 if HAS_GPU else 8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("format", CODED)
@given(data=st.data())
def test_attention_over_codes(short_parts, format, data):
    """It is right; of its bits, the next tests."""
    cache_properties.attends_over_what_is_stored(invariant, data.draw(batches(format)))


@settings(max_examples=30 if HAS_GPU else 3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("format", CODED)
@given(data=st.data())
def test_attention_over_codes_reads_nothing_else(short_parts, format, data):
    """What nobody owns, and what no query sees, changes nothing."""
    batch = data.draw(batches(format))
    cache_properties.unowned_slots_do_not_matter(invariant, batch)
    cache_properties.padding_of_the_table_does_not_matter(invariant, batch)


@settings(max_examples=50 if HAS_GPU else 6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("format", CODED)
@given(data=st.data())
def test_attention_over_codes_in_any_company(short_parts, format, data):
    """Any chunks of any of the sequences, in any order and number, have the bits of whole prompts side by side."""
    batch = data.draw(batches(format, share=False, whole=True))
    cache = cache_properties.written_cache(invariant, batch)
    whole = cache.attend(batch)
    spans = [
        (seq, first, end) for seq, n in enumerate(batch.seq_lens) for end in range(1, n + 1) for first in range(end)
    ]
    chunks = data.draw(st.lists(st.sampled_from(spans), min_size=1, max_size=4), "chunks") if spans else []
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans(), "no sequence is cut"):
            patch.setattr(invariant_attention, "MOST_SCRATCH", 0)
        chunks_are_as_in_the_whole(cache, batch, whole, chunks)


def chunks_are_as_in_the_whole(cache, batch, whole, chunks) -> None:
    """``chunks`` are (sequence, first query, last + 1) each, and sequences of a batch of their own."""
    seqs = [seq for seq, *_ in chunks]
    rows = np.concatenate([np.arange(0), *(batch.cu_seqlens_q[seq] + np.arange(*span) for seq, *span in chunks)])
    got = cache.attend(
        batch,
        q=batch.q[rows.astype(np.intp)],
        block_table=batch.block_table[seqs],
        window_block_table=batch.window_block_table[seqs],
        seq_lens=np.array([end for *_, end in chunks], np.int32),
        cu_seqlens_q=np.cumsum([0, *(end - first for _, first, end in chunks)]).astype(np.int32),
    )
    expected = np.ascontiguousarray(whole[rows.astype(np.intp)])
    same = got.tobytes() == expected.tobytes()
    assert same, f"{chunks}: {np.count_nonzero(got != expected)} of {got.size} numbers have other bits"


@pytest.mark.parametrize("format", ["plain", *CODED])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_long_attention_in_any_company(format, dtype):
    """Decodes, alone and together, and chunks: of more keys than a tile has, and on a GPU of several parts."""
    batch = prompts(format, dtype, [900, 4100, 2300] if HAS_GPU else [9, 70, 34])
    cache = cache_properties.written_cache(invariant, batch)
    whole = cache.attend(batch)
    last = [(seq, int(n) - 1, int(n)) for seq, n in enumerate(batch.seq_lens)]
    cut = [(seq, int(n) // 3, int(n) // 2) for seq, n in enumerate(batch.seq_lens)]
    for chunks in (last, [last[1]], [cut[2], last[1], cut[0], last[0], cut[1]]):
        chunks_are_as_in_the_whole(cache, batch, whole, chunks)


def prompts(format: str, dtype: str, lens: list[int]) -> Batch:
    """Whole prompts, in shuffled blocks; KIVI's window is no multiple of its groups."""
    block_size, rng = 16, np.random.default_rng(0)
    blocks_of = [-(-n // block_size) for n in lens]
    layout = Layout(
        format, sum(blocks_of), sum(blocks_of), block_size, num_kv_heads=2, head_dim=64 if HAS_GPU else 16,
        num_groups=2, group_size=8, bits=2, dtype=dtype,
    )  # fmt: skip
    table = np.full((len(lens), max(blocks_of)), -1, np.int32)
    for row, count, ids in zip(table, blocks_of, np.split(rng.permutation(sum(blocks_of)), np.cumsum(blocks_of))):
        row[:count] = ids
    packed = [values(rng, (n, 4, layout.head_dim), "normal", dtype) for n in lens]
    q, lengths = values(rng, (sum(lens), 8, layout.head_dim), "normal", dtype), np.array(lens, np.int32)
    options = {"window": 21} if format == "kivi" else {}
    return Batch(layout, "normal", lengths, lengths, table, table, packed, 0, q, options)


@pytest.mark.parametrize(
    ("dtype", "weight_format", "kv_format"),
    [
        ("float32", "auto", "auto"),
        ("float16", "int8", "auto"),
        ("bfloat16", "int4-32", "int8"),
        ("float16", "auto", "fp8"),
        ("bfloat16", "auto", "int4"),
        ("bfloat16", "auto", replace(KV_FORMATS["kivi2"], window=3, group_size=4)),
        ("float32", "auto", replace(KV_FORMATS["kivi4"], window=5, group_size=2)),
    ],
)
def test_a_model_in_any_company(dtype, weight_format, kv_format):
    """A whole decoder: a sequence's logits alone, in one step, are bit for bit those it has in a batch, in chunks."""
    model = random_model("qwen3", seed=7, num_layers=2 if HAS_GPU else 1, hidden_size=64, head_dim=16)
    decoder = Decoder(*model, backend=invariant, dtype=dtype, weight_format=weight_format)
    sequences = [TOKENS, TOKENS[4:8]]
    options = {"kv_format": kv_format, "block_size": 8}
    together = model_properties.paged_logits(decoder, sequences, [[12, 3], [1, 1]], **options)
    for tokens, logits in zip(sequences, together, strict=True):
        (alone,) = model_properties.paged_logits(decoder, [tokens], [[len(tokens)]], **options)
        assert logits.tobytes() == alone.tobytes(), f"{len(tokens)} tokens: {(logits != alone).mean():.1%} differ"


def test_small_and_large_tiles_are_chosen():
    """One token takes the smallest tile, a long prompt the largest, and every size has its turn."""
    half, whole = torch.bfloat16, torch.float32
    ways = [invariant.choose_way(n, half, half, aligned) for n, aligned in ((1, True), (500, True), (1, False))]
    assert ways == ["few", "many", "pointers"]
    assert invariant.choose_way(1, whole, whole, True) == invariant.choose_way(1, half, whole, True) == "pointers"
    sizes = {n: choose_tile(n, 4096, 132, half) for n in (1, 16, 32, 64, 128, 256, 512, 1024, 4096)}
    assert sizes[1] == TILES[-1]
    assert sizes[4096] == TILES[0]
    assert len(set(sizes.values())) >= 5, f"chosen: {sizes}"
    assert {choose_block(n, 4096, 132) for n in range(65, 4096, 64)} == set(BLOCKS)


WAYS = {f"pointers {tile.rows}x{tile.tokens}": partial(matmul, tile=tile) for tile in TILES}
WAYS |= {f"descriptors {block.rows}x{block.tokens}": partial(matmul_described, block=block) for block in BLOCKS}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_all_tiles_agree(way, dtype):
    """Whichever kernel and tile is chosen, the bits are those of a few tokens, in the interpreter and on a GPU."""
    in_features, num_tokens, out_features = (4096, 300, 200) if HAS_GPU else (136, 18, 72)
    x, weight, residual = layer(num_tokens, in_features, out_features, dtype)
    this = WAYS[way](x, weight, None, residual, torch.full_like(residual, torch.nan))
    for first, last in ((0, 1), (0, 16), (1, 18)):
        few = torch.full_like(residual[first:last], torch.nan)
        split_linear(x[first:last], weight, None, residual[first:last], few, unsplit(last - first))
        different = (few != this[first:last]).float().mean()
        assert different == 0, f"{different:.1%} of the results of tokens {first} to {last} differ"


@pytest.mark.parametrize("way", WAYS)
def test_tiles_lie_side_by_side(monkeypatch, way):
    """Several tiles of tokens and of rows, in groups of which the last is not full; a processor has several."""
    monkeypatch.setattr(_matmul, "GROUP", 2)
    monkeypatch.setattr(_descriptors, "GROUP", 2)
    monkeypatch.setattr(_descriptors, "num_processors", lambda array: 4)
    x, weight, residual = layer(290, 40, 304, torch.float16)
    bias = residual[0].clone()
    out = WAYS[way](x, weight, bias, residual, torch.full_like(residual, torch.nan)).double()
    x, weight, residual, bias = (array.double() for array in (x, weight, residual, bias))
    magnitude = x.abs() @ weight.abs().T + residual.abs() + bias.abs()
    right = (out - (x @ weight.T + residual + bias)).abs() <= 2**-10 * magnitude  # NaN is not
    assert right.all(), f"{(~right).sum()} of {right.numel()} are wrong, the first at {(~right).nonzero()[0].tolist()}"


@pytest.mark.needs("gpu")  # sizes of real layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("in_features", "out_features"), [(4096, 4096), (14336, 4096), (576, 1536)])
def test_real_layers(in_features, out_features, dtype):
    """One token of 2100, in batches of every size and at several places in them."""
    x, weight, residual = layer(2100, in_features, out_features, dtype)
    norm = torch.rand(in_features, device=fast.empty((1,), dtype="float32").device).to(dtype) + 0.5
    ops = {
        "linear": lambda rows: invariant.linear(x[rows], weight),
        "linear_add": lambda rows: invariant.linear_add(x[rows], weight, residual[rows]),
        "rms_norm_linear": lambda rows: invariant.rms_norm_linear(x[rows], norm, weight, eps=1e-5),
    }
    for name, op in ops.items():
        whole = op(slice(None))
        for size in (1, 2, 8, 9, 16, 17, 33, 64, 65, 128, 200, 256, 300, 512, 700, 1024, 1500, 2048):
            for start in {0, 1, 777, 2100 - size}:
                rows = slice(start, min(start + size, 2100))
                assert torch.equal(op(rows), whole[rows]), f"{name}: {size} tokens from {start}"


def layer(num_tokens: int, in_features: int, out_features: int, dtype: torch.dtype):
    """Activations, a weight whose rows differ in size, and a residual."""
    rng = np.random.default_rng(num_tokens)
    shapes = (num_tokens, in_features), (out_features, in_features), (num_tokens, out_features)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    arrays[1] *= np.exp2(rng.integers(-4, 4, (out_features, 1))).astype(np.float32)
    return [fast.from_host(array).to(dtype) for array in arrays]
