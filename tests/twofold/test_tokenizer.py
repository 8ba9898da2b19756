"""Tokens are those the model was trained on; streamed text is never half a character, and adds up to the whole."""

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from twofold.checkpoints.gguf_model import load_gguf
from twofold.checkpoints.gguf_tokenizer import PATTERNS, eos_ids_of, tokenizer_of
from twofold.conformance.strategies.checkpoints import (
    CHATML,
    SPECIAL_TOKENS,
    byte_level_vocabulary,
    sentencepiece_vocabulary,
    write_gguf,
)
from twofold.conformance.strategies.model import random_model
from twofold.errors import TwofoldError
from twofold.tokenizer import SPACE, Tokenizer

PIECES = [
    "hello",
    " hello",
    "  ",
    " ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "12",
    "123",
    " 1",
    "é",
    "e\u0301",
    "€",
    "½",
    "²",
    "١٢",
]
PIECES += [
    "你好",
    "🙂",
    "👩‍👩‍👧",
    "\u00a0",
    "\u2028",
    "'s",
    "'LL",
    "don't",
    "!?",
    "A",
    "ǅ",
    "\ufffd",
    "\x00",
    SPACE,
    "<0x41>",
]
TEXTS = st.lists(st.sampled_from(PIECES + SPECIAL_TOKENS + ["<think>"]) | st.text(max_size=4), max_size=12).map("".join)


def made_of(vocabulary) -> Tokenizer:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    tokenizer, why_not = tokenizer_of(metadata, len(vocabulary["tokens"]))
    assert tokenizer is not None, why_not
    return tokenizer


def theirs_of(vocabulary, folder, family="llama"):
    """What transformers makes of a GGUF with this vocabulary."""
    from transformers import AutoTokenizer

    sizes = {"vocab_size": len(vocabulary["tokens"]), "hidden_size": 8, "num_layers": 1, "rope_scaling": None}
    config, tensors = random_model(family, **sizes, sliding_window=None)
    path = write_gguf(folder / "model.gguf", config, tensors, vocabulary=vocabulary)
    return AutoTokenizer.from_pretrained(folder, gguf_file=path.name)


BYTE_LEVEL = made_of(byte_level_vocabulary("smollm"))
SENTENCEPIECE = made_of(sentencepiece_vocabulary())


# --- encoding -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(ours, theirs) for each rule of cutting text that both know."""
    families = {"gpt-2": "llama", "llama-bpe": "llama", "qwen2": "qwen2", "tekken": "llama"}
    found = {}
    for pre, family in families.items():
        vocabulary = byte_level_vocabulary(pre)
        found[pre] = made_of(vocabulary), theirs_of(vocabulary, tmp_path_factory.mktemp("vocabulary"), family)
    vocabulary = sentencepiece_vocabulary()
    found["sentencepiece"] = SENTENCEPIECE, theirs_of(vocabulary, tmp_path_factory.mktemp("vocabulary"))
    return found


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
@given(text=TEXTS)
@settings(max_examples=100)
def test_tokens_are_those_that_transformers_makes_of_the_same_gguf(pairs, pre, text):
    ours, theirs = pairs[pre]
    if PATTERNS[pre] is not None and pre == "qwen2":
        text = unicodedata.normalize("NFC", text)  # as Qwen's own tokenizer.json does; a GGUF does not say so
    assert ours.encode(text) == theirs.encode(text)


@given(
    text=st.lists(st.sampled_from(["hello", " wor", "ld", "  ", " ", "é", "€", "🙂", "\n", "1", "z"]), max_size=9).map(
        "".join
    )
)
@settings(max_examples=200)
def test_sentencepiece_tokens_are_those_that_transformers_makes_of_the_same_gguf(pairs, text):
    """Of a text that does not begin with a space; see the next test."""
    ours, theirs = pairs["sentencepiece"]
    text = text.lstrip(" ")
    assert ours.encode(text) == theirs.encode(text)


def test_sentencepiece_puts_a_space_before_every_text():
    """Also before one that begins with a space, and after a special token: so do SentencePiece, llama.cpp and the
    tokenizer.json of Llama 2. (What transformers makes of a GGUF leaves the first space alone.)"""
    spelled = [SENTENCEPIECE.backend.id_to_token(i) for i in SENTENCEPIECE.encode(" hello</s>hello")]
    assert spelled == ["<s>", SPACE, f"{SPACE}hello", "</s>", f"{SPACE}hello"]


