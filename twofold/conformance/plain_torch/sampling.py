"""The sampling ops in plain torch: the whole batch at once, filters by sorting, counts by scattering."""

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor as Array

from reference._checks import require
from reference.numerics.philox import PURPOSE_ACCEPT, PURPOSE_DRAW, PURPOSE_RESAMPLE
from twofold.conformance.plain_torch.numerics import random_gumbel, random_uniform

# ---- sample -----------------------------------------------------------------------------------------------------


def penalize(
    logits: Float[Array, "num_rows vocab_size"],
    history: Int32[Array, "num_rows max_history"],
    prompt_lens: Int32[Array, " num_rows"],
    repetition_penalty: Float32[Array, " num_rows"],
    presence_penalty: Float32[Array, " num_rows"],
    frequency_penalty: Float32[Array, " num_rows"],
    bias_ids: Int32[Array, "num_rows max_biases"],
    bias_values: Float32[Array, "num_rows max_biases"],
    *,
    out: Float[Array, "num_rows vocab_size"] | None = None,
) -> Float[Array, "num_rows vocab_size"]:
    op = "penalize"
    require(logits.ndim == 2 and logits.is_floating_point(), op, "logits", "floats [num_rows, vocab_size]", logits)
    num_rows, vocab_size = logits.shape
    penalties = {
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }
    _check_per_row(op, num_rows, torch.float32, **penalties)
    _check_per_row(op, num_rows, torch.int32, prompt_lens=prompt_lens)
    for name, ids in (("history", history), ("bias_ids", bias_ids)):
        require(ids.ndim == 2 and len(ids) == num_rows, op, name, f"[{num_rows}, *]", tuple(ids.shape))
        _check_ids(op, name, ids, vocab_size, torch.int32, lowest=-1)
    fits = bias_values.shape == bias_ids.shape and bias_values.dtype == torch.float32
    require(fits, op, "bias_values", f"float32 {tuple(bias_ids.shape)}", f"{bias_values.dtype} {bias_values.shape}")
    inside = (prompt_lens >= 0) & (prompt_lens <= history.shape[1])
    _check_each(op, "prompt_lens", inside, f"0 to {history.shape[1]}", prompt_lens)
    _check_each(op, "repetition_penalty", repetition_penalty > 0, "more than 0", repetition_penalty)
    for name, values in penalties.items():
        _check_each(op, name, values.isfinite(), "a finite number", values)
    _check_each(op, "bias_values", (bias_ids < 0) | (bias_values < torch.inf), "finite or -inf", bias_values)

    def scattered(ids: Array, values: Array) -> Array:
        """Sums of values by token; what is padding goes to a column of its own, which is cut off."""
        sums = torch.zeros(num_rows, vocab_size + 1, dtype=values.dtype, device=logits.device)
        return sums.scatter_add_(1, torch.where(ids < 0, vocab_size, ids.long()), values)[:, :vocab_size]

    ones = torch.ones_like(history)
    biased = scattered(bias_ids, torch.ones_like(bias_ids))
    _check_each(op, "bias_ids", (biased <= 1).all(1), "each token once in a row", bias_ids)
    is_output = torch.arange(history.shape[1], device=history.device) >= prompt_lens[:, None]
    counts = scattered(history, ones * is_output)
    compute = _compute(logits)
    scores = logits.to(compute) + scattered(bias_ids, bias_values.to(compute))
    repetition = torch.where(scattered(history, ones) > 0, repetition_penalty[:, None].to(compute), 1)
    scores = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = scores - frequency_penalty[:, None] * counts - presence_penalty[:, None] * (counts > 0)
    return _deliver(op, scores, out)


def filter_logits(
    logits: Float[Array, "num_rows vocab_size"],
    temperature: Float32[Array, " num_rows"],
    top_k: Int32[Array, " num_rows"],
    top_p: Float32[Array, " num_rows"],
    min_p: Float32[Array, " num_rows"],
    *,
    out: Float[Array, "num_rows vocab_size"] | None = None,
) -> Float[Array, "num_rows vocab_size"]:
    _check_filters("filter_logits", logits, temperature, top_k, top_p, min_p)
    return _deliver("filter_logits", _filter(logits, temperature, top_k, top_p, min_p), out)


