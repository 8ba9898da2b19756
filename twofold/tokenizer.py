"""From text to token ids and back, and back again while the text is still growing.

Encoding is the `tokenizers` library's. Decoding is written out here, because a streamed answer needs what a library's
`decode` does not give: what *one more* token adds. A token stands for bytes, not characters. One character may span
several tokens, so the bytes go through an incremental UTF-8 decoder, which keeps the beginning of a character back
until its end has come. Decoding a whole text is the same thing with all tokens pushed at once.
"""

import codecs
import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twofold.bounded import file_size, shown
from twofold.chat_template import ChatTemplate
from twofold.errors import TwofoldError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

MAX_FILE_BYTES = 128 << 20
SPACE = "\u2581"  # SentencePiece writes a space as this
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: the byte's own in Latin-1 if that can be seen, else the
    next one from U+0100 on.

    Source: GPT-2's encoder.

    Example:
        >>> alphabet = byte_alphabet()
        >>> alphabet["A"], alphabet["Ġ"], len(alphabet)
        (65, 32, 256)
    """
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


ALPHABET = byte_alphabet()


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        special_tokens: Texts by role ("bos_token", "eos_token", ...), as chat templates want them.
        chat_template: None where the model has none.
        vocab_size: Ids that have a token: 0 to ``vocab_size`` - 1. A model may have more rows than that.

    ``add_bos`` and ``add_eos``: what `encode` adds around a text; both None, whatever the backend does by itself.

    Example:
        >>> from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers
        >>> backend = Backend(models.BPE({letter: byte for letter, byte in ALPHABET.items()}, []))
        >>> backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
        >>> tokenizer = Tokenizer(backend)
        >>> tokenizer.encode("né"), tokenizer.decode([110, 195, 169])
        ([110, 195, 169], 'né')
        >>> stream = tokenizer.detokenizer()
        >>> [stream.push([token]) for token in (110, 195, 169)]
        ['n', '', 'é']
    """

    def __init__(
        self,
        backend: "Backend",
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self._mark_special_tokens()
        if add_bos is not None or add_eos is not None:
            self._surround(bos=bool(add_bos), eos=bool(add_eos))
        self.chat_template = None if chat_template is None else ChatTemplate(chat_template, self.special_tokens)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self._spelling, self._drops_first_space = _spelling(backend)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_file(cls, path: Path, **settings: Any) -> "Tokenizer":
        """Read a ``tokenizer.json``."""
        from tokenizers import Tokenizer as Backend

        if file_size(path) > MAX_FILE_BYTES:
            raise TwofoldError(f"{path}: more than the {MAX_FILE_BYTES:,} bytes that are read")
        with library_errors(str(path)):
            backend = Backend.from_file(str(path))
        return cls(backend, **settings)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Special tokens written out in ``text`` are taken as such; ``add_special_tokens`` adds those that
        the model expects around a text (a beginning-of-sequence token, mostly; a chat template writes its own)."""
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeError):
            raise TwofoldError("a prompt must be text that UTF-8 can hold (this one has a lone surrogate)") from None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        stream = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return stream.push(token_ids) + stream.flush()

    def detokenizer(self, *, skip_special_tokens: bool = True, continues: bool = False) -> "Detokenizer":
        """A stream of tokens to text. ``continues``: text came before it, so a leading space is one."""
        return Detokenizer(self, skip_special_tokens=skip_special_tokens, continues=continues)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for; nothing, for an id that has no token."""
        if token_id not in self._bytes:
            token = self.backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
            self._bytes[token_id] = b"" if token is None else self._spelling(token)
        return self._bytes[token_id]

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact spelling in the vocabulary."""
        return self.backend.token_to_id(token)

    def _mark_special_tokens(self) -> None:
        """Tokens that have a role are special, even where the backend's own file forgets to say so."""
        from tokenizers import AddedToken

        texts = [text for text in self.special_tokens.values() if self.token_id(text) is not None]
        self.backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in texts])

    def _surround(self, **added: bool) -> None:
        from tokenizers import processors

        ids = {role: self.token_id(self.special_tokens.get(f"{role}_token", "")) for role in added if added[role]}
        special = [{"id": role, "ids": [i], "tokens": [role]} for role, i in ids.items() if i is not None]
        known = {piece["id"] for piece in special}
        pieces = [piece for piece in ("bos", "$A", "eos") if piece == "$A" or piece in known]
        self.backend.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=special)  # type: ignore

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as the text the model was trained on. Encode it with ``add_special_tokens=False``."""
        if self.chat_template is None:
            raise TwofoldError("this model has no chat template; give a prompt as plain text")
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt, **variables)


class Detokenizer:
    """Text as its tokens come: never half a character, and together always exactly what ``decode`` gives."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, continues: bool = False):
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._drops_space = tokenizer._drops_first_space and not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        kept = (self._tokenizer.token_bytes(int(i)) for i in token_ids if i not in self._skip)
        return self._after_first_space(self._utf8.decode(b"".join(kept)))

    def flush(self) -> str:
        """What was held back and will never be completed, as U+FFFD. The stream is then at its end."""
        return self._after_first_space(self._utf8.decode(b"", final=True))

    def _after_first_space(self, text: str) -> str:
        if self._drops_space and text:
            self._drops_space = False
            return text.removeprefix(" ")
        return text


def _spelling(backend: "Backend") -> tuple[Any, bool]:
    """(a token's text to its bytes, whether a text loses its first space), from what the tokenizer decodes by."""
    if backend.decoder is None:
        return _word, True
    steps = list(_decoder_steps(json.loads(backend.decoder.__getstate__())))
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level, False
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        prefixed = [step for step in steps if step["type"] == "Metaspace" and step["prepend_scheme"] != "never"]
        return _sentencepiece, bool(prefixed) or any(step["type"] == "Strip" and step["start"] for step in steps)
    known = "byte-level BPE and SentencePiece"
    raise TwofoldError(f"a tokenizer that decodes by {shown(', '.join(sorted(kinds)))}; known are {known}")


def _decoder_steps(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if decoder["type"] != "Sequence":
        yield decoder
    for step in decoder.get("decoders", ()):
        yield from _decoder_steps(step)


def _byte_level(token: str) -> bytes:
    """A token outside the alphabet (an added one) is written as it is."""
    try:
        return bytes(ALPHABET[letter] for letter in token)
    except KeyError:
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    """Text with spaces written as U+2581; a character the vocabulary lacks is spelled in tokens of one byte."""
    byte = BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()


def _word(token: str) -> bytes:
    """A tokenizer that says nothing of decoding has words for tokens."""
    return b" " + token.encode()


@contextlib.contextmanager
def library_errors(where: str) -> Iterator[None]:
    """Turns what the `tokenizers` library throws at a broken tokenizer, its panics included, into a sentence."""
    try:
        yield
    except TwofoldError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TwofoldError(f"{where}: not a usable tokenizer ({shown(error)})") from None
        raise
