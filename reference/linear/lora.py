"""LoRA: many low-rank adapters in one batch, each with its own rank and scaling.

An adapter changes a weight by a product of two thin matrices, B A, of rank 8 or 64 where the layer has thousands. One
could add it to the weight, but then every adapter is a model of its own. Kept apart it costs little beside the base
layer, and each token of a batch can have another one: the base is multiplied once for all of them.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Int32
from numpy import ndarray as Array

from reference._checks import compute_dtype, deliver, require, require_float, require_out, require_shape
from reference.linear.linear import matmul_transposed


def lora(
    base: Float[Array, "num_tokens out_features"],
    x: Float[Array, "num_tokens in_features"],
    lora_a: Float[Array, "num_adapters all_ranks in_features"],
    lora_b: Float[Array, "num_adapters out_features max_rank"],
    scaling: Float32[Array, " num_adapters"],
    adapter_ids: Int32[Array, " num_tokens"],
    *,
    widths: Sequence[int] | None = None,
    out: Float[Array, "num_tokens out_features"] | None = None,
) -> Float[Array, "num_tokens out_features"]:
    r"""Add to each token's result what its own adapter says.

    .. math::
        out_t = base_t + scaling_a \, B_a \, (A_a \, x_t) \qquad a = adapter\_ids_t

    Args:
        base: The result of the layer that is adapted, of any kind: float, quantized, sparse; its bias included.
        x: What went into that layer.
        lora_a: The first factors; an adapter of smaller rank is filled up with rows of zeros.
        lora_b: The second factors; filled up with columns of zeros.
        scaling: Multiplies an adapter's part: ``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA.
        adapter_ids: Each token's adapter; -1 for none. Such a token is returned as it came, bit for bit.
        widths: Of several layers side by side that read the same ``x`` (queries, keys and values), the output features
            of each, in order. Their first factors then stand below each other in ``lora_a``, of ``max_rank`` rows each.
            None: it is one layer.
        out: Where to write the result; may be ``base``.

    Returns:
        The result, in the dtype of ``base``; computed in float32, or float64 for float64 ``base``. Tokens are grouped
        by adapter, so an adapter is read once however many tokens use it.

    Raises:
        ValueError: If shapes disagree, or an id is not -1 or an adapter's.

    Source:
        Hu et al., *LoRA*, 2022, section 4.1 (:math:`h = W_0 x + B A x`); many adapters in a batch: Punica (Chen et al.,
        2023), section 4, and S-LoRA (Sheng et al., 2023), section 5.

    Example:
        >>> a, b = np.array([[[1.0, 0.0]]]), np.array([[[5.0]]])   # one adapter of rank 1: 5 times the first feature
        >>> x, ids = np.array([[2.0, 7.0], [2.0, 7.0]]), np.array([0, -1], np.int32)
        >>> lora(np.zeros((2, 1)), x, a, b, np.array([0.5], np.float32), ids)
        array([[5.],
               [0.]])
    """
    _check(base, x, lora_a, lora_b, scaling, adapter_ids, widths, out)
    rank, ends = lora_b.shape[2], np.cumsum([base.shape[1]] if widths is None else widths)
    compute = compute_dtype(base.dtype)
    result = base.astype(compute, copy=out is not base)
    for adapter in np.unique(adapter_ids[adapter_ids >= 0]):
        tokens = np.flatnonzero(adapter_ids == adapter)
        shrunk = matmul_transposed(x[tokens].astype(compute), lora_a[adapter].astype(compute, copy=False))
        for layer, columns in enumerate(map(slice, [0, *ends[:-1]], ends)):
            own = shrunk[:, layer * rank : (layer + 1) * rank]
            grown = matmul_transposed(own, lora_b[adapter, columns].astype(compute, copy=False))
            result[tokens, columns] += scaling[adapter].astype(compute) * grown
    return result if result is out else deliver(result, base.dtype, out)


def _check(
    base: Array,
    x: Array,
    lora_a: Array,
    lora_b: Array,
    scaling: Array,
    adapter_ids: Array,
    widths: Sequence[int] | None,
    out: Array | None,
) -> None:
    require_shape("lora", "base", base, (None, None))
    require_shape("lora", "x", x, (len(base), None))
    require_shape("lora", "lora_a", lora_a, (None, None, x.shape[1]))
    rank = lora_a.shape[1] // num_layers(widths, base.shape[1], lora_a.shape[1])
    require_shape("lora", "lora_b", lora_b, (len(lora_a), base.shape[1], rank))
    require_shape("lora", "scaling", scaling, (len(lora_a),))
    require_shape("lora", "adapter_ids", adapter_ids, (len(base),))
    for name, array in (("base", base), ("x", x), ("lora_a", lora_a), ("lora_b", lora_b), ("scaling", scaling)):
        require_float("lora", name, array)
    known = adapter_ids.size == 0 or (adapter_ids.min() >= -1 and adapter_ids.max() < len(lora_a))
    require(known, "lora", "adapter_ids", f"-1 or 0 to {len(lora_a) - 1}", adapter_ids)
    require_out("lora", out, base.shape, base.dtype)


def num_layers(widths: Sequence[int] | None, out_features: int, all_ranks: int) -> int:
    """How many layers stand side by side; they must have these output features and first factors together."""
    if widths is None:
        return 1
    fit = len(widths) > 0 and min(widths) >= 0 and sum(widths) == out_features
    require(fit, "lora", "widths", f"numbers of output features, {out_features} in all", widths)
    count = len(widths)
    require(all_ranks % count == 0, "lora", "lora_a", f"as many rows for each of {count} layers", all_ranks)
    return count