def sample(
    logits: Float[Array, "num_rows vocab_size"],
    temperature: Float32[Array, " num_rows"],
    top_k: Int32[Array, " num_rows"],
    top_p: Float32[Array, " num_rows"],
    min_p: Float32[Array, " num_rows"],
    seeds: Int64[Array, " num_rows"],
    positions: Int32[Array, " num_rows"],
    sample_indices: Int32[Array, " num_rows"],
) -> Int64[Array, " num_rows"]:
    _check_filters("sample", logits, temperature, top_k, top_p, min_p)
    _check_draw("sample", len(logits), seeds, positions, sample_indices)
    noise = random_gumbel(seeds, positions, sample_indices, purpose=PURPOSE_DRAW, num_draws=logits.shape[1])
    return (_filter(logits, temperature, top_k, top_p, min_p) + noise).argmax(1)


def log_probs(
    logits: Float[Array, "num_rows vocab_size"], token_ids: Int64[Array, " num_rows"], *, num_top: int
) -> tuple[
    Float[Array, " num_rows"], Int32[Array, " num_rows"], Int64[Array, "num_rows num_top"],
    Float[Array, "num_rows num_top"],
]:  # fmt: skip
    _check_logits("log_probs", logits)
    num_rows, vocab_size = logits.shape
    _check_per_row("log_probs", num_rows, torch.int64, token_ids=token_ids)
    _check_ids("log_probs", "token_ids", token_ids, vocab_size, torch.int64, lowest=0)
    require(0 <= num_top <= vocab_size, "log_probs", "num_top", f"0 to {vocab_size}", num_top)
    scores = logits.to(_compute(logits))
    logs = scores.log_softmax(1)
    rank = 1 + (scores > scores.gather(1, token_ids[:, None])).sum(1)
    top_ids = scores.sort(dim=1, descending=True, stable=True).indices[:, :num_top]
    return logs.gather(1, token_ids[:, None])[:, 0], rank.int(), top_ids, logs.gather(1, top_ids)


def _filter(logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array) -> Array:
    """Every token's fate from its place in the row, sorted: how many, and how much mass, lies strictly before it."""
    vocab_size = logits.shape[1]
    scores, ids = logits.to(_compute(logits)).sort(dim=1, descending=True, stable=True)
    is_greedy = temperature == 0
    scaled = (scores - scores[:, :1]) / torch.where(is_greedy, 1, temperature)[:, None]

    ascending = -scores.contiguous()
    num_better = torch.searchsorted(ascending, ascending)  # the first of equals
    limit = torch.where(top_k == 0, vocab_size, top_k)[:, None]
    stays = (scaled >= min_p[:, None].log()) & (num_better < limit)
    mass = torch.where(stays, scaled.exp(), 0).double()
    before = torch.cat([torch.zeros_like(mass[:, :1]), mass.cumsum(1)], dim=1)
    share_before = before.gather(1, num_better) / before[:, -1:]
    stays &= (top_p[:, None] == 1) | (share_before < top_p[:, None])

    stays = torch.where(is_greedy[:, None], torch.arange(vocab_size, device=logits.device) == 0, stays)
    scaled = torch.where(stays, scaled, -torch.inf)
    return torch.empty_like(scaled).scatter_(1, ids, scaled)


# ---- beam_scores ------------------------------------------------------------------------------------------------


