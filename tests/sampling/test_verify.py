"""Speculation changes the speed and never the distribution."""

import numpy as np
import pytest
from hypothesis import given, settings

import fast
import reference
from reference.numerics.philox import PURPOSE_ACCEPT
from twofold.conformance.properties import sampling as properties
from twofold.conformance.properties.numerics import call, refuses
from twofold.conformance.strategies import sampling as inputs


@given(case=inputs.drafted())
@settings(max_examples=100)
def test_is_rejection_sampling(backend, case):
    properties.verify_is_rejection_sampling(backend, case)


@given(case=inputs.drafted(targets=("one-hot",)))
@settings(max_examples=200)
def test_speculative_is_greedy_with_one_hot_targets(backend, case):
    properties.greedy_targets_accept_the_greedy_prefix(backend, case)


@given(case=inputs.drafted())
@settings(max_examples=200)
def test_own_drafts_are_all_accepted(backend, case):
    properties.own_drafts_are_all_accepted(backend, case)


@pytest.mark.interpreted(8)
@given(case=inputs.samplings())
@settings(max_examples=200)
def test_without_drafts_it_is_sample(backend, case):
    properties.without_drafts_is_sample(backend, case)


@given(case=inputs.drafted())
@settings(max_examples=200)
def test_sequences_do_not_depend_on_company(backend, case):
    properties.sequences_do_not_depend_on_company(backend, case)


@pytest.mark.parametrize(
    ("targets", "drafts"),
    [
        *(("any", drafts) for drafts in ("any", "with zeros", "one-hot", "certain", "the target's", "nearly")),
        *(("with zeros", drafts) for drafts in ("any", "with zeros", "certain")),
        ("one-hot", "any"),
    ],
)
def test_what_comes_out_is_the_target(backend, targets, drafts):
    rng = np.random.default_rng(3)
    target = inputs.distributions(rng, 4, 6, targets, np.float32)
    draft = inputs.distributions(rng, 3, 6, drafts, np.float32)
    if drafts == "the target's":
        draft = target[:3].copy()
    elif drafts == "nearly":
        draft = (0.9 * target[:3] + 0.1 * draft).astype(np.float32)
    if drafts == "certain":
        properties.what_comes_out_is_the_target(backend, target, None, lambda offset, n: np.full(n, offset + 1))
        return
    tokens = [inputs.draw_from(rng, np.tile(row, (2000, 1)).astype(np.float64)) for row in draft]
    properties.what_comes_out_is_the_target(backend, target, draft, lambda offset, n: tokens[offset][:n])


def test_a_certain_draft_that_is_rejected_does_not_come_back(backend):
    """Of two tokens, equally likely, the other one is drawn; how often, the tests above look at."""
    num_seqs = 40
    target, drafts = np.full((2 * num_seqs, 2), 0.5, np.float32), np.arange(num_seqs) % 2
    named = np.arange(num_seqs), np.zeros(num_seqs, np.int32), np.zeros(num_seqs, np.int32)
    accepted, tokens = call(backend, "verify", target, None, drafts, np.arange(num_seqs + 1, dtype=np.int32), *named)
    rejected = accepted == 0
    assert 8 < rejected.sum() < 32, f"{rejected.sum()} of {num_seqs} rejected"
    assert (tokens != drafts)[rejected].all(), f"rejected {drafts[rejected]}, and drew {tokens[rejected]}"