def test_special_tokens_go_around_a_text_when_asked_for():
    """Where the file does not say, Llama's tokenizers begin with one and GPT-2's do not."""
    assert SENTENCEPIECE.encode("", add_special_tokens=True) == [1]
    assert SENTENCEPIECE.encode("hello", add_special_tokens=False) == SENTENCEPIECE.encode("hello")[1:]
    silent = {key: value for key, value in byte_level_vocabulary().items() if key != "add_bos_token"}
    for pre, first in (("gpt-2", []), ("qwen2", []), ("llama-bpe", [1]), ("tekken", [1])):
        assert made_of(silent | {"pre": pre}).encode("") == first, pre
    around = made_of(byte_level_vocabulary() | {"add_bos_token": True, "add_eos_token": True})
    assert around.encode("A") == [1, *around.encode("A", add_special_tokens=False), 2]


def test_special_tokens_in_a_text_are_taken_as_such():
    tokens = BYTE_LEVEL.encode("<|im_start|>hello<think><|im_end|>")
    assert [BYTE_LEVEL.backend.id_to_token(i) for i in tokens] == ["<|im_start|>", "hello", "<think>", "<|im_end|>"]
    assert BYTE_LEVEL.decode(tokens) == "hello<think>", "a user-defined token is text"
    assert BYTE_LEVEL.decode(tokens, skip_special_tokens=False) == "<|im_start|>hello<think><|im_end|>"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "bert"}, "a kind that is not known (bert; known are gpt2 and llama)"),
        ({"pre": "falcon"}, "a rule that is not known (falcon; known are gpt-2, smollm, llama-bpe"),
        ({"pre": ["a list"]}, "a rule that is not known (None; known are"),
    ],
)
def test_a_tokenizer_of_another_kind_is_left_out_and_named(changes, says):
    vocabulary = byte_level_vocabulary() | changes
    metadata = {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    tokenizer, why_not = tokenizer_of(metadata, 400)
    assert tokenizer is None
    assert says in why_not


def test_a_family_with_one_rule_need_not_name_it():
    vocabulary = {key: value for key, value in byte_level_vocabulary().items() if key != "pre"}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    tokenizer, _ = tokenizer_of(metadata | {"general.architecture": "qwen2"}, 400)
    assert tokenizer.encode("e\u0301 12") == made_of(vocabulary | {"pre": "qwen2"}).encode("é 12")
    assert tokenizer_of(metadata | {"general.architecture": "llama"}, 400)[0] is None


def test_a_turn_of_the_chat_template_ends_an_answer():
    """Where the file names the end of text only."""
    vocabulary = byte_level_vocabulary() | {"eos_token_id": 0}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    assert eos_ids_of(metadata) == (0,)
    assert eos_ids_of(metadata | {"tokenizer.chat_template": CHATML}) == (0, 2)
    assert eos_ids_of(metadata | {"tokenizer.ggml.eot_token_id": 3}) == (0, 3)


def test_a_lone_surrogate_is_a_sentence():
    with pytest.raises(TwofoldError, match="surrogate"):
        BYTE_LEVEL.encode("a\ud800")


# --- decoding -----------------------------------------------------------------------------------------------------

IDS = st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 3), max_size=30)  # some have no token; many are no UTF-8
BYTES = st.binary(max_size=20).map(lambda data: [BYTE_LEVEL.token_id(letter) for letter in map(letter_of, data)])
EURO = [BYTE_LEVEL.token_id(letter) for letter in "âĤ¬"]


def letter_of(byte: int) -> str:
    from twofold.tokenizer import ALPHABET

    return next(letter for letter, value in ALPHABET.items() if value == byte)


@st.composite
def streams(draw):
    """A tokenizer, some of its ids, and where they are cut into pushes."""
    tokenizer = draw(st.sampled_from([BYTE_LEVEL, SENTENCEPIECE]))
    texts = TEXTS.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    bytes_of_3 = st.sampled_from([3, 3 + 0xE2, 3 + 0x82, 3 + 0xAC, 3 + 0xFF])  # SentencePiece's tokens of one byte
    ids = draw(texts | (IDS | BYTES if tokenizer is BYTE_LEVEL else st.lists(bytes_of_3, max_size=9)), label="ids")
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6), label="cuts"))
    edges = [0, *cuts, len(ids)]
    return tokenizer, ids, [ids[a:b] for a, b in zip(edges, edges[1:])]


