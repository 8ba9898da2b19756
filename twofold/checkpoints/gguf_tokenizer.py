"""The tokenizer that a GGUF's metadata describes.

A GGUF holds a vocabulary and what joins its pieces, but only the *name* of the rule by which text is cut before that
(``tokenizer.ggml.pre``). So the rules are written down here, one for each family; a name that is not known is refused,
as a wrong rule gives a model tokens it never saw.

Source: the patterns are those of the models' own ``tokenizer.json``; the names are llama.cpp's (src/llama-vocab.cpp).
"""

from collections.abc import Mapping
from typing import Any

from twofold.bounded import shown
from twofold.checkpoints.gguf import scalars
from twofold.errors import TwofoldError
from twofold.tokenizer import SPACE, Tokenizer, library_errors

CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
MAX_ADDED_TOKENS = 1 << 16
MAX_PIECE = 256  # characters
MAX_PIECES_TEXT = 1 << 20  # characters of all pieces; Llama 2 has a fifth of that
EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>")
ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "gpt-2": None,  # the library's own
    "smollm": None,  # the same, after every digit has been set apart
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "smaug-bpe": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "tekken": TEKKEN,
}
OF_FAMILY = {"qwen2": "qwen2", "qwen3": "qwen2"}  # what old files leave out; those of Llama 3 are ambiguous
TAKES_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a word in the vocabulary needs no merges
BEGINS_WITH_BOS = TAKES_WHOLE_WORDS  # where the file does not say


def tokenizer_of(metadata: Mapping[str, Any], vocab_size: int) -> tuple[Tokenizer | None, str]:
    """(the tokenizer, "") or (None, why there is none). Raises ``TwofoldError`` for one that contradicts itself."""
    single = scalars(metadata)
    kind = single.get("tokenizer.ggml.model")
    if kind is None:
        return None, "the file has no tokenizer"
    if kind not in ("gpt2", "llama"):
        return None, f"its tokenizer is of a kind that is not known ({shown(kind)}; known are gpt2 and llama)"
    pre = single.get("tokenizer.ggml.pre", OF_FAMILY.get(str(single.get("general.architecture"))))
    if kind == "gpt2" and pre not in PATTERNS:
        return (
            None,
            f"its tokenizer cuts text by a rule that is not known ({shown(pre)}; known are {', '.join(PATTERNS)})",
        )
    tokens = _list(metadata, "tokens")
    if not 0 < len(tokens) <= vocab_size:
        raise TwofoldError(f"tokenizer.ggml.tokens: {len(tokens):,} tokens for a vocabulary of {vocab_size:,}")
    with library_errors("tokenizer.ggml"):
        backend = _byte_level(metadata, tokens, pre) if kind == "gpt2" else _sentencepiece(metadata, tokens)
        _add_special_tokens(backend, metadata, tokens)
        template = single.get("tokenizer.chat_template")
        tokenizer = Tokenizer(
            backend,
            special_tokens=_by_role(metadata, tokens),
            chat_template=template if isinstance(template, str) else None,
            add_bos=single.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in BEGINS_WITH_BOS),
            add_eos=single.get("tokenizer.ggml.add_eos_token", False),
        )
        return tokenizer, ""


def eos_ids_of(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """End of text, end of turn, end of message: any of them ends an answer.

    Older files name the end of text only; then a control token that the chat template ends its turns with counts too.
    """
    ids = [metadata.get(f"tokenizer.ggml.{key}") for key in EOS_KEYS]
    template, tokens = metadata.get("tokenizer.chat_template"), metadata.get("tokenizer.ggml.tokens")
    if isinstance(template, str) and isinstance(tokens, list):
        ids += [tokens.index(token) for token in TURN_ENDS if token in template and token in tokens]
    return tuple(dict.fromkeys(i for i in ids if type(i) is int))


def _list(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TwofoldError(f"tokenizer.ggml.{key}: expected a list of strings, found {type(values).__name__}")
    return values


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], pre: str) -> Any:
    """Byte-level BPE: a text's bytes, written as 256 letters, cut by a pattern, then merged pair by pair."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in _list(metadata, "merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    for merge in merges:  # the library panics where one is not in the vocabulary
        if len(merge) != 2 or not (merge[0] in vocab and merge[1] in vocab and merge[0] + merge[1] in vocab):
            raise TwofoldError(f"tokenizer.ggml.merges: {shown(' '.join(merge))!r} does not join two tokens to a third")
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in TAKES_WHOLE_WORDS))  # type: ignore[arg-type]
    pattern = PATTERNS[pre]
    cut = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    if pattern is not None:
        cut = [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cut, as_letters])  # type: ignore[assignment]
    if pattern == QWEN2:
        backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str]) -> Any:
    """SentencePiece's BPE: pieces with a score each, the best merged first; bytes for what no piece covers."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise TwofoldError("tokenizer.ggml.scores: not one score for each token")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    unknown = tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = merges_by_score(vocab, dict(zip(tokens, (float(score) for score in scores))))
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if scalars(metadata).get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(SPACE))
        undo.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    backend.decoder = decoders.Sequence(undo)  # type: ignore[assignment]
    return backend


def merges_by_score(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores imply: every way to cut a piece into two others, best pieces first.

    Example:
        >>> merges_by_score({"a": 0, "b": 1, "ab": 2, "abb": 3}, {"a": 0, "b": 0, "ab": -2.0, "abb": -1.0})
        [('ab', 'b'), ('a', 'b')]
    """
    if sum(map(len, vocab)) > MAX_PIECES_TEXT or max(map(len, vocab)) > MAX_PIECE:
        raise TwofoldError("tokenizer.ggml.tokens: pieces longer than any vocabulary has")
    found = []
    for piece in vocab:
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(scores[piece], left, right) for left, right in pairs]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _add_special_tokens(backend: Any, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    """Control tokens are special; user-defined ones are whole wherever they stand in a text, and show in it."""
    from tokenizers import AddedToken

    types = metadata.get("tokenizer.ggml.token_type")
    kinds = dict(zip(tokens, () if types is None else (int(kind) for kind in types)))
    special = [token for token, kind in kinds.items() if kind == CONTROL]
    defined = [token for token, kind in kinds.items() if kind == USER_DEFINED]
    if len(special) + len(defined) > MAX_ADDED_TOKENS:
        raise TwofoldError("tokenizer.ggml.token_type: more special tokens than any vocabulary has")
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in defined])


def _by_role(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    ids = {role: metadata.get(f"tokenizer.ggml.{key}") for role, key in ROLES.items()}
    return {role: tokens[i] for role, i in ids.items() if type(i) is int and 0 <= i < len(tokens)}
