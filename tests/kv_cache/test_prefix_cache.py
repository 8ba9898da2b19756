"""Prefix sharing: equal keys mean equal pasts, and a hit is the longest that every pool can serve."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.kv_cache.block_pool import RELEASED, BlockPool
from reference.kv_cache.prefix_cache import PrefixCache, block_keys, match_pools, prefix_root

TOKENS = st.lists(st.integers(0, 2), max_size=12)
PARTS = st.tuples(*[st.text(st.sampled_from("ab\x00\x01\ud800"), max_size=3)] * 4)


@given(TOKENS, TOKENS, st.integers(1, 4))
@settings(max_examples=200)
def test_keys_agree_exactly_as_far_as_whole_blocks_do(a, b, block_size):
    """Two sequences share as many leading keys as leading full blocks, and no key after that."""
    common = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    keys_a, keys_b = (block_keys(tokens, block_size, root=b"root") for tokens in (a, b))
    shared = common // block_size
    assert (len(keys_a), len(keys_b)) == (len(a) // block_size, len(b) // block_size), "a key for every full block"
    assert keys_a[:shared] == keys_b[:shared]
    assert not set(keys_a[shared:]) & set(keys_b[shared:]), "the pasts differ, the keys do not"
    assert len(set(keys_a)) == len(keys_a), "blocks of one sequence have different pasts"


@given(TOKENS, st.integers(1, 4), st.integers(0, 4))
def test_going_on_from_a_key_gives_the_same_keys(tokens, block_size, done):
    """As a sequence grows, keys are added to those it has."""
    whole = block_keys(tokens, block_size, root=b"root")
    done = min(done, len(whole))
    parent = whole[done - 1] if done else None
    assert block_keys(tokens[done * block_size :], block_size, root=b"root", parent=parent) == whole[done:]


@given(PARTS, PARTS)
@settings(max_examples=200)
def test_roots_differ_if_any_part_does(a, b):
    """The same characters cut differently are different models, formats, adapters and salts."""
    assert (prefix_root(*a) == prefix_root(*b)) == (a == b)


def test_a_key_is_sha256_of_the_parent_and_the_tokens():
    """In 64 bits, lowest byte first: what another process, or another language, would compute."""
    root = prefix_root("model", "float16")
    first = hashlib.sha256(root + np.array([1, 2], "<i8").tobytes()).digest()
    second = hashlib.sha256(first + np.array([3, 2**40], "<i8").tobytes()).digest()
    assert block_keys([1, 2, 3, 2**40, 5], 2, root=root) == [first, second]


def test_a_token_in_flight_has_no_key():
    with pytest.raises(ValueError, match="token_ids"):
        block_keys([1, -1], 2, root=b"root")


@st.composite
def partly_known(draw):
    """Pools that know some of a sequence's blocks, whichever: whatever eviction may leave behind."""
    num_keys = draw(st.integers(0, 6), label="num_keys")
    num_pools = draw(st.integers(1, 2), label="num_pools")
    known = [
        draw(st.lists(st.booleans(), min_size=num_keys, max_size=num_keys), label="known") for _ in range(num_pools)
    ]
    tails = [draw(st.sampled_from([None, 0, 1, 2, 3]), label="tail") for _ in range(num_pools)]
    return num_keys, known, tails


@given(partly_known(), st.booleans())
@settings(max_examples=300)
def test_a_hit_is_the_longest_prefix_that_every_pool_can_serve(case, free):
    """Of which a pool with a tail needs only its last blocks; each block of the hit gets one owner more."""
    num_keys, known, tails = case
    keys = [bytes([n]) for n in range(num_keys)]
    pools = [BlockPool(num_keys) for _ in known]
    caches = [PrefixCache(pool) for pool in pools]
    for cache, pool, of_pool in zip(caches, pools, known):
        block_ids = pool.allocate(num_keys)
        for block_id, key, is_known in zip(block_ids, keys, of_pool):
            if is_known:
                cache.publish(block_id, key)
        pool.release(block_ids if free else [])

    def served(length):
        needed = [range(0 if tail is None else max(0, length - tail), length) for tail in tails]
        return all(of_pool[n] for of_pool, blocks in zip(known, needed) for n in blocks)

    longest = max(length for length in range(num_keys + 1) if served(length))
    hits = match_pools(caches, keys, tails)
    for hit, pool, cache, tail in zip(hits, pools, caches, tails):
        skipped = 0 if tail is None else max(0, longest - tail)
        assert hit == [RELEASED] * skipped + list(range(skipped, longest))
        owned = [int(not free) + (skipped <= block_id < longest) for block_id in range(num_keys)]
        assert pool.ref_counts == owned, "one owner more for each block of the hit, and for no other"
        assert (cache.queried_blocks, cache.hit_blocks) == (num_keys, longest)


def test_the_least_recently_used_prefix_goes_first():
    """A hit makes a prefix recent again; under pressure the other one is evicted, from its tail."""
    pool = BlockPool(4)
    cache = PrefixCache(pool)
    old, new = [b"o0", b"o1"], [b"n0", b"n1"]
    for keys in (old, new):
        block_ids = pool.allocate(2)
        for block_id, key in zip(block_ids, keys):
            cache.publish(block_id, key)
        pool.release(block_ids)
    pool.release(cache.match(old))
    pool.allocate(1)
    assert (len(cache.match(new)), len(cache.match(old))) == (1, 2)


def test_the_first_block_of_a_key_keeps_it():
    """Two sequences computed the same block at once: the second stays unknown, and is blank when freed."""
    pool = BlockPool(2)
    cache = PrefixCache(pool)
    first, second = pool.allocate(2)
    for block_id in (first, second, first):
        cache.publish(block_id, b"key")
    pool.release([first, second])
    assert (cache.match([b"key"]), len(cache), pool.allocate(1)) == ([first], 1, [second])


def test_clearing_forgets_every_key_and_frees_nothing():
    pool = BlockPool(3)
    cache = PrefixCache(pool)
    held, freed = pool.allocate(2)
    cache.publish(held, b"held")
    cache.publish(freed, b"freed")
    pool.release([freed])
    cache.clear()
    assert (len(cache), cache.match([b"held"]), pool.num_free, pool.ref_counts[held]) == (0, [], 2, 1)


def test_what_cannot_be_published_is_refused():
    """A free block's contents are anybody's; a block has one past; a pool has one cache."""
    pool = BlockPool(2)
    cache = PrefixCache(pool)
    (block_id,) = pool.allocate(1)
    cache.publish(block_id, b"key")
    with pytest.raises(ValueError, match="another key"):
        cache.publish(block_id, b"other")
    with pytest.raises(ValueError, match="is free"):
        cache.publish(1, b"other")
    with pytest.raises(ValueError, match="without a cache"):
        PrefixCache(pool)
    assert len(cache) == 1
