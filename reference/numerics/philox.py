"""Counter-based random numbers: Philox 4x32-10, and the draws made from it.

An ordinary generator is a tape: the thousandth number exists only after the 999 before it, and two requests that read
one tape get in each other's way. Philox is a function: it encrypts a *counter* under a *key*, ten rounds of multiply
and mix, and the cipher text is random. Any number can be computed alone, in any order, by any thread.

So the engine names every draw by what it is for. The key is the request's seed; the counter is (position in the
sequence, which of the request's samples, purpose, vocabulary block). What a request is batched with, how it was
chunked or preempted, and which kernel computes it cannot change what it draws.
"""

import numpy as np
from jaxtyping import Float32, Int, Int64, UInt32
from numpy import ndarray as Array

from reference._checks import require, require_shape

# The third counter word: what a draw is for. Draws for different purposes never share a word.
PURPOSE_DRAW, PURPOSE_DRAFT, PURPOSE_ACCEPT, PURPOSE_RESAMPLE = range(4)

NUM_ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_STEP_0, KEY_STEP_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)  # the golden ratio, sqrt(3) - 1
LOW_HALF, HALF_BITS = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox_4x32(
    counter: UInt32[Array, "num_draws 4"], key: UInt32[Array, "num_draws 2"]
) -> UInt32[Array, "num_draws 4"]:
    r"""Philox 4x32 with ten rounds: four random words for each counter and key.

    .. math::
        (hi_0, lo_0) = M_0 \cdot c_0 \qquad (hi_1, lo_1) = M_1 \cdot c_2 \\
        (c_0, c_1, c_2, c_3) \leftarrow (hi_1 \oplus c_1 \oplus k_0, \; lo_1, \; hi_0 \oplus c_3 \oplus k_1, \; lo_0)
        \qquad (k_0, k_1) \leftarrow (k_0 + W_0, \; k_1 + W_1)

    where hi and lo are the halves of the 64-bit product. For a fixed key this is a bijection of the counters: two
    counters never give the same four words.

    Args:
        counter: Four words each; every value is valid.
        key: Two words each.

    Raises:
        ValueError: If a shape or dtype is wrong.

    Source:
        Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011), section 3.3; the test vectors of Random123.

    Example:
        >>> zero = np.zeros((1, 6), np.uint32)
        >>> [hex(word) for word in philox_4x32(zero[:, :4], zero[:, 4:])[0]]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    require_shape("philox_4x32", "counter", counter, (None, 4))
    require_shape("philox_4x32", "key", key, (len(counter), 2))
    for name, words in (("counter", counter), ("key", key)):
        require(words.dtype == np.uint32, "philox_4x32", name, "uint32", words.dtype)
    return _rounds(*counter.astype(np.uint64).T, *key.astype(np.uint64).T)


def random_uniform(
    seeds: Int64[Array, " num_rows"],
    positions: Int[Array, " num_rows"],
    sample_indices: Int[Array, " num_rows"],
    *,
    purpose: int,
    num_draws: int,
) -> Float32[Array, "num_rows num_draws"]:
    r"""Uniform numbers strictly inside (0, 1), a row for each (seed, position, sample index).

    .. math::
        u = (\lfloor word / 2^9 \rfloor + \tfrac12) \cdot 2^{-23}

    Column j is word j % 4 of the block with counter (position, sample index, purpose, j // 4) and key (low 32 bits of
    the seed, high 32 bits). So fewer draws are a prefix of more draws, and a row does not depend on its neighbours.

    Args:
        seeds: The key; any 64 bits, the negative ones by their two's complement.
        positions: Of the token that is drawn for, 0 <= position < 2**32.
        sample_indices: Which of a request's ``n`` samples, 0 <= index < 2**32.
        purpose: ``PURPOSE_DRAW``, ``PURPOSE_DRAFT``, ``PURPOSE_ACCEPT`` or ``PURPOSE_RESAMPLE``.
        num_draws: Columns, at least 0.

    Numerics:
        23 bits and a half are exact in float32, so every backend gives the same bits.

    Raises:
        ValueError: If a shape is wrong or a value is out of range.

    Example:
        >>> one = np.array([1])
        >>> u = random_uniform(one, one, one, purpose=PURPOSE_DRAW, num_draws=3)
        >>> bool((u == random_uniform(one, one, one, purpose=PURPOSE_DRAW, num_draws=5)[:, :3]).all())
        True
    """
    _check_draws("random_uniform", seeds, positions, sample_indices, purpose, num_draws)
    blocks = np.arange(-(-num_draws // 4), dtype=np.uint64)
    words = _words(seeds[:, None], positions[:, None], sample_indices[:, None], purpose, blocks)
    return _to_uniform(words.reshape(len(seeds), 4 * len(blocks))[:, :num_draws])


def random_gumbel(
    seeds: Int64[Array, " num_rows"],
    positions: Int[Array, " num_rows"],
    sample_indices: Int[Array, " num_rows"],
    *,
    purpose: int,
    num_draws: int,
) -> Float32[Array, "num_rows num_draws"]:
    r"""Standard Gumbel numbers, one from each uniform number of ``random_uniform``.

    .. math::
        g = -\log(-\log u)

    They turn drawing into a maximum: :math:`\arg\max_i (logits_i + g_i)` is i with probability
    :math:`softmax(logits)_i`, without a sum over the vocabulary, so a kernel can do it tile by tile.

    Args and raises as ``random_uniform``; here column j is the noise of token j.

    Numerics:
        float32 throughout. u keeps 2**-24 away from 1, so g ends at 16.6 and is grained near there: probabilities are
        right to about 2**-24, not below.

    Source:
        Gumbel, "Statistical Theory of Extreme Values" (1954); Maddison et al., "A* Sampling" (2014), section 2.

    Example:
        >>> seeds = np.arange(4000)
        >>> g = random_gumbel(seeds, seeds * 0, seeds * 0, purpose=PURPOSE_DRAW, num_draws=2)
        >>> float((g + np.log([0.25, 0.75])).argmax(axis=1).mean())     # of token 1: about 0.75
        0.74...
    """
    return _to_gumbel(random_uniform(seeds, positions, sample_indices, purpose=purpose, num_draws=num_draws))


def random_normal(
    seeds: Int64[Array, " num_rows"],
    positions: Int[Array, " num_rows"],
    sample_indices: Int[Array, " num_rows"],
    *,
    purpose: int,
    num_draws: int,
) -> Float32[Array, "num_rows num_draws"]:
    r"""Standard normal numbers: each pair of uniform numbers becomes a pair of normal ones.

    .. math::
        r = \sqrt{-2 \log u_{2i}} \qquad \theta = 2 \pi \, u_{2i+1} \qquad
        (z_{2i}, z_{2i+1}) = (r \cos \theta, \; r \sin \theta)

    Args and raises as ``random_uniform``. An odd ``num_draws`` leaves the last sine out.

    Numerics:
        float32 throughout; u keeps 2**-24 away from 0, so \|z\| ends at 5.8.

    Source:
        Box and Muller, "A Note on the Generation of Random Normal Deviates" (1958).

    Example:
        >>> z = random_normal(np.array([7]), np.array([0]), np.array([0]), purpose=PURPOSE_DRAW, num_draws=10000)
        >>> bool(abs(z.mean()) < 0.03), bool(abs(z.std() - 1) < 0.03)
        (True, True)
    """
    require(num_draws >= 0, "random_normal", "num_draws", "at least 0", num_draws)
    num_uniform = num_draws + num_draws % 2
    u = random_uniform(seeds, positions, sample_indices, purpose=purpose, num_draws=num_uniform)
    radius = np.sqrt(-2 * np.log(u[:, 0::2]))
    angle = np.float32(2 * np.pi) * u[:, 1::2]
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return z.reshape(u.shape)[:, :num_draws]


def gumbel_at(
    columns: Int[Array, " num_columns"], seed: int, position: int, sample_index: int, *, purpose: int
) -> Float32[Array, " num_columns"]:
    """``random_gumbel``'s row for one seed, position and sample index, at some columns only.

    A counter-based generator can be asked for any number directly: when top-k leaves 50 tokens of 49152, only their
    noise is computed. Not an op: no other backend needs it.
    """
    seeds, positions, sample_indices = (np.array([value]) for value in (seed, position, sample_index))
    _check_draws("gumbel_at", seeds, positions, sample_indices, purpose, 0)
    blocks = columns // 4
    if 2 * len(blocks) > blocks.max(initial=0):  # dense: most blocks are wanted, and by several columns
        words = _words(seeds, positions, sample_indices, purpose, np.arange(blocks.max(initial=0) + 1, dtype=np.uint64))
        return _to_gumbel(_to_uniform(words.reshape(-1)[columns]))
    words = _words(seeds, positions, sample_indices, purpose, blocks.astype(np.uint64))
    return _to_gumbel(_to_uniform(np.take_along_axis(words, columns[:, None] % 4, axis=1)[:, 0]))


def _words(seeds: Array, positions: Array, sample_indices: Array, purpose: int, blocks: Array) -> Array:
    """The four words of each counter (position, sample index, purpose, block), one more axis than the arguments."""
    key = seeds.astype(np.int64).view(np.uint64)
    counter = (positions.astype(np.uint64), sample_indices.astype(np.uint64), np.array(purpose, np.uint64), blocks)
    return _rounds(*counter, key & LOW_HALF, key >> HALF_BITS)


def _rounds(c0: Array, c1: Array, c2: Array, c3: Array, k0: Array, k1: Array) -> Array:
    """The ten rounds on 32-bit words held in uint64, so that a product keeps both halves; arguments broadcast."""
    for _ in range(NUM_ROUNDS):
        product_0, product_1 = MULTIPLIER_0 * c0, MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (
            (product_1 >> HALF_BITS) ^ c1 ^ k0,
            product_1 & LOW_HALF,
            (product_0 >> HALF_BITS) ^ c3 ^ k1,
            product_0 & LOW_HALF,
        )
        k0, k1 = (k0 + KEY_STEP_0) & LOW_HALF, (k1 + KEY_STEP_1) & LOW_HALF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def _to_uniform(words: Array) -> Array:
    return ((words >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)


def _to_gumbel(u: Array) -> Array:
    return -np.log(-np.log(u))


def _check_draws(op: str, seeds: Array, positions: Array, sample_indices: Array, purpose: int, num_draws: int) -> None:
    require_shape(op, "seeds", seeds, (None,))
    require(seeds.dtype == np.int64, op, "seeds", "int64", seeds.dtype)
    for name, values in (("positions", positions), ("sample_indices", sample_indices)):
        require_shape(op, name, values, (len(seeds),))
        require(values.dtype.kind in "iu", op, name, "an integer dtype", values.dtype)
        inside = values.size == 0 or (values.min() >= 0 and values.max() < 2**32)
        require(inside, op, name, "0 <= value < 2**32", values)
    require(purpose in range(4), op, "purpose", "0 (draw), 1 (draft), 2 (accept) or 3 (resample)", purpose)
    require(num_draws >= 0, op, "num_draws", "at least 0", num_draws)
