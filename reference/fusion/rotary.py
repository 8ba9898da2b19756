"""Rotary position embedding; and the one op that norms, rotates and writes a step's keys and values to the cache.

A head is taken as pairs of numbers, each pair a point in the plane. A token at position p turns pair i by the angle
p * frequency_i. The inner product of two turned vectors depends on the difference of their positions only, which is
what attention wants to know; and a turned key never changes, so it can be cached.

How to reach positions beyond those a model was trained on is a matter of its frequencies, hence of the tables:

- *linear* divides them all: positions are squeezed into the range known;
- *llama3* divides the slow ones, keeps the fast ones, and blends between;
- *yarn* does the same, in terms of turns made over the original context, and sharpens the softmax a little.

(Dynamic scaling recomputes frequencies as a text grows, and would turn keys already cached: it is not supported.)
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Int64
from numpy import ndarray as Array

from reference._checks import compute_dtype, require, require_float, require_out, require_shape
from reference._cores import on_every_core, row_tiles
from reference.fusion.rms_norm import rms_norm
from reference.kv_cache.slots import write_kv

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def rotary_tables(
    head_dim: int, max_positions: int, *, base: float, scaling: Mapping[str, Any] | None = None
) -> tuple[Float32[Array, "max_positions half_dim"], Float32[Array, "max_positions half_dim"]]:
    r"""Cosine and sine of every pair's angle at every position. A table made once on the host, not an op.

    .. math::
        cos_{p,i} + \mathrm{i}\,sin_{p,i} = m \, e^{\mathrm{i}\, p f_i} \qquad f_i = base^{-2i / head\_dim}

    with :math:`f` scaled as ``scaling`` says, and :math:`m` = 1 but for YaRN.

    Args:
        head_dim: Even.
        max_positions: Positions 0 to ``max_positions`` - 1 get a row.
        base: The slowest pair turns once in about 2 pi ``base`` positions.
        scaling: None, or ``rope_type`` and its parameters in Hugging Face's words. linear: ``factor``. llama3:
            ``factor``, ``low_freq_factor``, ``high_freq_factor``, ``original_max_position_embeddings``. yarn:
            ``factor``, ``original_max_position_embeddings``, and perhaps ``beta_fast``, ``beta_slow``, ``truncate``,
            ``attention_factor``, ``mscale``, ``mscale_all_dim``.

    Returns:
        (cos, sin). Angles are computed in float64: in float32 they would be wrong by 0.01 at position 100,000.

    Raises:
        ValueError: For a ``rope_type`` that is not known, naming those that are; for a parameter missing or not a
            positive number.

    Source:
        Su et al., *RoFormer*, 2021, section 3.2: theta is f. Peng et al., *YaRN*, 2023, section 3. The Llama 3 rule is
        from Meta's release; names and defaults are those of `transformers`.

    Example:
        >>> cos, sin = rotary_tables(4, 3, base=100.0)               # frequencies 1 and 0.1
        >>> cos.round(3)
        array([[ 1.   ,  1.   ],
               [ 0.54 ,  0.995],
               [-0.416,  0.98 ]], dtype=float32)
    """
    require(head_dim > 0 and head_dim % 2 == 0, "rotary_tables", "head_dim", "a positive even number", head_dim)
    require(1 < base < math.inf, "rotary_tables", "base", "a finite number above 1", base)
    scaling = scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    require(kind in ROPE_TYPES, "rotary_tables", "scaling", f"a rope_type among {', '.join(ROPE_TYPES)}", repr(kind))

    frequencies, magnitude = float(base) ** -(np.arange(0, head_dim, 2) / head_dim), 1.0
    if kind == "linear":
        frequencies = frequencies / _parameter(scaling, "factor")
    elif kind == "llama3":
        frequencies = _scale_llama3(frequencies, scaling)
    elif kind == "yarn":
        frequencies, magnitude = _scale_yarn(frequencies, scaling, base), _yarn_magnitude(scaling)

    angles = np.arange(max_positions)[:, None] * frequencies
    return (magnitude * np.cos(angles)).astype(np.float32), (magnitude * np.sin(angles)).astype(np.float32)


def _parameter(scaling: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = default if scaling.get(name) is None else scaling[name]
    positive = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    require(positive, "rotary_tables", f"scaling[{name!r}]", "a positive number", repr(value))
    return float(value)  # pyright: ignore[reportArgumentType]


def _scale_llama3(frequencies: Float64[Array, " half_dim"], scaling: Mapping[str, Any]) -> Float64[Array, " half_dim"]:
    """Pairs that turn fewer than ``low_freq_factor`` times over the original context are slowed down, those that turn
    more than ``high_freq_factor`` times are kept, and between the two the blend is linear in the number of turns."""
    low, high = _parameter(scaling, "low_freq_factor"), _parameter(scaling, "high_freq_factor")
    require(low < high, "rotary_tables", "scaling['low_freq_factor']", f"a number below high_freq_factor {high:g}", low)
    turns = _parameter(scaling, "original_max_position_embeddings") * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / _parameter(scaling, "factor")


def _scale_yarn(
    frequencies: Float64[Array, " half_dim"], scaling: Mapping[str, Any], base: float
) -> Float64[Array, " half_dim"]:
    """The same idea; the blend is linear in the pair's index, between those that turn ``beta_fast`` and ``beta_slow``
    times over the original context."""
    half_dim = len(frequencies)
    original = _parameter(scaling, "original_max_position_embeddings")

    def pair_turning(turns: float) -> float:  # solves original * base ** (-pair / half_dim) / 2 pi = turns
        return half_dim * math.log(original / (turns * 2 * math.pi)) / math.log(base)

    first = pair_turning(_parameter(scaling, "beta_fast", 32.0))
    last = pair_turning(_parameter(scaling, "beta_slow", 1.0))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half_dim - 1)
    slowed = np.clip((np.arange(half_dim) - first) / (last - first or 0.001), 0.0, 1.0)
    return (1 - slowed) * frequencies + slowed * frequencies / _parameter(scaling, "factor")


def _yarn_magnitude(scaling: Mapping[str, Any]) -> float:
    """Longer contexts flatten the softmax; both q and k are stretched by this much to sharpen it again."""
    if scaling.get("attention_factor") is not None:
        return _parameter(scaling, "attention_factor")
    stretch = math.log(max(_parameter(scaling, "factor"), 1.0))
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        mscale, all_dim = _parameter(scaling, "mscale"), _parameter(scaling, "mscale_all_dim")
        return (0.1 * mscale * stretch + 1.0) / (0.1 * all_dim * stretch + 1.0)
    return 0.1 * stretch + 1.0


def rotary(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    cos: Float32[Array, "max_positions half_dim"],
    sin: Float32[Array, "max_positions half_dim"],
    positions: Int[Array, " num_tokens"],
    *,
    interleaved: bool = False,
) -> tuple[Float[Array, "num_tokens num_heads head_dim"], Float[Array, "num_tokens num_kv_heads head_dim"]]:
    r"""Turn each pair of each head by its position's angle.

    .. math::
        \begin{pmatrix} a' \\ b' \end{pmatrix} =
        \begin{pmatrix} cos & -sin \\ sin & cos \end{pmatrix} \begin{pmatrix} a \\ b \end{pmatrix}

    Args:
        q: Queries.
        k: Keys, of the same dtype.
        cos: From ``rotary_tables``.
        sin: From ``rotary_tables``.
        positions: Each token's place in its sequence; a row of the tables.
        interleaved: Where a pair's numbers lie: i and i + half_dim (False, Llama as Hugging Face stores it), or 2i and
            2i + 1 (True, as in the paper). A model is trained with one; the other gives nonsense quietly.

    Returns:
        The turned q and k, in their dtype. Features past 2 * ``half_dim`` pass through unturned.

    Raises:
        ValueError: If shapes disagree or a position has no row.

    Source:
        Su et al., *RoFormer*, 2021, equation 34.

    Example:
        >>> cos, sin = rotary_tables(2, 2, base=100.0)
        >>> q, k = rotary(np.array([[[1.0, 0.0]]]), np.array([[[0.0, 2.0]]]), cos, sin, np.array([1]))
        >>> q.round(2), k.round(2)                                   # by one radian
        (array([[[0.54, 0.84]]]), array([[[-1.68,  1.08]]]))
    """
    return _rotary("rotary", q, k, cos, sin, positions, interleaved, None)


def _rotary(
    op: str, q: Array, k: Array, cos: Array, sin: Array, positions: Array, interleaved: bool, out: Array | None
) -> tuple[Array, Array]:
    num_tokens, head_dim = len(positions), q.shape[-1]
    require_shape(op, "q", q, (num_tokens, None, head_dim))
    require_shape(op, "k", k, (num_tokens, None, head_dim))
    require_shape(op, "cos", cos, (None, None))
    require_shape(op, "sin", sin, cos.shape)
    require_float(op, "q", q)
    if k.dtype != q.dtype:
        require(False, op, "k", f"the dtype of q, {q.dtype}", k.dtype)
    require_out(op, out, q.shape, q.dtype)
    max_positions, half_dim = cos.shape
    if 2 * half_dim > head_dim:
        require(False, op, "cos", f"at most {head_dim // 2} columns", half_dim)
    if num_tokens and (positions.min() < 0 or positions.max() >= max_positions):
        require(False, op, "positions", f"from 0 to {max_positions - 1}", positions)
    cos, sin = cos[positions][:, None, :], sin[positions][:, None, :]  # the same for every head
    cos, sin = _by_pairs(cos, cos, interleaved), _by_pairs(-sin, sin, interleaved)
    width, num_heads, compute = 2 * half_dim, q.shape[1], compute_dtype(q.dtype)
    first = slice(0, width, 2) if interleaved else slice(0, half_dim)
    second = slice(1, width, 2) if interleaved else slice(half_dim, width)
    q_out, k_out = np.empty(q.shape, q.dtype) if out is None else out, np.empty(k.shape, k.dtype)

    def turn_rows(rows: slice) -> None:
        """(a, b) * (cos, cos) + (b, a) * (-sin, sin): each number and its partner, all pairs of all heads at once."""
        heads = np.concatenate([q[rows], k[rows]], axis=1).astype(compute, copy=False)
        partners = _by_pairs(heads[..., second], heads[..., first], interleaved)
        partners *= sin[rows]
        turned = heads[..., :width]  # a view: what lies past it stays
        turned *= cos[rows]
        turned += partners
        q_out[rows], k_out[rows] = heads[:, :num_heads], heads[:, num_heads:]

    on_every_core(turn_rows, row_tiles(num_tokens, (num_heads + k.shape[1]) * head_dim))
    return q_out, k_out


def _by_pairs(first: Array, second: Array, interleaved: bool) -> Array:
    """A new array with these numbers in the places of the first and the second of each pair."""
    if interleaved:
        return np.stack([first, second], axis=-1).reshape(*first.shape[:-1], 2 * first.shape[-1])
    return np.concatenate([first, second], axis=-1)


def rotary_write_kv(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k: Float[Array, "num_tokens num_kv_heads head_dim"],
    v: Float[Array, "num_tokens num_kv_heads head_dim"],
    cos: Float32[Array, "max_positions half_dim"],
    sin: Float32[Array, "max_positions half_dim"],
    positions: Int[Array, " num_tokens"],
    k_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    v_cache: Float[Array, "num_blocks block_size num_kv_heads head_dim"],
    slot_mapping: Int64[Array, " num_tokens"],
    *,
    q_norm: Float[Array, " head_dim"] | None = None,
    k_norm: Float[Array, " head_dim"] | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    out: Float[Array, "num_tokens num_heads head_dim"] | None = None,
) -> Float[Array, "num_tokens num_heads head_dim"]:
    r"""What lies between the q/k/v projection and attention, in one op: norms, rotary, and the write to the cache.

    .. math::
        q', k' = \mathrm{rotary}(\mathrm{norm}(q), \mathrm{norm}(k)) \qquad
        k\_cache[slot_t], v\_cache[slot_t] \leftarrow k'_t, v_t

    Args:
        q: Queries, as projected.
        k: Keys, as projected.
        v: Values, as projected.
        cos: From ``rotary_tables``.
        sin: From ``rotary_tables``.
        positions: Each token's place in its sequence.
        k_cache: Written. k is rounded to its dtype.
        v_cache: Written likewise.
        slot_mapping: Where each token's key and value go, ``block * block_size + offset``; -1 writes nothing.
        q_norm: Learned scale of an RMSNorm over each head of q, the same for all heads; None: no norm.
        k_norm: The like for k.
        eps: Of those norms.
        interleaved: See ``rotary``.
        out: Where to write the turned queries; may be ``q``.

    Returns:
        The turned queries, in the dtype of ``q``: bit for bit what ``rms_norm``, ``rotary`` and ``write_kv`` give.

    Raises:
        ValueError: If shapes disagree, or a position or slot is out of range.

    Source:
        Composed from its parts. The norms are Qwen3's.

    Example:
        >>> cos, sin = rotary_tables(2, 2, base=100.0)
        >>> k_cache, v_cache = np.zeros((2, 1, 2, 1, 2))             # one block of two slots each
        >>> one = np.array([[[1.0, 0.0]]])
        >>> q = rotary_write_kv(one, one, one, cos, sin, np.array([1]), k_cache, v_cache, np.array([1]))
        >>> k_cache[0, :, 0].round(2)
        array([[0.  , 0.  ],
               [0.54, 0.84]])
    """
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps=eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps=eps)
    q, k = _rotary("rotary_write_kv", q, k, cos, sin, positions, interleaved, out)
    write_kv(k, v, k_cache, v_cache, slot_mapping)
    return q