@given(streams(), st.booleans())
@settings(max_examples=300)
def test_pushes_add_up_to_the_whole_and_hold_back_less_than_a_character(stream, skip):
    tokenizer, ids, pushes = stream
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    detokenizer, shown, seen = tokenizer.detokenizer(skip_special_tokens=skip), "", 0
    for push in pushes:
        shown += detokenizer.push(push)
        seen += len(push)
        assert whole.startswith(shown), "nothing shown is ever taken back"
        held = tokenizer.decode(ids[:seen], skip_special_tokens=skip).removeprefix(shown)
        assert held in ("", "\ufffd"), "all but the beginning of one character is shown at once"
    assert shown + detokenizer.flush() == whole


@given(IDS | BYTES, st.booleans())
@example([EURO[0], EURO[0], EURO[1], EURO[2]], False)
@settings(max_examples=300)
def test_byte_level_decoding_is_the_librarys(ids, skip):
    """For any ids at all, those that are no text and those that have no token included."""
    assert BYTE_LEVEL.decode(ids, skip_special_tokens=skip) == BYTE_LEVEL.backend.decode(ids, skip_special_tokens=skip)


@given(TEXTS, st.booleans())
@settings(max_examples=300)
def test_sentencepiece_decoding_is_the_librarys(text, skip):
    """Of what is text. (Bytes that are none become one U+FFFD a character begun, there one a byte.)"""
    ids = SENTENCEPIECE.encode(text)
    expected = SENTENCEPIECE.backend.decode(ids, skip_special_tokens=skip)
    assert SENTENCEPIECE.decode(ids, skip_special_tokens=skip) == expected


@given(st.text())
@settings(max_examples=200)
def test_text_comes_back_as_it_was(text):
    """What is not cut off with special tokens: there are none in it."""
    plain = text.replace("<", "")
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(plain)) == plain


def test_a_leading_space_is_one_only_where_text_came_before():
    """A SentencePiece text begins with a space that is not its own; a continuation's is."""
    ids = SENTENCEPIECE.encode("hello", add_special_tokens=False)
    assert SENTENCEPIECE.detokenizer().push(ids) == "hello"
    assert SENTENCEPIECE.detokenizer(continues=True).push(ids) == " hello"
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(" w")) == " w"


def test_words_without_a_decoder_are_joined_by_spaces():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"one": 0, "two": 1}, "one"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode(tokenizer.encode("two one")) == backend.decode([1, 0]) == "two one"


def test_a_decoder_of_another_kind_is_named():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    backend = Backend(models.WordLevel({"one": 0}, "one"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(TwofoldError, match="decodes by WordPiece; known are byte-level BPE and SentencePiece"):
        Tokenizer(backend)


# --- the real one ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    """(ours, what transformers makes of the same file)."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    return load_gguf(smollm2_path).tokenizer, theirs


@given(text=TEXTS)
@settings(max_examples=300)
def test_smollm2s_tokens_are_those_that_transformers_makes_of_the_same_gguf(smollm2, text):
    """Where no digit follows a space; transformers does not know the rule "smollm" (see the next test)."""
    ours, theirs = smollm2
    spaced = [a.isspace() and b.isnumeric() for a, b in zip(text, text[1:])]
    if not any(spaced):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


@pytest.fixture(scope="module")
def by_its_own_rule(smollm2):
    """transformers' tokenizer of the same file, cutting text as SmolLM2's own tokenizer.json does."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import pre_tokenizers

    backend = Backend.from_str(smollm2[1].backend_tokenizer.to_str())
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    return backend


@given(text=TEXTS)
@example("two  spaces, then 12 and  3")
@settings(max_examples=300)
def test_smollm2_sets_every_digit_apart(smollm2, by_its_own_rule, text):
    """With the rule of its own tokenizer.json in place of GPT-2's, transformers agrees on every text."""
    assert smollm2[0].encode(text) == by_its_own_rule.encode(text).ids


def test_smollm2_speaks(smollm2):
    ours, theirs = smollm2
    messages = [{"role": "user", "content": "Why is the sky blue? 🙂"}]
    prompt = ours.apply_chat_template(messages)
    assert prompt == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    ids = ours.encode(prompt, add_special_tokens=False)
    assert ids[:2] == [1, 9690]
    assert ours.decode(ids, skip_special_tokens=False) == prompt
    assert ours.vocab_size == 49152
