"""The batch-invariant backend: a token's result is bit for bit the same alone and in any company.

No tolerance and no second try. Small inputs that Hypothesis draws run everywhere; sizes of real layers need a GPU.
"""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
import reference
from fast import invariant
from fast.linear._descriptors import BLOCKS, choose_block, matmul_described
from fast.linear._matmul import TILES, choose_tile, matmul
from fast.linear._split import split_linear, unsplit
from reference.model.decoder import Decoder
from twofold.conformance.properties import fusion as fusion_properties
from twofold.conformance.properties import kv_cache as cache_properties
from twofold.conformance.properties import linear as linear_properties
from twofold.conformance.properties import model as model_properties
from twofold.conformance.properties import parity
from twofold.conformance.properties.fusion import run
from twofold.conformance.strategies import fusion as fusion_calls
from twofold.conformance.strategies.kv_cache import batches
from twofold.conformance.strategies.linear import LINEAR_OPS, linear_calls, lora_calls
from twofold.conformance.strategies.model import random_model

TOKENS = [5, 9, 96, 0, 33, 33, 7, 61, 2, 18, 44, 90, 12]
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


@settings(max_examples=30 if HAS_GPU else 4)
@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
@given(data=st.data())
def test_attention_over_codes(format, data):
    """It is right; of its bits, the next test."""
    cache_properties.attends_over_what_is_stored(invariant, data.draw(batches(format)))


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_attention_over_codes_in_any_company(format):
    """A decode has the bits of that token in its prompt's chunk, alone or among other sequences."""
    rng, lens, block_size, num_kv_heads, head_dim = np.random.default_rng(0), [9, 40, 23], 4, 2, 16
    place = fast.from_host
    slots = np.concatenate([seq * 40 + np.arange(n) for seq, n in enumerate(lens)])  # ten blocks for each sequence
    arrays = cache_of(format, 30, block_size, num_kv_heads, head_dim)
    q, k, v = (rng.normal(size=(sum(lens), heads, head_dim)).astype(np.float32) for heads in (4, 2, 2))
    getattr(invariant, f"write_kv_{format}")(place(k), place(v), *arrays, place(slots))
    attend = getattr(invariant, f"paged_attention_{format}")
    table, ends = np.arange(30, dtype=np.int32).reshape(3, 10), np.cumsum(lens)
    offsets = np.array([0, *ends], np.int32)
    prefill = attend(place(q), *arrays, place(table), place(np.array(lens, np.int32)), place(offsets))
    decode = attend(
        place(q[ends - 1]), *arrays, place(table), place(np.array(lens, np.int32)), place(np.arange(4, dtype=np.int32))
    )
    assert torch.equal(decode, prefill[torch.from_numpy(ends - 1).to(prefill.device)])
    for seq, n in enumerate(lens):
        tables = table[seq : seq + 1], np.array([n], np.int32), np.array([0, 1], np.int32)
        alone = attend(place(q[ends[seq] - 1][None]), *arrays, *map(place, tables))
        assert torch.equal(alone[0], decode[seq]), f"sequence {seq}"


def cache_of(format: str, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> list[torch.Tensor]:
    """The arrays of an empty cache, in the order of the ops' arguments."""
    shape, device = (num_blocks, block_size, num_kv_heads), fast.empty((1,), dtype="float32").device
    if format == "int4":
        codes = [torch.zeros(*shape, head_dim // 2, dtype=torch.uint8, device=device) for _ in range(2)]
        return codes + [torch.zeros(*shape, 1, dtype=torch.float16, device=device) for _ in range(4)]
    dtype = torch.int8 if format == "int8" else torch.float8_e4m3fn
    codes = [torch.zeros(*shape, head_dim, dtype=torch.int8, device=device).view(dtype) for _ in range(2)]
    return codes + [torch.zeros(*shape, device=device) for _ in range(2)]


@pytest.mark.parametrize(
    ("dtype", "weight_format", "kv_format"),
    [("float32", "auto", "auto"), ("float16", "int8", "auto"), ("bfloat16", "int4-32", "int8")],
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
