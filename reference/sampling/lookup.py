"""Drafting by prompt look-up: what followed the last time these tokens occurred.

Summaries quote, code repeats names, chats restate the question: often the next tokens have been seen before. This
drafts them for nothing, without a model; `verify` makes sure that a wrong guess costs only time.
"""

import numpy as np
from jaxtyping import Int32
from numpy import ndarray as Array

from reference._checks import require, require_shape
from reference.sampling._rows import check_each, check_per_row


def lookup(
    history: Int32[Array, "num_seqs max_history"],
    history_lens: Int32[Array, " num_seqs"],
    *,
    max_ngram: int,
    min_ngram: int = 1,
    num_draft: int,
) -> Int32[Array, "num_seqs num_draft"]:
    r"""The tokens that followed the latest earlier occurrence of the longest known suffix of each sequence.

    .. math::
        n = \max \{ n : \exists \, e < len, \; h_{e-n..e} = h_{len-n..len} \}
        \qquad drafts = h_{e..e+num\_draft} \; for \; the \; largest \; such \; e

    over ``min_ngram`` :math:`\le n \le` ``max_ngram``. The two occurrences may overlap, and the drafts end where the
    history ends.

    Args:
        history: Prompt and output of each sequence, from column 0.
        history_lens: How many columns of each row count; what lies beyond is never read.
        max_ngram: The longest suffix to look for.
        min_ngram: The shortest that is believed, at least 1.
        num_draft: How many tokens to draft, at least 0.

    Returns:
        Drafted tokens, then -1; all -1 for a sequence whose suffix is new.

    Raises:
        ValueError: If a shape or dtype is wrong, a length is not between 0 and ``max_history``, or
            1 <= ``min_ngram`` <= ``max_ngram`` does not hold.

    Source:
        Saxena, "Prompt Lookup Decoding" (2023); the latest occurrence, where the original takes the first.

    Example:
        >>> history = np.array([[7, 1, 2, 3, 9, 1, 2, 4, 8, 1, 2]], np.int32)
        >>> lookup(history, np.array([11], np.int32), max_ngram=3, num_draft=4)      # after "1 2", the last time
        array([[4, 8, 1, 2]], dtype=int32)
    """
    require_shape("lookup", "history", history, (None, None))
    require(history.dtype == np.int32, "lookup", "history", "int32", history.dtype)
    num_seqs, max_history = history.shape
    check_per_row("lookup", num_seqs, np.int32, history_lens=history_lens)
    inside = (history_lens >= 0) & (history_lens <= max_history)
    check_each("lookup", "history_lens", inside, f"0 to {max_history}", history_lens)
    require(1 <= min_ngram <= max_ngram, "lookup", "min_ngram", f"1 to max_ngram = {max_ngram}", min_ngram)
    require(num_draft >= 0, "lookup", "num_draft", "at least 0", num_draft)

    drafts = np.full((num_seqs, num_draft), -1, np.int32)
    for seq, length in enumerate(history_lens):
        end = _latest_match(history[seq, :length], max_ngram, min_ngram)
        if end is not None:
            following = history[seq, end:length][:num_draft]
            drafts[seq, : len(following)] = following
    return drafts


def _latest_match(tokens: Int32[Array, " length"], max_ngram: int, min_ngram: int) -> int | None:
    """Where the latest earlier occurrence of the longest suffix ends. The suffix grows backwards from its last token,
    and the places that still match become fewer."""
    ends, n = np.arange(1, len(tokens)), 0  # an occurrence that ends before `end` is followed by tokens[end]
    while n < max_ngram and len(ends):
        longer = ends[ends > n]
        longer = longer[tokens[longer - n - 1] == tokens[-n - 1]]
        if len(longer) == 0:
            break
        ends, n = longer, n + 1
    return int(ends[-1]) if n >= min_ngram else None