def test_equal_but_for_rounding_still_gives_a_token(backend):
    """Where the target is everywhere a little less than the draft, a rejection leaves no residual: the target draws."""
    every, zero = np.arange(3000), np.zeros(3000, np.int32)
    u = reference.random_uniform(every, zero, zero, purpose=PURPOSE_ACCEPT, num_draws=1)[:, 0]
    seeds = np.concatenate([every[u > 0.9921], every[u < 0.9919][:5]])  # few of the rejections there are, and others
    num_seqs, num_rejected = len(seeds), int((u > 0.9921).sum())
    target, draft = np.full((2 * num_seqs, 2), 0.496, np.float32), np.full((num_seqs, 2), 0.5, np.float32)
    tokens, cu_drafts = np.zeros(num_seqs, np.int64), np.arange(num_seqs + 1, dtype=np.int32)
    named = seeds, zero[:num_seqs], zero[:num_seqs]
    accepted, tokens = call(backend, "verify", target, draft, tokens, cu_drafts, *named)
    assert accepted.tolist() == [0] * num_rejected + [1] * 5, f"accepted {accepted}"
    assert set(tokens[:num_rejected].tolist()) == {0, 1}, f"tokens {tokens} of two that are equally likely"


@pytest.mark.parametrize("certain", [True, False])
def test_what_is_out_of_range_is_rejected_where_nobody_looks(monkeypatch, certain):
    """As an engine runs: `fast` looks at neither ids nor offsets, and reads nothing that is not there."""
    monkeypatch.setenv("TWOFOLD_CHECK", "0")
    target, draft = np.full((6, 5), 0.2, np.float32), np.full((4, 5), 0.2, np.float32)
    drafts, named = np.array([1, 2, 3, 4]), (np.arange(2), np.zeros(2, np.int32), np.zeros(2, np.int32))

    def verified(tokens, offsets=(0, 2, 4)):
        probs = (target, None if certain else draft)
        return [part.tolist() for part in call(fast, "verify", *probs, tokens, np.array(offsets, np.int32), *named)]

    for bad in (-1, 5, 2**40, -(2**40)):
        accepted, tokens = verified(np.where(np.arange(4) % 2, drafts, bad))
        assert accepted == [0, 0], f"accepted {accepted} drafts before token {bad}"
        assert all(0 <= token < 5 for token in tokens), f"drew {tokens}"
    for offsets in ((-3, 2, 4), (0, 2, 400), (-(2**31), 2, 2**31 - 1)):
        assert verified(drafts, offsets) == verified(drafts), f"offsets {offsets} are not those within"


def test_refuses_bad_drafts(backend):
    good = {
        "target_probs": np.full((5, 4), 0.25, np.float32),
        "draft_probs": np.full((3, 4), 0.25, np.float32),
        "draft_tokens": np.zeros(3, np.int64),
        "cu_drafts": np.array([0, 1, 3], np.int32),
        "seeds": np.arange(2),
        "positions": np.zeros(2, np.int32),
        "sample_indices": np.zeros(2, np.int32),
    }
    negative, nan = np.full((5, 4), 0.25, np.float32), np.full((5, 4), 0.25, np.float32)
    negative[4] = [-0.25, 0.5, 0.5, 0.25]
    nan[2, 1] = np.nan
    bad = [
        ("target_probs", negative),
        ("target_probs", nan),
        ("target_probs", np.zeros((5, 4), np.float32)),
        ("target_probs", np.ones((5, 4), np.float32)),
        ("target_probs", np.full((4, 4), 0.25, np.float32)),
        ("target_probs", np.zeros((5, 4), np.int64)),
        ("draft_probs", negative[:3] * 2),
        ("draft_probs", np.full((2, 4), 0.25, np.float32)),
        ("draft_probs", np.full((3, 2), 0.5, np.float32)),
        ("draft_tokens", np.array([0, 4, 0])),
        ("draft_tokens", np.array([0, -1, 0])),
        ("draft_tokens", np.zeros(3, np.int32)),
        ("cu_drafts", np.array([0, 1, 2], np.int32)),
        ("cu_drafts", np.array([0, 3, 1, 3], np.int32)),
        ("seeds", np.arange(3)),
        ("positions", np.array([0, -1], np.int32)),
        ("sample_indices", np.zeros(2, np.int64)),
    ]
    for argument, value in bad:
        refuses(backend, "verify", argument, *(good | {argument: value}).values())