def beam_scores(
    logits: Float[Array, "num_rows vocab_size"],
    scores: Float32[Array, " num_rows"],
    cu_beams: Int32[Array, " num_groups_plus_1"],
    *,
    num_candidates: int,
) -> tuple[
    Float[Array, "num_groups num_candidates"], Int32[Array, "num_groups num_candidates"],
    Int64[Array, "num_groups num_candidates"],
]:  # fmt: skip
    _check_logits("beam_scores", logits)
    num_rows, vocab_size = logits.shape
    _check_per_row("beam_scores", num_rows, torch.float32, scores=scores)
    _check_each("beam_scores", "scores", scores < torch.inf, "finite or -inf", scores)
    _check_boundaries("beam_scores", "cu_beams", cu_beams, num_rows)
    require(num_candidates >= 1, "beam_scores", "num_candidates", "at least 1", num_candidates)
    compute = _compute(logits)
    totals = scores[:, None] + logits.to(compute).log_softmax(1)
    # Every group gets a square of its own, padded with -inf, so that one sort serves them all.
    sizes = cu_beams.diff().long()
    group = torch.repeat_interleave(torch.arange(len(sizes), device=logits.device), sizes)
    row = torch.arange(num_rows, device=logits.device) - cu_beams[group]
    most = max(int(sizes.max()) if len(sizes) else 0, -(-num_candidates // vocab_size))
    square = torch.full((len(sizes), most, vocab_size), -torch.inf, dtype=compute, device=logits.device)
    square[group, row] = totals
    best, chosen = square.flatten(1).sort(dim=1, descending=True, stable=True)
    best, chosen = best[:, :num_candidates], chosen[:, :num_candidates]
    nothing = best.isneginf()
    rows = torch.where(nothing, -1, chosen // vocab_size).int()
    return best, rows, torch.where(nothing, -1, chosen % vocab_size)


# ---- verify -----------------------------------------------------------------------------------------------------


def verify(
    target_probs: Float[Array, "num_rows vocab_size"],
    draft_probs: Float[Array, "num_drafts vocab_size"] | None,
    draft_tokens: Int64[Array, " num_drafts"],
    cu_drafts: Int32[Array, " num_seqs_plus_1"],
    seeds: Int64[Array, " num_seqs"],
    positions: Int32[Array, " num_seqs"],
    sample_indices: Int32[Array, " num_seqs"],
) -> tuple[Int32[Array, " num_seqs"], Int64[Array, " num_seqs"]]:
    op, num_drafts, num_seqs = "verify", len(draft_tokens), len(cu_drafts) - 1
    _check_boundaries(op, "cu_drafts", cu_drafts, num_drafts)
    _check_distributions(op, "target_probs", target_probs, num_drafts + num_seqs)
    vocab_size = target_probs.shape[1]
    _check_per_row(op, num_drafts, torch.int64, draft_tokens=draft_tokens)
    _check_ids(op, "draft_tokens", draft_tokens, vocab_size, torch.int64, lowest=0)
    _check_draw(op, num_seqs, seeds, positions, sample_indices)
    compute = _compute(target_probs)
    target = target_probs.to(compute)
    if draft_probs is None:
        draft = torch.nn.functional.one_hot(draft_tokens, vocab_size).to(compute)
    else:
        _check_distributions(op, "draft_probs", draft_probs, num_drafts, vocab_size)
        draft = draft_probs.to(compute)

    sizes, device = cu_drafts.diff().long(), target.device
    seq = torch.repeat_interleave(torch.arange(num_seqs, device=device), sizes)
    drafts = torch.arange(num_drafts, device=device)
    offset = drafts - cu_drafts[seq]
    ratio = target[drafts + seq, draft_tokens] / draft[drafts, draft_tokens]  # 0 / 0 is NaN, and accepts nothing
    where = (seeds[seq], positions[seq] + offset, sample_indices[seq])
    rejected = ~(random_uniform(*where, purpose=PURPOSE_ACCEPT, num_draws=1)[:, 0] < ratio)
    count = sizes.scatter_reduce(0, seq, torch.where(rejected, offset, sizes[seq]), "amin")

    weights = target[cu_drafts[:-1] + torch.arange(num_seqs, device=device) + count]
    short = (count < sizes).nonzero()[:, 0]
    residual = (weights[short] - draft[cu_drafts[short] + count[short]]).clamp(min=0)
    weights[short] = torch.where(residual.any(1, keepdim=True), residual, weights[short])
    noise = [
        random_gumbel(seeds, positions + count, sample_indices, purpose=purpose, num_draws=vocab_size)
        for purpose in (PURPOSE_DRAW, PURPOSE_RESAMPLE)
    ]
    tokens = (weights.log() + torch.where((count < sizes)[:, None], noise[1], noise[0])).argmax(1)
    return count.int(), tokens


# ---- lookup -----------------------------------------------------------------------------------------------------


def lookup(
    history: Int32[Array, "num_seqs max_history"],
    history_lens: Int32[Array, " num_seqs"],
    *,
    max_ngram: int,
    min_ngram: int = 1,
    num_draft: int,
) -> Int32[Array, "num_seqs num_draft"]:
    require(history.ndim == 2, "lookup", "history", "[num_seqs, max_history]", tuple(history.shape))
    require(history.dtype == torch.int32, "lookup", "history", "int32", history.dtype)
    num_seqs, max_history = history.shape
    _check_per_row("lookup", num_seqs, torch.int32, history_lens=history_lens)
    inside = (history_lens >= 0) & (history_lens <= max_history)
    _check_each("lookup", "history_lens", inside, f"0 to {max_history}", history_lens)
    require(1 <= min_ngram <= max_ngram, "lookup", "min_ngram", f"1 to max_ngram = {max_ngram}", min_ngram)
    require(num_draft >= 0, "lookup", "num_draft", "at least 0", num_draft)
    drafts = torch.full((num_seqs, num_draft), -1, dtype=torch.int32, device=history.device)
    for seq, length in enumerate(history_lens.tolist()):
        tokens = history[seq, :length]
        for n in range(min(max_ngram, length - 1), min_ngram - 1, -1):
            starts = (tokens.unfold(0, n, 1)[:-1] == tokens[-n:]).all(1).nonzero()[:, 0]  # every window but the suffix
            if len(starts):
                following = tokens[int(starts[-1]) + n :][:num_draft]
                drafts[seq, : len(following)] = following
                break
    return drafts


# ---- shared -----------------------------------------------------------------------------------------------------


def _compute(x: Array) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _deliver(op: str, result: Array, out: Array | None) -> Array:
    if out is None:
        return result
    fits = out.shape == result.shape and out.dtype == result.dtype
    require(fits, op, "out", f"{result.dtype} {tuple(result.shape)}", f"{out.dtype} {tuple(out.shape)}")
    return out.copy_(result)


def _check_each(op: str, argument: str, valid: Array, expected: str, values: Array) -> None:
    if not valid.all():
        row = int(valid.reshape(len(valid), -1).all(1).int().argmin())
        require(False, op, argument, expected, f"{values[row].tolist()} in row {row}")


def _check_per_row(op: str, num_rows: int, dtype: torch.dtype, **arguments: Array) -> None:
    for name, values in arguments.items():
        require(values.shape == (num_rows,), op, name, f"shape [{num_rows}]", list(values.shape))
        require(values.dtype == dtype, op, name, str(dtype), values.dtype)


def _check_ids(op: str, argument: str, ids: Array, vocab_size: int, dtype: torch.dtype, lowest: int) -> None:
    require(ids.dtype == dtype, op, argument, str(dtype), ids.dtype)
    _check_each(op, argument, (ids >= lowest) & (ids < vocab_size), f"{lowest} <= id < {vocab_size}", ids)


def _check_logits(op: str, logits: Array) -> None:
    fits = logits.ndim == 2 and logits.shape[1] > 0 and logits.is_floating_point()
    require(fits, op, "logits", "floats [num_rows, vocab_size >= 1]", f"{logits.dtype} {tuple(logits.shape)}")
    tops = logits.to(_compute(logits)).amax(1)  # NaN passes through a maximum
    _check_each(op, "logits", tops.isfinite(), "a finite logit in every row, and none NaN or +inf", tops)


def _check_filters(op: str, logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array) -> None:
    _check_logits(op, logits)
    _check_per_row(op, len(logits), torch.float32, temperature=temperature, top_p=top_p, min_p=min_p)
    _check_per_row(op, len(logits), torch.int32, top_k=top_k)
    valid = (temperature >= 0) & (temperature < torch.inf)
    _check_each(op, "temperature", valid, "finite and at least 0", temperature)
    _check_each(op, "top_k", top_k >= 0, "at least 0", top_k)
    _check_each(op, "top_p", (top_p > 0) & (top_p <= 1), "more than 0 and at most 1", top_p)
    _check_each(op, "min_p", (min_p >= 0) & (min_p <= 1), "from 0 to 1", min_p)


def _check_draw(op: str, num_rows: int, seeds: Array, positions: Array, sample_indices: Array) -> None:
    _check_per_row(op, num_rows, torch.int64, seeds=seeds)
    _check_per_row(op, num_rows, torch.int32, positions=positions, sample_indices=sample_indices)
    _check_each(op, "positions", positions >= 0, "at least 0", positions)
    _check_each(op, "sample_indices", sample_indices >= 0, "at least 0", sample_indices)


def _check_boundaries(op: str, argument: str, cumulative: Array, end: int) -> None:
    require(cumulative.ndim == 1 and cumulative.dtype == torch.int32, op, argument, "int32 offsets", cumulative)
    ends = len(cumulative) > 0 and cumulative[0] == 0 and cumulative[-1] == end
    require(
        ends and (cumulative.diff() >= 0).all(), op, argument, f"offsets from 0 to {end}, never falling", cumulative
    )


def _check_distributions(op: str, argument: str, probs: Array, num_rows: int, vocab_size: int | None = None) -> None:
    fits = probs.ndim == 2 and len(probs) == num_rows and vocab_size in (None, probs.shape[1])
    require(fits, op, argument, f"shape [{num_rows}, {vocab_size or '*'}]", list(probs.shape))
    require(probs.is_floating_point(), op, argument, "a floating dtype", probs.dtype)
    sums = probs.to(_compute(probs)).sum(1)
    valid = (probs >= 0).all(1) & ((sums - 1).abs() <= 0.01)
    _check_each(op, argument, valid, "values of at least 0 that sum to 1", probs)
