"""The numerics ops in plain torch: rounding by a magic constant, Philox in wrapping int64, bytes reinterpreted."""

import math

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64, Shaped, UInt8, UInt32
from torch import Tensor as Array

from reference._checks import require
from reference.numerics.arrays import dtype_named
from reference.numerics.low_precision import FLOAT_FORMATS

# ---- low_precision ----------------------------------------------------------------------------------------------


def round_to(
    x: Float[Array, "*shape"], format: str, *, saturate: bool = True, out: Float[Array, "*shape"] | None = None
) -> Float[Array, "*shape"]:
    rounded = _round("round_to", x, format, saturate).to(x.dtype)
    if out is None:
        return rounded
    require(out.shape == x.shape and out.dtype == x.dtype, "round_to", "out", "the shape and dtype of x", out.shape)
    return out.copy_(rounded)


def cast(x: Float[Array, "*shape"], format: str, *, saturate: bool = True) -> Shaped[Array, "*shape"]:
    rounded = _round("cast", x, format, saturate)
    if saturate or format != "float8_e4m3fn":
        return rounded.to(getattr(torch, format))
    # A NaN is left as it is by some versions of torch's conversion and saturated by others: write its pattern.
    codes = rounded.nan_to_num(0.0).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(rounded.isnan(), 0x7F, codes).to(torch.uint8).view(torch.float8_e4m3fn)


def _round(op: str, x: Array, name: str, saturate: bool) -> Array:
    """x + C - C in float64, where C is so large that its own last place is the format's: the adder rounds."""
    require(x.is_floating_point(), op, "x", "a floating dtype", x.dtype)
    require(name in FLOAT_FORMATS, op, "format", f"one of {', '.join(FLOAT_FORMATS)}", repr(name))
    target = getattr(torch, name)
    if x.dtype == target or (target == torch.float32 and x.itemsize < 4):
        return x.clone()
    fraction_bits, min_exponent, largest, overflow = FLOAT_FORMATS[name]
    wide = x.double()
    if saturate:
        wide = wide.clamp(-largest, largest)
    exponent = ((wide.contiguous().view(torch.int64) >> 52) & 0x7FF) - 1023  # as float64 stores it
    last_place = exponent.clamp(min=min_exponent, max=1023 - 52) - fraction_bits
    magic = 1.5 * ((last_place + 52 + 1023) << 52).view(torch.float64)  # 1.5 * 2**(last_place + 52)
    rounded = ((wide + magic) - magic).copysign(wide)
    rounded = torch.where(exponent >= 1023 - 52, wide, rounded)  # near float64's end: beyond every format, or inf, NaN
    if saturate:
        return rounded
    return torch.where(rounded.abs() > largest, torch.full_like(rounded, overflow).copysign(wide), rounded)


# ---- philox -----------------------------------------------------------------------------------------------------

LOW_HALF = 0xFFFFFFFF


def philox_4x32(
    counter: UInt32[Array, "num_draws 4"], key: UInt32[Array, "num_draws 2"]
) -> UInt32[Array, "num_draws 4"]:
    for name, words, width in (("counter", counter, 4), ("key", key, 2)):
        require(words.shape == (len(counter), width), "philox_4x32", name, f"[num_draws, {width}]", tuple(words.shape))
        require(words.dtype == torch.uint32, "philox_4x32", name, "uint32", words.dtype)
    return _philox(counter.long(), key.long()).to(torch.uint32)


def random_uniform(
    seeds: Int64[Array, " num_rows"],
    positions: Int[Array, " num_rows"],
    sample_indices: Int[Array, " num_rows"],
    *,
    purpose: int,
    num_draws: int,
) -> Float32[Array, "num_rows num_draws"]:
    _check_draws(seeds, positions, sample_indices, purpose, num_draws)
    blocks = torch.arange(math.ceil(num_draws / 4), device=seeds.device)
    shape = (len(seeds), len(blocks))
    named = [x.long()[:, None].expand(shape) for x in (positions, sample_indices)]
    counter = torch.stack([*named, torch.full(shape, purpose, device=seeds.device), blocks.expand(shape)], dim=-1)
    key = torch.stack([seeds & LOW_HALF, (seeds >> 32) & LOW_HALF], dim=-1)
    words = _philox(counter, key[:, None].expand(*shape, 2)).flatten(1)[:, :num_draws]
    return ((words >> 9).float() + 0.5) * 2.0**-23


def random_gumbel(
    seeds: Int64[Array, " num_rows"],
    positions: Int[Array, " num_rows"],
    sample_indices: Int[Array, " num_rows"],
    *,
    purpose: int,
    num_draws: int,
) -> Float32[Array, "num_rows num_draws"]:
    return -(-random_uniform(seeds, positions, sample_indices, purpose=purpose, num_draws=num_draws).log()).log()


def random_normal(
    seeds: Int64[Array, " num_rows"],
    positions: Int[Array, " num_rows"],
    sample_indices: Int[Array, " num_rows"],
    *,
    purpose: int,
    num_draws: int,
) -> Float32[Array, "num_rows num_draws"]:
    require(num_draws >= 0, "random_normal", "num_draws", "at least 0", num_draws)
    num_uniform = num_draws + num_draws % 2
    u = random_uniform(seeds, positions, sample_indices, purpose=purpose, num_draws=num_uniform)
    z = torch.polar((-2 * u[:, 0::2].log()).sqrt(), 2 * torch.pi * u[:, 1::2])  # one complex number, two normal ones
    return torch.view_as_real(z).flatten(1)[:, :num_draws]


