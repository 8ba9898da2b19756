"""Linear layers with codes for weights."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
import reference
from fast.linear import _eight_bit, _int4, _int4_few, _w8a8, quantized_linear
from reference.linear.quantized_linear import matmul_int8
from twofold.conformance.properties import linear as properties
from twofold.conformance.properties.fusion import run, writes_only_where_it_says
from twofold.conformance.strategies.fusion import Call
from twofold.conformance.strategies.linear import LINEAR_OPS, activations, int8_matrices, linear_calls

OPS = [op for op in LINEAR_OPS if op not in ("linear", "sparse_linear")]


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_matches_the_oracle(backend, op, data):
    properties.matches_the_oracle(backend, data.draw(linear_calls(op), "call"))


@settings(max_examples=400)
@given(call=st.sampled_from(OPS).flatmap(linear_calls), data=st.data())
def test_tokens_do_not_depend_on_company(call, data):
    tokens = list(range(len(call.arrays["x"])))
    keep = data.draw(st.lists(st.sampled_from(tokens), unique=True, max_size=3), "keep") if tokens else []
    properties.tokens_do_not_depend_on_company(reference, call, keep)


@pytest.mark.interpreted(6)
@pytest.mark.parametrize("op", OPS)
@settings(max_examples=25)
@given(data=st.data())
def test_writes_only_where_it_says(backend, op, data):
    call = data.draw(linear_calls(op), "call")
    writes_only_where_it_says(backend, call)
    properties.honours_out(backend, call)


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("op", ["linear_int8", "linear_int4"])
def test_a_feature_without_numbers_touches_no_other(backend, op, num_tokens):
    """Where the scales of an output feature are NaN, so are its results, and no others; over many rows, with a last
    group that is not full."""
    out_features, in_features, poisoned = 3000, 66, [0, 7, 1400, 2999]
    rng = np.random.default_rng(0)
    packed = in_features // 2 if op == "linear_int4" else in_features
    weight = rng.integers(0, 256, (out_features, packed), np.uint8).view(properties.LAYOUTS[op[7:]])
    scale = np.ones((out_features, 3), np.float32)
    scale[poisoned] = np.nan
    x = rng.normal(size=(num_tokens, in_features)).astype(np.float32)
    arrays = (backend.from_host(array) for array in (x, weight, scale))
    got = backend.to_host(getattr(backend, op)(*arrays, group_size=32))
    assert np.flatnonzero(np.isnan(got).any(axis=0)).tolist() == poisoned, "NaN elsewhere, or not everywhere"
    assert np.isnan(got[:, poisoned]).all(), "a number made of NaN"


@given(x=activations(), format=st.sampled_from(["int8", "float8_e4m3fn"]))
def test_quantizes_rows(backend, x, format):
    properties.quantizes_rows(backend, x, format)


@pytest.mark.parametrize("format", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_stays_so_and_touches_no_other(backend, format, poison):
    x = np.array([[1.0, -2.0], [1.0, poison], [0.0, 0.0]], np.float32)
    codes, scale = (backend.to_host(part) for part in backend.quantize_rows(backend.from_host(x), format=format))
    most = 127 if format == "int8" else 448
    np.testing.assert_allclose(scale, [2 / most, np.nan, 0], rtol=1e-6, err_msg="scales")
    assert codes.astype(np.float32)[1:].tolist() == [[0, 0], [0, 0]], f"codes of rows without a scale: {codes}"
    op = "linear_int8_int8" if format == "int8" else "linear_fp8_fp8"
    weight = np.eye(2, dtype=np.float32).astype(codes.dtype)
    out = getattr(backend, op)(*(backend.from_host(a) for a in (x, weight, np.ones(2, np.float32))))
    got = backend.to_host(out)
    assert np.isnan(got[1]).all(), f"a result from {poison}: {got[1]}"
    np.testing.assert_allclose(got[[0, 2]], x[[0, 2]], atol=0.01, err_msg="the other rows")


@pytest.mark.parametrize("format", ["int8", "float8_e4m3fn"])
def test_long_rows_are_rounded_in_parts(monkeypatch, format):
    """Wherever in a row the largest number is, or one that is none; the last part is not full."""
    monkeypatch.setattr(_w8a8, "TILE_COLUMNS", 16)
    x = np.random.default_rng(0).normal(size=(5, 39)).astype(np.float32)
    x[0, 3], x[1, 20], x[2, 38] = 30, -30, 30
    properties.quantizes_rows(fast, x, format)
    x[3, 20], x[4, 38] = np.nan, np.inf
    codes, scale = (fast.to_host(part) for part in fast.quantize_rows(fast.from_host(x), format=format))
    assert np.isnan(scale).tolist() == [False] * 3 + [True] * 2, f"scales {scale}"
    assert not codes[3:].astype(np.float32).any(), "codes of rows without a scale"


@settings(max_examples=200)
@given(matrices=int8_matrices())
def test_int8_sums_are_exact(backend, matrices):
    properties.int8_sums_are_exact(backend, *matrices)


@settings(max_examples=200)
@given(int8_matrices())
def test_matmul_int8_is_int64_arithmetic(matrices):
    """Element by element the integer that int64 gives, -128 and 127 throughout and the cut at 1024 included."""
    x, weight = matrices
    got = matmul_int8(x.astype(np.int8), weight)
    want = x.astype(np.int64) @ weight.astype(np.int64).T
    assert got.dtype == np.int32, f"got {got.dtype}"
    assert np.array_equal(got, want), f"off by {np.abs(got - want).max()}"


@pytest.mark.parametrize("layout", properties.LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (7, 96)])
def test_unpacks_what_it_packed(backend, layout, shape):
    stored = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    properties.unpacks_what_it_packed(backend, stored, layout)


@pytest.mark.parametrize("op", OPS)
def test_float64_is_computed_in_float64(op):
    """float64 in is float64 out, right to 1e-12 with the activations that the op itself rounds to."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 64)).round(1)
    x[:, 0] = 127 if op == "linear_int8_int8" else 448
    codes = rng.integers(0, 100, (5, 64), np.uint8)
    options = {"group_size": 64} if op == "linear_int4" else {}
    scale = rng.uniform(size=(5, 1) if op == "linear_int4" else (5,)).astype(np.float32)
    if op == "linear_int4":
        codes = codes[:, :32]
    weight = codes.view(properties.LAYOUTS[op.removeprefix("linear_")])
    got = getattr(reference, op)(x, weight, scale, **options)
    ref64, magnitude, _ = properties.oracle(
        reference, properties.Call(op, {"x": x, "weight": weight, "weight_scale": scale}, options)
    )
    assert got.dtype == np.float64, f"got {got.dtype}"
    assert (np.abs(got - ref64) <= 1e-12 * magnitude).all(), f"off by {np.abs(got - ref64).max()}"


