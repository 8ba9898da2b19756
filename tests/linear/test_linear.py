"""The dense linear layer."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
from fast.linear._skinny import Tiles, choose_tiles, skinny_linear
from fast.linear._split import Split, choose_split, describable, most_tokens, split_linear
from fast.linear.linear import choose_way
from twofold.conformance.backends import float_dtypes
from twofold.conformance.properties import linear as properties
from twofold.conformance.properties.fusion import matches_the_oracle, writes_only_where_it_says
from twofold.conformance.strategies.fusion import Call
from twofold.conformance.strategies.linear import linear_calls

calls = linear_calls("linear")


@given(call=calls)
def test_matches_the_oracle(backend, call):
    properties.matches_the_oracle(backend, call)


@settings(max_examples=200)
@given(call=calls, data=st.data())
def test_tokens_do_not_depend_on_company(backend, call, data):
    keep = data.draw(st.lists(st.sampled_from(range(len(call.arrays["x"]) or 1)), unique=True, max_size=3), "keep")
    properties.tokens_do_not_depend_on_company(backend, call, keep if len(call.arrays["x"]) else [])


@given(call=calls)
def test_writes_only_where_it_says(backend, call):
    writes_only_where_it_says(backend, call)
    properties.honours_out(backend, call)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("in_features", [200, 1536, 1537])
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 32, 33, 65])
def test_each_way_is_taken(num_tokens, in_features, dtype):
    """One token, few, and many go different ways in `fast`, rows that begin anywhere another; all of them arrive."""
    narrow = in_features == 1537 or num_tokens == 2
    few = "cublas" if dtype == "float32" else "split" if not narrow else "few" if num_tokens <= 32 else "cublas"
    way = {1: "one", 65: "cublas"}.get(num_tokens, few)
    rng = np.random.default_rng(num_tokens)
    shapes = {"x": (num_tokens, in_features), "weight": (70, in_features), "residual": (num_tokens, 70), "bias": (70,)}
    arrays = {name: rng.normal(size=shape).astype(getattr(ml_dtypes, dtype, dtype)) for name, shape in shapes.items()}
    x, weight = (fast.from_host(arrays[name]) for name in ("x", "weight"))
    splittable = num_tokens <= most_tokens(*weight.shape, 132) and describable(x, weight)
    assert choose_way(num_tokens, 70, x.dtype, weight.dtype, splittable) == way
    matches_the_oracle(fast, Call("linear_add", arrays))
    properties.matches_the_oracle(fast, Call("linear", {name: arrays[name] for name in ("x", "weight", "bias")}))


def test_ways_of_other_operands():
    """A weight in another dtype than the activations is not rounded to theirs; tiles that would fill few of the
    processors, or most but not all, are made narrower."""
    half, whole = torch.bfloat16, torch.float32
    assert choose_way(2, 4096, half, whole, True) == "tiles"
    ways = [choose_way(8, n, half, half, True) for n in (1024, 4096, 6144, 28672)]
    assert ways == ["few", "split", "few", "split"]
    assert choose_way(9, 1024, half, half, True) == "split"


def test_cuts_suit_the_layer():
    """One token: never more columns at a time than there are. Few: a small weight is split, a large one is not."""
    for in_features in (64, 576, 4096):
        assert choose_tiles(1, 4096, in_features, 2).columns <= max(2 * in_features, 256)
    for is_plain in (True, False):
        tiles = {choose_tiles(1, n, k, 2, is_plain) for n, k in ((1024, 3072), (4096, 4096), (4096, 1024))}
        assert len(tiles) == 3, "few rows, long rows, short rows"
    for num_tokens in (2, 8, 9, 16, 17, 32):
        assert choose_tiles(num_tokens, 4096, 4096, 2).tokens >= num_tokens
        assert choose_split(num_tokens, 1024, 4096, 132).splits > 1
        assert choose_split(num_tokens, 28672, 4096, 132).splits == 1
        assert choose_split(num_tokens, 1024, 4096, 132).tokens >= num_tokens
    assert choose_split(16, 1024, 600, 132).splits == 1, "too few columns to be shared out"
    assert choose_split(32, 4096, 4096, 132).stages > choose_split(32, 6144, 4096, 132).stages, "alone, and not"
    assert [most_tokens(*sizes, 132) for sizes in ((4096, 1024), (151936, 1024), (4096, 14336))] == [64, 32, 128]


@pytest.mark.parametrize("num_tokens", [33, 64, 65, 128])
@pytest.mark.parametrize("sizes", [(1024, 512), (1024, 1024), (4096, 14336), (28672, 4096)])
def test_cuts_of_more_tokens_fit(num_tokens, sizes):
    """All of them in one tile, whose buffers fit into a processor, two of them at least."""
    split = choose_split(num_tokens, *sizes, 132)
    assert split.tokens >= num_tokens
    assert split.stages >= 2
    assert split.stages * (split.tokens + split.rows) * split.columns * 2 <= 2**17 * 3 // 2
    assert split.splits * -(-sizes[0] // split.rows) <= 132 or split.splits == 1


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_one_token_with_any_number_of_rows_a_program(rows):
    """What is chosen on a GPU alone is right in the interpreter too."""
    rng = np.random.default_rng(rows)
    x, weight = (fast.from_host(rng.normal(size=shape).astype(np.float32)) for shape in ((1, 500), (21, 500)))
    out = torch.full((1, 21), torch.nan, device=x.device)
    skinny_linear(x, weight, None, None, out, tiles=Tiles(rows, 128, 1, 1, 1))
    assert (out - x.double() @ weight.double().T).abs().max() < 2**-24 * 8 * 500


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_parts_are_added_up(splits):
    """However many programs share a tile's columns, once after another: the counters are zeros again each time."""
    rng = np.random.default_rng(splits)
    arrays = rng.normal(size=(9, 264)), rng.normal(size=(130, 264))
    x, weight = (fast.from_host(array.astype(np.float32)).to(torch.float16) for array in arrays)
    expected = x.double() @ weight.double().T
    for _ in range(3):
        out = torch.full((9, 130), torch.nan, dtype=x.dtype, device=x.device)
        split_linear(x, weight, None, None, out, Split(16, splits, 64, 3))
        assert (out - expected).abs().max() < 2**-11 * 128


