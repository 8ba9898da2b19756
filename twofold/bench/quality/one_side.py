"""Keys alone, or values alone, rounded as a format of the cache rounds them: which of the two costs what it costs.

Rounded numbers are written to a cache in full precision, so that nothing else differs. A format's window is not
imitated: every whole group is rounded.
"""

import copy
from dataclasses import replace
from math import gcd
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

from reference.kv_cache._codes import affine_codes, affine_values, groups, heads
from reference.kv_cache.formats import KV_FORMATS, KVFormat
from reference.model.decoder import Decoder
from reference.model.overlay import overlay

Side = Literal["keys", "values"]
IN_PARTS = replace(KV_FORMATS["float32"], fused_op=None)
"""In full precision; keys are rotated before ``write_kv`` sees them."""


def with_one_side(decoder: Decoder, format: KVFormat, side: Side) -> Decoder:
    """A decoder that rounds its keys, or its values, on their way to a cache of the format ``IN_PARTS``.

    Args:
        format: One with groups: int4, kivi4 or kivi2. A step brings one sequence from its first token on.
    """
    backend: Any = decoder.backend

    def write_kv(k: Any, v: Any, k_cache: Any, v_cache: Any, slot_mapping: Any) -> None:
        x = np.asarray(backend.to_host(k if side == "keys" else v))
        x = backend.from_host(round_side(x, format, side), device=decoder.device)
        k, v = (x, v) if side == "keys" else (k, x)
        backend.write_kv(k, v, k_cache, v_cache, slot_mapping)

    changed = copy.copy(decoder)
    changed.backend = overlay(SimpleNamespace(__name__=f"{side} in {format.name}", write_kv=write_kv), backend)
    return changed


def round_side(
    x: Float[Array, "num_tokens num_heads head_dim"], format: KVFormat, side: Side
) -> Float[Array, "num_tokens num_heads head_dim"]:
    """Keys or values as the format gives them back.

    Example:
        >>> round_side(np.array([[[0.0, 0.4, 1.0, 3.0]]]), KV_FORMATS["kivi2"], "values")
        array([[[0., 0., 1., 3.]]])
    """
    if side == "keys" and format.window is not None:  # by channel, over tokens; what fills no group stays as it is
        whole = len(x) // format.group_size * format.group_size
        of_group = x[:whole].reshape(-1, format.group_size, *x.shape[1:])
        return np.concatenate([_rounded(of_group, format.bits, axis=1).reshape(x[:whole].shape), x[whole:]])
    of_head = groups(x, x.shape[-1] // gcd(format.group_size, x.shape[-1]))
    return heads(_rounded(of_head, format.bits, axis=-1))


def _rounded(x: Array, bits: int, axis: int) -> Array:
    codes, scale, zero = affine_codes("round_side", "x", x, bits, axis)
    return affine_values(codes, np.expand_dims(scale, axis), np.expand_dims(zero, axis), x.dtype)