# ---- the kernels of the fast backend --------------------------------------------------------------------------------


FP8_CODES = properties.LAYOUTS["fp8"]


def layer(op, num_tokens, in_features, group_size=None, dtype="bfloat16", bias=False, with_min=False, out_features=70):
    """A call with codes of every kind."""
    rng = np.random.default_rng(num_tokens)
    codes = rng.integers(0, 256, (out_features, in_features // (2 if op == "linear_int4" else 1)), np.uint8)
    if "fp8" in op:
        codes[codes & 0x7F == 0x7F] = 0
    groups = () if group_size is None else (-(-in_features // group_size),)
    scale = rng.uniform(0.01, 0.1, (out_features, *groups)).astype(np.float16 if groups else np.float32)
    x = rng.normal(size=(num_tokens, in_features)).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    arrays = {"x": x, "weight": codes.view(properties.LAYOUTS[op[7:]]), "weight_scale": scale}
    if with_min:
        arrays["weight_min"] = rng.normal(size=scale.shape).astype(scale.dtype)
    if bias:
        arrays["bias"] = rng.normal(size=out_features).astype(x.dtype)
    return Call(op, arrays, {} if group_size is None else {"group_size": group_size})


def with_and_without_residual(call):
    """The same call twice; what is added is as large as the result, and its rows lie apart."""
    rng = np.random.default_rng(0)
    shape = len(call.arrays["x"]), len(call.arrays["weight"])
    residual = np.pad(rng.normal(size=shape), [(0, 0), (0, 3)]).astype(call.arrays["x"].dtype)[:, :-3]
    return call, call.with_arrays(residual=residual)


def recorded(monkeypatch, owner, names):
    """Which of the functions ``names`` of ``owner`` (a module, or a dict of them) were called, in order."""
    seen = []
    for name in names:
        function = owner[name] if isinstance(owner, dict) else getattr(owner, name)
        spy = lambda *args, name=name, function=function, **kw: (seen.append(name), function(*args, **kw))[1]  # noqa: E731
        monkeypatch.setitem(owner, name, spy) if isinstance(owner, dict) else monkeypatch.setattr(owner, name, spy)
    return seen


@pytest.mark.parametrize("with_min", [False, True])
@pytest.mark.parametrize(
    ("kernel", "num_tokens", "in_features", "group_size", "dtype", "bias"),
    [
        ("few", 1, 256, 128, "bfloat16", True),
        ("few", 17, 192, 32, "float16", False),
        ("sums", 33, 256, 128, "bfloat16", False),
        ("sums", 65, 256, 64, "float16", True),
        ("many", 129, 256, 128, "bfloat16", False),
        ("many", 129, 256, 64, "float16", True),
        ("dense", 1024, 64, 32, "bfloat16", False),
        ("dense", 1024, 224, 32, "float16", False),  # an odd number of groups
        ("many", 1024, 64, 32, "bfloat16", True),  # cuBLAS would round before it adds the bias
        ("any", 3, 256, 128, "float32", True),
        ("any", 3, 256, 16, "bfloat16", False),
        ("any", 3, 320, 128, "bfloat16", False),  # the last group has 64
    ],
)
def test_each_kernel_for_4_bits(monkeypatch, kernel, num_tokens, in_features, group_size, dtype, bias, with_min):
    """Sizes choose a kernel, and each of them is right."""
    seen = recorded(monkeypatch, _int4.KERNELS, list(_int4.KERNELS))
    plain = layer("linear_int4", num_tokens, in_features, group_size, dtype, bias, with_min)
    for call in with_and_without_residual(plain):
        properties.matches_the_oracle(fast, call)
    assert seen == [kernel] * 2, f"expected the kernel {kernel}, got {seen}"


@pytest.mark.parametrize(("num_tokens", "out_features"), [(1, 8192), (2, 8192), (16, 8192), (16, 4096), (32, 8192)])
def test_4_bits_in_the_tiles_of_larger_layers(monkeypatch, num_tokens, out_features):
    """Every cut that sizes choose is right, on a layer that is small enough for the interpreter."""
    tiles = _int4_few.choose_few(num_tokens, out_features)
    assert tiles.tokens >= num_tokens
    monkeypatch.setattr(_int4_few, "choose_few", lambda *sizes: tiles)
    properties.matches_the_oracle(fast, layer("linear_int4", num_tokens, 640, 128, "bfloat16", False, True))


@pytest.mark.parametrize(
    ("op", "kernel", "num_tokens", "in_features", "group_size", "dtype"),
    [
        ("linear_int8", "few_tokens", 5, 100, None, "bfloat16"),
        ("linear_int8", "few_tokens", 5, 320, 32, "float16"),
        ("linear_int8", "many_tokens", 65, 100, None, "bfloat16"),
        ("linear_int8", "any_groups", 5, 100, 30, "bfloat16"),
        ("linear_int8", "any_groups", 5, 128, 32, "float32"),
        ("linear_fp8", "few_tokens", 5, 100, None, "float16"),
        ("linear_fp8", "many_tokens", 65, 96, None, "float16"),
        ("linear_fp8_fp8", "few_tokens", 64, 96, None, "bfloat16"),
        ("linear_fp8_fp8", "many_tokens", 65, 96, None, "float32"),
        ("linear_int8_int8", "few_tokens", 5, 96, None, "bfloat16"),
        ("linear_int8_int8", "many_tokens", 65, 100, None, "bfloat16"),  # rows that do not begin at 16 bytes
        ("linear_int8_int8", "bytes", 65, 96, None, "bfloat16"),
    ],
)
def test_each_kernel_for_8_bits(monkeypatch, op, kernel, num_tokens, in_features, group_size, dtype):
    """Sizes choose a kernel, and each of them is right."""
    seen = recorded(monkeypatch, _eight_bit, ["few_tokens", "many_tokens", "any_groups"])
    bytes_ = recorded(monkeypatch, _w8a8, ["many_tokens"])
    for call in with_and_without_residual(layer(op, num_tokens, in_features, group_size, dtype, bias=True)):
        properties.matches_the_oracle(fast, call)
    assert seen + ["bytes"] * len(bytes_) == [kernel] * 2, f"expected the kernel {kernel}, got {seen} and {bytes_}"


@pytest.mark.needs("interpreter")  # tiles so small are none to the tensor cores
def test_bands_of_tiles_cover_everything(monkeypatch):
    """Several tiles of tokens and of rows, in bands of which the last is not full."""
    monkeypatch.setattr(_w8a8, "TILE", (16, 32, 64))
    monkeypatch.setattr(_w8a8, "BAND", 2)
    seen = recorded(monkeypatch, _w8a8, ["many_tokens"])
    for call in with_and_without_residual(layer("linear_int8_int8", 70, 96, bias=True, out_features=150)):
        properties.matches_the_oracle(fast, call)
    assert len(seen) == 2, "the kernel with bands was not chosen"


def test_many_tokens_of_8_bit_floats(monkeypatch):
    """On a GPU `torch._scaled_mm` multiplies, and keeps what its sums may lose: 2**-10 of their magnitude, on positive
    numbers, where a short accumulator shows. Elsewhere, or with a bias, the kernel for many tokens does."""
    call = layer("linear_fp8_fp8", 256, 512, out_features=64)
    call = call.with_arrays(
        x=np.abs(call.arrays["x"]), weight=(call.arrays["weight"].view(np.uint8) & 0x7F).view(FP8_CODES)
    )
    native = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    assert quantized_linear.choose_eight_bit(256, torch.float8_e4m3fn, True) == "scaled_mm", "not even considered"
    size = np.abs(properties.expected(fast, call)[0])
    for wanted in with_and_without_residual(call):
        ref64, bound = properties.expected(fast, wanted)
        seen = recorded(monkeypatch, _w8a8, ["scaled_mm"])
        got = run(fast, wanted)["out"]
        assert seen == ["scaled_mm"] * native, f"`torch._scaled_mm` was called {len(seen)} times"
        properties.assert_within(got, ref64, bound + native * 2.0**-10 * size, "linear_fp8_fp8", ("token", "feature"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("op", "group_size"), [(op, None) for op in OPS if op != "linear_int4"] + [("linear_int4", 32), ("linear_int8", 32)]
)
def test_invariant_variants_do_not_see_the_batch(op, group_size, dtype):
    """A token's bits are the same alone, in a small batch and in a large one, wherever in it; and they are right."""
    call = with_and_without_residual(layer(op, 70, 96, group_size, dtype, bias=True))[1]
    run = getattr(quantized_linear, f"{op}_invariant")
    place = {name: fast.from_host(array) for name, array in call.arrays.items()}
    whole = fast.to_host(run(**place, **call.options))
    properties.assert_within(whole, *properties.expected(fast, call), f"{op}_invariant", ("token", "feature"))
    for tokens in ([0], [69], [3, 68, 5], list(range(20, 60))):
        part = place | {name: fast.from_host(call.arrays[name][tokens]) for name in ("x", "residual")}
        got = fast.to_host(run(**part, **call.options))
        assert got.tobytes() == whole[tokens].tobytes(), f"{op}: tokens {tokens} differ from themselves in the batch"


FP8 = {"weight": np.ones((4, 6), ml_dtypes.float8_e4m3fn), "weight_scale": np.ones(4, np.float32)}
GOOD = {
    "linear_fp8": FP8,
    "linear_fp8_fp8": FP8,
    "linear_int8": {"weight": np.ones((4, 6), np.int8), "weight_scale": np.ones(4, np.float32)},
    "linear_int8_int8": {"weight": np.ones((4, 6), np.int8), "weight_scale": np.ones(4, np.float32)},
    "linear_int4": {"weight": np.ones((4, 3), np.uint8), "weight_scale": np.ones((4, 2), np.float32), "group_size": 4},
}
BAD = [
    ("linear_int8", {"weight": np.ones((4, 6), np.uint8)}, "weight"),
    ("linear_int8", {"weight": np.ones((4, 5), np.int8)}, "weight"),
    ("linear_int8", {"weight_scale": np.ones(3, np.float32)}, "weight_scale"),
    ("linear_int8", {"weight_scale": np.ones((4, 1), np.float32)}, "weight_scale"),
    ("linear_int8", {"weight_scale": np.ones((4, 3), np.float32), "group_size": 4}, "weight_scale"),
    ("linear_int8", {"group_size": 0}, "group_size"),
    ("linear_int8", {"x": np.ones((2, 6), np.int8)}, "x"),
    ("linear_int8", {"bias": np.ones(4, np.int8)}, "bias"),
    ("linear_int8", {"residual": np.ones((1, 4), np.float32)}, "residual"),
    ("linear_int8", {"residual": np.ones((2, 4), np.int8)}, "residual"),
    ("linear_int8", {"out": np.ones((2, 4), np.float64)}, "out"),
    ("linear_int8_int8", {"weight": np.ones((4, 6), np.float32)}, "weight"),
    ("linear_fp8", {"weight": np.ones((4, 6), np.float32)}, "weight"),
    ("linear_fp8", {"weight_scale": np.ones((4, 1), np.float32)}, "weight_scale"),
    ("linear_fp8_fp8", {"weight": np.ones((4, 6), np.int8)}, "weight"),
    ("linear_fp8_fp8", {"weight_scale": np.ones(6, np.float32)}, "weight_scale"),
    ("linear_int8_int8", {"weight_scale": np.ones(6, np.float32)}, "weight_scale"),
    ("linear_int4", {"weight": np.ones((4, 6), np.uint8)}, "weight"),
    ("linear_int4", {"weight": np.ones((4, 3), np.int8)}, "weight"),
    ("linear_int4", {"weight_scale": np.ones((4, 3), np.float32)}, "weight_scale"),
    ("linear_int4", {"weight_min": np.ones((4, 1), np.float32)}, "weight_min"),
    ("linear_int4", {"group_size": 3}, "group_size"),
    ("linear_int4", {"bias": np.ones(6, np.float32)}, "bias"),
    ("linear_int4", {"residual": np.ones((2, 6), np.float32)}, "residual"),
]


@pytest.mark.parametrize(("op", "bad", "named"), BAD)
def test_the_door_says_what_is_wrong(backend, op, bad, named):
    arguments = {"x": np.ones((2, 6), np.float32)} | GOOD[op] | bad
    place = {k: backend.from_host(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=f"{op}: {named}: expected"):
        getattr(backend, op)(**place)


def test_unknown_formats_are_refused(backend):
    x = backend.from_host(np.ones((2, 2), np.float32))
    for op, options in (("quantize_rows", {}), ("pack_weight", {}), ("unpack_weight", {"out_features": 2})):
        with pytest.raises(ValueError, match=f"{op}: format: expected"):
            getattr(backend, op)(x, format="int3", **options)
    for x_bad in (np.ones(3, np.float32), np.ones((2, 2), np.int8)):
        with pytest.raises(ValueError, match="quantize_rows: x: expected"):
            backend.quantize_rows(backend.from_host(x_bad), format="int8")
    with pytest.raises(ValueError, match="unpack_weight: packed: expected"):
        backend.unpack_weight(x, format="int8", out_features=3)
