"""Attention over codes by the kernels of `fast`: each layout once, and each way through a kernel.

Of a kernel that is interpreted few batches are drawn, and short ones; a fault in one layout's bytes may then be in none
of them. These batches are chosen instead: two sequences of several pages, the last one ragged, of which programs get
parts that they have to merge, and random numbers, so that every byte counts.
"""

import sys

import numpy as np
import pytest

import fast
from twofold.conformance.properties import kv_cache as properties
from twofold.conformance.strategies.kv_cache import decode_batch


def launches_of(monkeypatch: pytest.MonkeyPatch, module: str) -> list[str]:
    """The launches of a module's kernel for decodes, from here on."""
    seen, of_module = [], sys.modules[module]
    decode = of_module._decode
    monkeypatch.setattr(of_module, "_decode", lambda *args, **options: (seen.append(module), decode(*args, **options)))
    return seen


def sinks(num_heads: int) -> np.ndarray:
    return np.linspace(-2, 3, num_heads).astype(np.float32)


# Of head_dim, num_groups, block_size and the dtype hangs which bytes a lane loads, and how often; of the number of
# queries and the group, what the columns of a product are.
CODED = [
    ("int8", {"head_dim": 128, "num_kv_heads": 2, "group": 4}),
    ("int8", {"head_dim": 64, "num_kv_heads": 3, "group": 2, "block_size": 32, "dtype": "float16"}),
    ("fp8", {"head_dim": 128, "num_kv_heads": 1, "group": 3, "block_size": 32}),
    ("fp8", {"head_dim": 64, "num_kv_heads": 4, "group": 2, "query_lens": (1, 2), "sliding_window": 34}),
    ("int4", {"head_dim": 128, "num_kv_heads": 2, "group": 2, "num_groups": 1, "query_lens": (2, 1)}),
    ("int4", {"head_dim": 128, "num_kv_heads": 1, "group": 3, "num_groups": 4, "dtype": "float16"}),
    ("int4", {"head_dim": 128, "num_kv_heads": 1, "group": 4, "logit_cap": 8.0, "sinks": sinks(4)}),
    ("int4", {"head_dim": 64, "num_kv_heads": 2, "group": 2, "dtype": "float16", "query_lens": (2, 1)}),
    ("int4", {"head_dim": 64, "num_kv_heads": 2, "group": 1, "num_groups": 1, "block_size": 32}),
]


@pytest.mark.parametrize(("format", "sizes"), CODED)
def test_decodes_over_codes(monkeypatch, format, sizes):
    """Key 48 begins a page and is the last before the first sequence's sliding window; key 63 ends the last page, and
    the first of two queries of the other sequence does not see it."""
    launches = launches_of(monkeypatch, "fast.kv_cache._attention")
    properties.attends_over_what_is_stored(fast, decode_batch(format, (83, 64), **sizes))
    assert launches, "not taken by the kernel for decodes"


KIVI = [
    {"bits": 4, "head_dim": 128, "num_kv_heads": 2, "group": 4, "num_groups": 4},
    {"bits": 4, "head_dim": 128, "num_kv_heads": 1, "group": 3, "query_lens": (1, 2), "window": 16},
    {"bits": 4, "head_dim": 64, "num_kv_heads": 3, "group": 2, "block_size": 32, "group_size": 16, "dtype": "float16"},
    {"bits": 2, "head_dim": 128, "num_kv_heads": 2, "group": 3, "num_groups": 4, "query_lens": (2, 1)},
    {"bits": 2, "head_dim": 128, "num_kv_heads": 1, "group": 2, "block_size": 32, "dtype": "float16", "window": 16},
    {"bits": 2, "head_dim": 128, "num_kv_heads": 1, "group": 4, "num_groups": 4, "sliding_window": 60},
    {"bits": 2, "head_dim": 128, "num_kv_heads": 1, "group": 8, "block_size": 48, "logit_cap": 8.0, "sinks": sinks(8)},
]


@pytest.mark.parametrize("sizes", KIVI)
def test_decodes_over_kivi(monkeypatch, sizes):
    """Groups of several tiles and of half a tile, a head's weights with what they lost beside them or after them."""
    launches = launches_of(monkeypatch, "fast.kv_cache.kivi_cache")
    properties.attends_over_what_is_stored(fast, decode_batch("kivi", (101, 70), **{"window": 0} | sizes))
    assert launches, "not taken by the kernel for decodes"


@pytest.mark.parametrize(("format", "options"), [("int8", {}), ("int4", {}), ("kivi", {"window": 0})])
def test_a_single_row(format, options):
    """All other columns of a product read that row too: there is nothing beside it."""
    batch = decode_batch(format, (70,), num_kv_heads=1, group=1, head_dim=64, **options)
    properties.attends_over_what_is_stored(fast, batch)


GENERAL = [
    ("int8", {"head_dim": 32, "num_kv_heads": 3, "group": 8, "query_lens": (5, 1)}),  # two queries a tile
    ("int8", {"head_dim": 64, "num_kv_heads": 2, "group": 2, "dtype": "float32", "query_lens": (20, 3)}),
    ("fp8", {"head_dim": 32, "num_kv_heads": 2, "group": 3, "block_size": 12, "sliding_window": 30}),
    ("int4", {"head_dim": 64, "num_kv_heads": 1, "group": 2, "block_size": 32, "dtype": "float32"}),
    ("int4", {"head_dim": 128, "num_kv_heads": 3, "group": 2, "num_groups": 4, "query_lens": (11, 2)}),
]


@pytest.mark.parametrize(("format", "sizes"), GENERAL)
def test_chunks_and_what_is_left(monkeypatch, format, sizes):
    """By the general kernel: more queries than a tile holds, float32, blocks of no whole pages."""
    launches = launches_of(monkeypatch, "fast.kv_cache._attention")
    properties.attends_over_what_is_stored(fast, decode_batch(format, (83, 53), **sizes))
    assert not launches, "taken by the kernel for decodes"
