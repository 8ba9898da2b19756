"""Linear layers whose weights, or weights and activations, are stored in 8 or 4 bits.

A layer that serves few tokens waits for its weights to arrive from memory, so half the bytes is half the time. The
codes become floats on their way to the multiplication, a tile of output rows at a time: a float copy of the layer never
exists. When the tokens are many, arithmetic is what costs, and *both* operands are quantized so that the hardware can
multiply 8-bit numbers.

How the codes are found is another matter: `rounding.py`, `smoothquant.py`, `gptq.py`.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Float32, Int8, Int32, Shaped, UInt8
from numpy import ndarray as Array

from reference._checks import compute_dtype, require, require_float, require_shape
from reference.linear.linear import add_bias, check_linear, matmul_by_tiles, matmul_transposed, tiles
from reference.linear.rounding import FP8_MAX, INT8_MAX, nibble_features
from reference.numerics.arrays import dtype_named
from reference.numerics.low_precision import cast

LAYOUTS = ("int8", "int8_int8", "int4", "fp8", "fp8_fp8")  # what an op's name says after "linear_"
FEW_TOKENS_IN_GROUPS = 4  # up to here, scaling a group's sums is cheaper than scaling its weights
EXACT_TERMS = 1024  # 1024 * 128 * 127 < 2**24: so many products of int8 are summed exactly in float32, in any order
FP8 = dtype_named("float8_e4m3fn")


def quantize_rows(
    x: Float[Array, "num_rows num_columns"], *, format: str
) -> tuple[Shaped[Array, "num_rows num_columns"], Float32[Array, " num_rows"]]:
    r"""Quantize activations, each row with a scale of its own.

    .. math::
        scale_i = \max_j |x_{ij}| / max \qquad code_{ij} = round(x_{ij} / scale_i)

    with max 127 for int8 and 448 for e4m3. A row is a token: tokens differ in size by orders of magnitude, and one
    scale for all would let the batch that a token is in change its result.

    Args:
        x: The activations.
        format: "int8" or "float8_e4m3fn".

    Returns:
        The codes, in the dtype named ``format``, and the scales. Ties go to even. A row of zeros has scale 0 and codes
        0; a row that holds NaN or an infinity has scale NaN and codes 0, so that its results are NaN.

    Raises:
        ValueError: If the format is another, or ``x`` is not floating.

    Source:
        Dettmers et al., *LLM.int8()*, 2022, section 2.1 (there: the row constants of vector-wise quantization).

    Example:
        >>> quantize_rows(np.array([[0.5, -1.27], [0.0, 0.0]]), format="int8")
        (array([[  50, -127], [   0,    0]], dtype=int8), array([0.01, 0.  ], dtype=float32))
    """
    require(format in ("int8", "float8_e4m3fn"), "quantize_rows", "format", "int8 or float8_e4m3fn", repr(format))
    require_shape("quantize_rows", "x", x, (None, None))
    require_float("quantize_rows", "x", x)
    values = x.astype(compute_dtype(x.dtype), copy=False)

    largest = np.abs(values).max(axis=1, initial=0)
    scale = np.where(np.isfinite(largest), largest, np.nan) / (INT8_MAX if format == "int8" else FP8_MAX)
    scale = scale.astype(np.float32)
    usable = (scale > 0)[:, None]  # neither 0 nor NaN
    codes = np.divide(values, scale[:, None], out=np.zeros_like(values), where=usable)
    if format == "int8":
        return np.clip(np.rint(codes), -INT8_MAX, INT8_MAX).astype(np.int8), scale
    return cast(codes, format), scale


def linear_int8(
    x: Float[Array, "num_tokens in_features"],
    weight: Int8[Array, "out_features in_features"],
    weight_scale: Float[Array, "out_features *num_groups"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    group_size: int | None = None,
    residual: Float[Array, "num_tokens out_features"] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    r"""A linear layer with weights of 8 bits and activations as they are (W8A16).

    .. math::
        out = (x \, codes^T) \cdot scale + bias
        \qquad \text{or, in groups,} \qquad
        out_o = \sum_g scale_{og} \sum_{i \in g} x_i \, code_{oi} + bias_o

    Args:
        x: The tokens' activations.
        weight: The codes, -128 to 127.
        weight_scale: Multiplies them: one number for each output feature, or for each of its groups.
        bias: One number for each output feature, or None.
        group_size: Input features that share a scale, the last group may have fewer (32 is GGUF's Q8_0); None: all.
        residual: What is added to the layer's result, once that is rounded to the dtype of ``x``; or None.
        out: Where to write the result; may be ``residual``, and overlap no other argument.

    Returns:
        The result, in the dtype of ``x``; float32 sums, float64 for float64 ``x``. A scale of a row is a factor of the
        whole sum and is applied to it once, afterwards.

    Raises:
        ValueError: If shapes disagree, ``weight`` is not int8, or ``group_size`` is not positive.

    Source:
        LLM.int8() (Dettmers et al., 2022), section 2.1; GGUF's Q8_0 for the groups.

    Example:
        >>> linear_int8(np.array([[1.0, 10.0]]), np.array([[2, 3]], np.int8), np.array([0.5], np.float32))
        array([[16.]])
    """
    check_linear("linear_int8", x, weight.shape, bias, out, residual)
    _require_dtype("linear_int8", weight, np.dtype(np.int8))
    compute = compute_dtype(x.dtype)
    if group_size is None:
        return _linear_by_row("linear_int8", x, weight, weight_scale, bias, residual, out)
    require(group_size > 0, "linear_int8", "group_size", "a positive number, or None", group_size)
    _check_scales("linear_int8", weight_scale, weight.shape, group_size)

    fill = lambda tile, rows: np.copyto(tile, weight[rows, None])  # noqa: E731
    result = _linear_in_groups(
        x.astype(compute, copy=False)[:, None], fill, weight_scale.astype(compute), width=group_size
    )
    return add_bias(result, bias, residual, x.dtype, out)


def linear_int8_int8(
    x: Float[Array, "num_tokens in_features"],
    weight: Int8[Array, "out_features in_features"],
    weight_scale: Float32[Array, " out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    residual: Float[Array, "num_tokens out_features"] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    r"""A linear layer with weights and activations of 8 bits (W8A8), the latter rounded per token on their way in.

    .. math::
        out_{to} = (x\_scale_t \cdot scale_o) \sum_i x\_code_{ti} \, code_{oi} + bias_o

    Args:
        x: The tokens' activations; rounded by ``quantize_rows``.
        weight: The codes, -128 to 127.
        weight_scale: One number for each output feature.
        bias: One number for each output feature, or None.
        residual: What is added to the layer's result, once that is rounded to the dtype of ``x``; or None.
        out: Where to write the result; may be ``residual``, and overlap no other argument.

    Returns:
        The result, in the dtype of ``x``. The sum of products is an exact int32, so it is the same in any order and on
        any machine; both scales multiply it once, at the end.

    Raises:
        ValueError: If shapes disagree or ``weight`` is not int8.

    Source:
        SmoothQuant (Xiao et al., 2023), section 2, figure 3: the scales are outside the sum because neither depends on
        i, the input feature. That is why activations get a scale per token and weights one per output feature.

    Example:
        >>> x, codes = np.array([[0.5, -1.27]]), np.array([[2, 3]], np.int8)
        >>> linear_int8_int8(x, codes, np.array([1.0], np.float32)).round(4)
        array([[-2.81]])
    """
    check_linear("linear_int8_int8", x, weight.shape, bias, out, residual)
    _require_dtype("linear_int8_int8", weight, np.dtype(np.int8))
    require_shape("linear_int8_int8", "weight_scale", weight_scale, (len(weight),))
    compute = compute_dtype(x.dtype)
    codes, scale = quantize_rows(x, format="int8")
    result = matmul_int8(codes, weight) * (scale[:, None].astype(compute) * weight_scale.astype(compute))
    return add_bias(result, bias, residual, x.dtype, out)


def matmul_int8(
    x: Int8[Array, "num_tokens in_features"], weight: Int8[Array, "out_features in_features"]
) -> Int32[Array, "num_tokens out_features"]:
    """``x @ weight.T``, exactly. ``x`` may hold -127 to 127, and int32 holds the sum of 132,000 products.

    NumPy multiplies integer matrices without BLAS, a hundred times slower. A float32 holds every integer up to 2**24,
    so sums of ``EXACT_TERMS`` products are exact in it whatever the order; longer ones are cut and added as integers.
    """
    result = np.zeros((len(x), len(weight)), np.int32)
    for start in range(0, x.shape[1], EXACT_TERMS):
        part = slice(start, start + EXACT_TERMS)
        widen_rows = lambda tile, rows, part=part: np.copyto(tile, weight[rows, part])  # noqa: E731
        result += matmul_by_tiles(x[:, part].astype(np.float32), len(weight), widen_rows).astype(np.int32)
    return result


def linear_fp8(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    weight_scale: Float32[Array, " out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    residual: Float[Array, "num_tokens out_features"] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    r"""A linear layer with weights that are 8-bit floats (e4m3), and activations as they are.

    .. math::
        out = (x \, codes^T) \cdot scale + bias

    Args:
        x: The tokens' activations.
        weight: The codes, float8_e4m3fn.
        weight_scale: One number for each output feature.
        bias: One number for each output feature, or None.
        residual: What is added to the layer's result, once that is rounded to the dtype of ``x``; or None.
        out: Where to write the result; may be ``residual``, and overlap no other argument.

    Returns:
        The result, in the dtype of ``x``; float32 sums, float64 for float64 ``x``.

    Raises:
        ValueError: If shapes disagree or ``weight`` is not float8_e4m3fn.

    Source:
        Micikevicius et al., *FP8 Formats for Deep Learning*, 2022, section 3.

    Example:
        >>> codes = np.array([[2.0, 3.0]]).astype("float8_e4m3fn")
        >>> linear_fp8(np.array([[1.0, 10.0]]), codes, np.array([0.5], np.float32))
        array([[16.]])
    """
    check_linear("linear_fp8", x, weight.shape, bias, out, residual)
    _require_dtype("linear_fp8", weight, FP8)
    return _linear_by_row("linear_fp8", x, weight, weight_scale, bias, residual, out)


def linear_fp8_fp8(
    x: Float[Array, "num_tokens in_features"],
    weight: Float[Array, "out_features in_features"],
    weight_scale: Float32[Array, " out_features"],
    bias: Float[Array, " out_features"] | None = None,
    *,
    residual: Float[Array, "num_tokens out_features"] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    r"""A linear layer whose weights and activations are 8-bit floats, the latter rounded per token on their way in.

    .. math::
        out_{to} = (x\_scale_t \cdot scale_o) \sum_i x\_code_{ti} \, code_{oi} + bias_o

    Args:
        x: The tokens' activations; rounded by ``quantize_rows``.
        weight: The codes, float8_e4m3fn.
        weight_scale: One number for each output feature.
        bias: One number for each output feature, or None.
        residual: What is added to the layer's result, once that is rounded to the dtype of ``x``; or None.
        out: Where to write the result; may be ``residual``, and overlap no other argument.

    Returns:
        The result, in the dtype of ``x``. A product of two codes has 8 bits and is exact; sums are float32, float64 for
        float64 ``x``.

    Raises:
        ValueError: If shapes disagree or ``weight`` is not float8_e4m3fn.

    Source:
        Micikevicius et al., *FP8 Formats for Deep Learning*, 2022, section 3.

    Example:
        >>> codes = np.array([[2.0, 3.0]]).astype("float8_e4m3fn")
        >>> linear_fp8_fp8(np.array([[44.8, 1.0]]), codes, np.array([0.5], np.float32)).round(4)
        array([[46.3]])
    """
    check_linear("linear_fp8_fp8", x, weight.shape, bias, out, residual)
    _require_dtype("linear_fp8_fp8", weight, FP8)
    codes, scale = quantize_rows(x, format="float8_e4m3fn")
    compute = compute_dtype(x.dtype)
    result = _linear_by_row("linear_fp8_fp8", codes.astype(compute), weight, weight_scale, None, None, None)
    result *= scale[:, None].astype(compute)
    return add_bias(result, bias, residual, x.dtype, out)


def linear_int4(
    x: Float[Array, "num_tokens in_features"],
    weight: UInt8[Array, "out_features packed_features"],
    weight_scale: Float[Array, "out_features num_groups"],
    weight_min: Float[Array, "out_features num_groups"] | None = None,
    bias: Float[Array, " out_features"] | None = None,
    *,
    group_size: int,
    residual: Float[Array, "num_tokens out_features"] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    r"""A linear layer with weights of 4 bits in groups, and activations as they are (W4A16).

    .. math::
        out_o = \sum_g \Big( scale_{og} \sum_{i \in g} x_i \, code_{oi} + min_{og} \sum_{i \in g} x_i \Big) + bias_o

    or, without minima, :math:`\sum_g scale_{og} \sum_{i \in g} x_i \, (code_{oi} - 8) + bias_o`.

    Args:
        x: The tokens' activations.
        weight: Codes 0 to 15, two a byte. Within a group of g features byte j holds feature j in its low nibble and
            feature j + g / 2 in its high one; with groups of 32 that is the byte order of GGUF's Q4_0 and Q4_1.
        weight_scale: One number for each group of each output feature.
        weight_min: What code 0 stands for; None: code 8 stands for 0.
        bias: One number for each output feature, or None.
        group_size: Input features that share a scale, even; the last group of a row may have fewer (but even).
        residual: What is added to the layer's result, once that is rounded to the dtype of ``x``; or None.
        out: Where to write the result; may be ``residual``, and overlap no other argument.

    Returns:
        The result, in the dtype of ``x``; float32 sums, float64 for float64 ``x``. The minima are taken out of the sum,
        as above, so what is added up has the magnitude :math:`\sum |x| (scale \cdot code + |min|)`.

    Raises:
        ValueError: If shapes disagree, ``weight`` is not uint8, or ``group_size`` is not even.

    Source:
        GPTQ (Frantar et al., 2023), section 4, for the groups; the formats Q4_0 and Q4_1 of GGML.

    Example:
        >>> x, packed = np.array([[1.0, 10.0]]), np.array([[0x93]], np.uint8)   # the codes 3 and 9
        >>> linear_int4(x, packed, np.array([[0.5]]), np.array([[1.0]]), group_size=2)   # weights 2.5 and 5.5
        array([[57.5]])
        >>> linear_int4(x, packed, np.array([[0.5]]), group_size=2)             # weights -2.5 and 0.5
        array([[2.5]])
    """
    require_shape("linear_int4", "weight", weight, (None, None))
    check_linear("linear_int4", x, (len(weight), 2 * weight.shape[1]), bias, out, residual)
    _require_dtype("linear_int4", weight, np.dtype(np.uint8))
    even = group_size > 0 and group_size % 2 == 0
    require(even, "linear_int4", "group_size", "a positive even number", group_size)
    _check_scales("linear_int4", weight_scale, (len(weight), x.shape[1]), group_size)
    if weight_min is not None:
        require_shape("linear_int4", "weight_min", weight_min, weight_scale.shape)
    compute = compute_dtype(x.dtype)
    zero = np.int8(8 if weight_min is None else 0)  # subtracted as integers, or a 0 would be a difference of two sums

    def fill(tile: Array, rows: slice) -> None:
        tile[:, 0] = (weight[rows] & 15).view(np.int8) - zero
        tile[:, 1] = (weight[rows] >> 4).view(np.int8) - zero

    halves = x.astype(compute, copy=False).take(nibble_features(x.shape[1], group_size), axis=1)  # in nibble order
    result = _linear_in_groups(halves, fill, weight_scale.astype(compute), width=group_size // 2)
    if weight_min is not None:
        sums = np.add.reduceat(x, np.arange(0, x.shape[1], group_size), axis=1, dtype=compute)
        result += matmul_transposed(sums, weight_min.astype(compute))
    return add_bias(result, bias, residual, x.dtype, out)


def pack_weight(weight: Shaped[Array, "out_features stored"], *, format: str) -> Shaped[Array, "..."]:
    """Put codes into the layout that this backend's kernels like best: here the documented one, the identity.

    Args:
        weight: Codes as the op documents them.
        format: Which op they are for: "int8", "int8_int8", "int4", "fp8" or "fp8_fp8", as in the name ``linear_int4``.

    Raises:
        ValueError: If the format is another.

    Example:
        >>> pack_weight(np.array([[1, 2]], np.int8), format="int8")
        array([[1, 2]], dtype=int8)
    """
    require(format in LAYOUTS, "pack_weight", "format", f"one of {', '.join(LAYOUTS)}", repr(format))
    return weight


def unpack_weight(
    packed: Shaped[Array, "..."], *, format: str, out_features: int
) -> Shaped[Array, "out_features stored"]:
    """The inverse of ``pack_weight``, exactly: ``unpack_weight(pack_weight(w)) == w``.

    Args:
        packed: What ``pack_weight`` made.
        format: The format it was made for.
        out_features: Rows of the matrix, which a layout may have padded.

    Raises:
        ValueError: If the format is unknown or the rows are fewer.

    Example:
        >>> unpack_weight(np.array([[1, 2]], np.int8), format="int8", out_features=1)
        array([[1, 2]], dtype=int8)
    """
    require(format in LAYOUTS, "unpack_weight", "format", f"one of {', '.join(LAYOUTS)}", repr(format))
    require_shape("unpack_weight", "packed", packed, (out_features, None))
    return packed


def widen(codes: Array, out: Array) -> None:
    """Write codes as floats. An 8-bit float has 256 values: to look them up is faster than to convert."""
    if codes.dtype == FP8:
        every_value = np.arange(256, dtype=np.uint8).view(FP8).astype(out.dtype)
        every_value.take(codes.view(np.uint8), out=out, mode="clip")
    else:
        np.copyto(out, codes)


def _linear_by_row(
    op: str,
    x: Array,
    weight: Array,
    weight_scale: Array,
    bias: Array | None,
    residual: Array | None,
    out: Array | None,
) -> Array:
    """A scale for each output row, applied to the sums."""
    require_shape(op, "weight_scale", weight_scale, (len(weight),))
    compute = compute_dtype(x.dtype)
    widen_rows = lambda tile, rows: widen(weight[rows], tile)  # noqa: E731
    result = matmul_by_tiles(x.astype(compute, copy=False), len(weight), widen_rows)
    result *= weight_scale.astype(compute, copy=False)
    return add_bias(result, bias, residual, x.dtype, out)


def _linear_in_groups(x: Array, fill: Callable[[Array, slice], None], scale: Array, width: int) -> Array:
    """A scale for each group of ``width`` features: ``x`` and the tiles to fill are [tokens or rows, parts, features].

    With few tokens the *sums* of each group are scaled, there being fewer of them than weights. With many tokens the
    weights are scaled, once for all tokens, and what is left is one plain matrix product.
    """
    num_tokens, num_parts, num_features = x.shape
    out_features, num_groups = scale.shape
    few = num_tokens <= FEW_TOKENS_IN_GROUPS
    x = _in_groups(x, num_groups, width)
    columns = np.ascontiguousarray(x.transpose(1, 2, 3, 0))  # [parts, groups, width, tokens]
    result = np.empty((num_tokens, out_features), x.dtype)
    for tile, rows in tiles(out_features, (num_parts, num_groups * width), x.dtype):
        fill(tile[..., :num_features], rows)
        tile[..., num_features:] = 0  # what fills up the last group; a scale that is NaN may have been here
        codes = tile.reshape(len(tile), num_parts, num_groups, width)
        if few:
            sums = (codes.transpose(1, 2, 0, 3) @ columns).sum(axis=0)  # [groups, rows, tokens]
            result[:, rows] = np.einsum("grt,rg->tr", sums, scale[rows])
        else:
            codes *= scale[rows, None, :, None]
            result[:, rows] = matmul_transposed(x.reshape(num_tokens, -1), tile.reshape(len(tile), -1))
    return result


def _in_groups(parts: Array, num_groups: int, width: int) -> Array:
    """Cut the last axis into groups; a short last group is filled up with zeros, which add nothing."""
    filled = np.zeros((*parts.shape[:-1], num_groups * width), parts.dtype)
    filled[..., : parts.shape[-1]] = parts
    return filled.reshape(*parts.shape[:-1], num_groups, width)


def _check_scales(op: str, weight_scale: Array, weight_shape: tuple[int, ...], group_size: int) -> None:
    out_features, in_features = weight_shape
    require_shape(op, "weight_scale", weight_scale, (out_features, -(-in_features // group_size)))


def _require_dtype(op: str, weight: Array, dtype: np.dtype) -> None:
    require(weight.dtype == dtype, op, "weight", f"dtype {dtype}", weight.dtype)