def _philox(counter: Array, key: Array) -> Array:
    """On int64, whose products wrap modulo 2**64: both halves of the true product are still there."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for step in range(10):
        product_0, product_1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        round_k0, round_k1 = (k0 + step * 0x9E3779B9) & LOW_HALF, (k1 + step * 0xBB67AE85) & LOW_HALF
        c0, c2 = ((product_1 >> 32) & LOW_HALF) ^ c1 ^ round_k0, ((product_0 >> 32) & LOW_HALF) ^ c3 ^ round_k1
        c1, c3 = product_1 & LOW_HALF, product_0 & LOW_HALF
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _check_draws(seeds: Array, positions: Array, sample_indices: Array, purpose: int, num_draws: int) -> None:
    op = "random_uniform"
    require(seeds.ndim == 1 and seeds.dtype == torch.int64, op, "seeds", "int64 [num_rows]", tuple(seeds.shape))
    for name, values in (("positions", positions), ("sample_indices", sample_indices)):
        require(values.shape == seeds.shape, op, name, f"shape {tuple(seeds.shape)}", tuple(values.shape))
        require(values.dtype in (torch.int32, torch.int64), op, name, "int32 or int64", values.dtype)
        require(((values >= 0) & (values.long() <= LOW_HALF)).all(), op, name, "0 <= value < 2**32", values)
    require(purpose in range(4), op, "purpose", "0 (draw), 1 (draft), 2 (accept) or 3 (resample)", purpose)
    require(num_draws >= 0, op, "num_draws", "at least 0", num_draws)


# ---- arrays -----------------------------------------------------------------------------------------------------


def from_host(array: np.ndarray, *, dtype: str | None = None, device: str | None = None) -> Shaped[Array, "*shape"]:
    array = np.asarray(array)
    if dtype is not None:
        array = array.astype(dtype_named(dtype, "from_host"), copy=False)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()  # torch has neither
    if array.dtype.isbuiltin == 2:  # registered with NumPy by ml_dtypes: the same bits under a name torch knows
        bits = torch.from_numpy(array.view(np.dtype(f"i{array.dtype.itemsize}")))
        tensor = bits.view(getattr(torch, array.dtype.name))
    else:
        tensor = torch.from_numpy(array)
    return tensor.to(_device("from_host", device))


def to_host(x: Shaped[Array, "*shape"]) -> np.ndarray:
    x = x.detach().cpu()
    target = dtype_named(str(x.dtype).removeprefix("torch."), "to_host")
    if target.isbuiltin == 2:
        return x.view(getattr(torch, f"int{8 * target.itemsize}")).numpy().view(target)
    return x.numpy()


def empty(shape: tuple[int, ...], *, dtype: str, device: str | None = None) -> Shaped[Array, "*shape"]:
    return torch.empty(shape, dtype=_dtype("empty", dtype), device=_device("empty", device))


def take_rows(
    x: Shaped[Array, "num_rows *rest"],
    rows: Int[Array, " num_taken"],
    *,
    out: Shaped[Array, "num_taken *rest"] | None = None,
) -> Shaped[Array, "num_taken *rest"]:
    require(x.ndim >= 1, "take_rows", "x", "at least one axis", tuple(x.shape))
    integers = rows.ndim == 1 and not rows.is_floating_point()
    require(integers, "take_rows", "rows", "integers [num_taken]", f"{rows.dtype} {tuple(rows.shape)}")
    require(((rows >= 0) & (rows < len(x))).all(), "take_rows", "rows", f"0 <= row < {len(x)}", rows)
    bits = x.view(getattr(torch, f"int{8 * x.itemsize}"))  # torch takes rows of every size, but not of every dtype
    taken = bits.index_select(0, rows.long()).view(x.dtype)
    if out is None:
        return taken
    fits = out.shape == taken.shape and out.dtype == x.dtype
    require(fits, "take_rows", "out", f"{x.dtype} {tuple(taken.shape)}", f"{out.dtype} {tuple(out.shape)}")
    return out.copy_(taken)


def bitcast(x: UInt8[Array, "num_rows num_bytes"], dtype: str) -> Shaped[Array, "num_rows num_values"]:
    require(x.ndim == 2, "bitcast", "x", "shape [*, *]", tuple(x.shape))
    require(x.dtype == torch.uint8, "bitcast", "x", "uint8", x.dtype)
    target = _dtype("bitcast", dtype)
    require(x.shape[1] % target.itemsize == 0, "bitcast", "x", f"rows of whole {dtype} values", f"{x.shape[1]} bytes")
    if x.numel() == 0:
        return torch.empty((len(x), x.shape[1] // target.itemsize), dtype=target, device=x.device)
    if len(x) == 1:  # the distance to a second row means nothing, but torch would look at it
        x = x.as_strided(x.shape, (x.shape[1], x.stride(1)))
    try:
        return x.view(target)
    except RuntimeError as error:
        raise ValueError(f"bitcast: x: expected rows that begin at multiples of {target.itemsize}: {error}") from None


def _dtype(op: str, name: str) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    require(isinstance(dtype, torch.dtype), op, "dtype", "the name of a dtype, such as 'bfloat16'", repr(name))
    assert isinstance(dtype, torch.dtype)
    return dtype


def _device(op: str, name: str | None) -> torch.device:
    try:
        return torch.device(name or "cpu")
    except RuntimeError:
        raise ValueError(f"{op}: device: expected a device of torch, got {name!r}") from None