@pytest.mark.needs("gpu")  # 4 GB of weights
@pytest.mark.parametrize("num_tokens", [1, 8, 64])
def test_more_than_2_31_weights(num_tokens):
    """The last row of so many is found, and it alone."""
    x, weight = (torch.zeros(n, 2**15, dtype=torch.bfloat16, device="cuda") for n in (num_tokens, 66_000))
    x += 1
    weight[-1] = 1
    for backend in (fast, fast.invariant):
        out = backend.linear(x, weight)
        assert (out[:, -1] == 2**15).all()
        assert not out[:, :-1].any()


@pytest.mark.parametrize("num_tokens", [1, 3, 80])
def test_float64_is_computed_in_float64(backend, num_tokens):
    """Sums of integers far beyond float32's 2**24 are exact; a backend without float64 refuses."""
    rng = np.random.default_rng(0)
    x, weight = rng.integers(-(2**20), 2**20, (num_tokens, 70)), rng.integers(-(2**20), 2**20, (9, 70))
    placed = [backend.from_host(array.astype(np.float64)) for array in (x, weight)]
    if "float64" not in float_dtypes(backend):
        with pytest.raises(ValueError, match="linear: x: expected"):
            backend.linear(*placed)
        return
    got = backend.to_host(backend.linear(*placed))
    assert got.dtype == np.float64, f"got {got.dtype}"
    assert np.array_equal(got, x @ weight.T), "not the integers' sums"


BAD = {
    "x": np.ones((2, 3, 1), np.float32),
    "weight": np.ones((4, 5), np.float32),
    "bias": np.ones(3, np.float32),
    "out": np.ones((4, 2), np.float32),
}
INTEGERS = {"x": np.ones((2, 3), int), "weight": np.ones((4, 3), np.int8), "bias": np.ones(4, int)}


@pytest.mark.parametrize(("named", "bad"), [*BAD.items(), *INTEGERS.items()])
def test_the_door_says_what_is_wrong(backend, named, bad):
    good = {"x": np.ones((2, 3)), "weight": np.ones((4, 3)), "bias": np.ones(4), "out": np.ones((2, 4))}
    good = {name: array.astype(np.float32) for name, array in good.items()}
    arrays = {name: backend.from_host(array) for name, array in (good | {named: bad}).items()}
    with pytest.raises(ValueError, match=f"linear: {named}: expected"):
        backend.linear(**arrays)
