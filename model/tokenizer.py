"""Text to token ids and back, with SentencePiece's byte-fallback BPE. No torch, no chat format.

The pieces come from `tokenizer.model`, through SentencePiece, or where there is none from
`tokenizer.json`, through the `tokenizers` library; both give the same ids.

Decoding works on bytes: a piece is its UTF-8 text, a byte piece one byte, a control token nothing.
So a stream can be cut after any token without ever cutting a character.
"""

import codecs
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from model.errors import PromptError, TokenizerError

_SPACE = "\u2581"  # SentencePiece's visible space
_UNKNOWN = " \u2047 "  # what SentencePiece decodes its unknown token to
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class _Vocabulary:
    """What a tokenizer file holds."""

    pieces: tuple[str, ...]
    """As the file spells them, by id."""
    piece_bytes: tuple[bytes, ...]
    """UTF-8 bytes that each piece stands for; empty for control tokens."""
    bos_id: int
    eos_id: int
    special_ids: frozenset[int]
    """Control tokens and the unknown token."""
    control_ids: dict[str, int]
    """Of control tokens, by spelling."""
    encode: Callable[[str], list[int]]
    """Ids of a text alone; control tokens are never looked for in it."""


class Tokenizer:
    """A checkpoint's tokenizer. Immutable; safe to share between threads."""

    def __init__(self, file: Path) -> None:
        """file: a SentencePiece model, or a `.json` file of the `tokenizers` library.

        Raises TokenizerError when it is missing, damaged or of another kind.
        """
        if not file.is_file():
            raise TokenizerError(
                f"{file} does not exist; a checkpoint needs its tokenizer.model or tokenizer.json"
            )
        is_json = file.suffix == ".json"
        vocabulary = _read_tokenizer_json(file) if is_json else _read_sentencepiece(file)
        self._encode = vocabulary.encode
        self._pieces = vocabulary.pieces
        self._bytes = vocabulary.piece_bytes
        self.vocab_size: int = len(vocabulary.pieces)
        self.bos_id: int = vocabulary.bos_id
        self.eos_id: int = vocabulary.eos_id
        self.special_ids: frozenset[int] = vocabulary.special_ids
        """Ids that stand for no text of their own: control tokens and the unknown token."""
        self.control_ids: Mapping[str, int] = vocabulary.control_ids
        """Of control tokens, by spelling."""
        self.longest_piece: int = max(len(piece) for piece in vocabulary.pieces)
        """Characters of the longest piece: no text has fewer tokens than its length over this."""
        self._word_starts = frozenset(
            token_id for token_id, piece in enumerate(vocabulary.pieces) if piece.startswith(_SPACE)
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """The tokenizer of the checkpoint in `folder`: `tokenizer.model`, else `tokenizer.json`.

        Raises TokenizerError.
        """
        json_file = folder / "tokenizer.json"
        is_json_alone = json_file.is_file() and not (folder / "tokenizer.model").exists()
        return cls(json_file if is_json_alone else folder / "tokenizer.model")

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without begin or end token.

        Look-alikes of control tokens ("<s>") are encoded as the text they are.
        Raises PromptError on text that is not valid Unicode (a lone surrogate).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text is not valid Unicode at character {error.start}"
            ) from error
        return self._encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a plain prompt: the begin token, then the text."""
        return [self.bos_id, *self.encode(text)]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, as a whole: SentencePiece's leading space is dropped.

        Bytes that are not UTF-8 become U+FFFD. Raises PromptError on an id out of range.
        """
        stream = StreamDecoder(self, continues_text=False)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that this token stands for; empty for control tokens."""
        if not 0 <= token_id < self.vocab_size:
            raise PromptError(f"token id {token_id} is out of vocabulary ({self.vocab_size} ids)")
        return self._bytes[token_id]

    def piece(self, token_id: int) -> str:
        """How the vocabulary spells a token of it."""
        return self._pieces[token_id]

    def begins_word(self, token_id: int) -> bool:
        """Whether the piece begins with SentencePiece's space (a space byte or <unk> does not)."""
        return token_id in self._word_starts


class StreamDecoder:
    """Turns ids into text one by one. Owned by one stream.

    The pieces that `push` returns, and the one `flush` returns, join to the text of all ids. A
    character whose bytes have not all come yet is held back.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues_text: bool) -> None:
        """continues_text: the ids follow other text, so that a leading space belongs to them;
        otherwise SentencePiece's leading space is dropped.
        """
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = not continues_text

    @property
    def is_within_character(self) -> bool:
        """Whether bytes of a character are held back."""
        return bool(self._utf8.getstate()[0])

    def bytes_of(self, token_id: int) -> bytes:
        """What this token would add if it came next; nothing if it is out of vocabulary."""
        if token_id >= self._tokenizer.vocab_size:
            return b""
        data = self._tokenizer.token_bytes(token_id)
        drops_space = self._drop_space and self._tokenizer.begins_word(token_id)
        return data[1:] if drops_space else data

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; possibly empty.

        Raises PromptError on an id out of vocabulary.
        """
        data = self.bytes_of(token_id)
        if self._tokenizer.token_bytes(token_id):
            self._drop_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What was held back: U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


def _read_sentencepiece(file: Path) -> _Vocabulary:
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise TokenizerError(f"{file} is not a SentencePiece model: {error}") from error

    def bytes_of(token_id: int) -> bytes:
        if model.is_control(token_id):
            return b""
        if model.is_unknown(token_id):
            return str(model.decode([token_id])).encode()
        piece: str = model.id_to_piece(token_id)
        if model.is_byte(token_id):
            return bytes([int(piece[3:-1], 16)])  # "<0x0A>"
        return piece.replace(_SPACE, " ").encode()

    ids = range(model.get_piece_size())
    return _Vocabulary(
        pieces=tuple(model.id_to_piece(token_id) for token_id in ids),
        piece_bytes=tuple(map(bytes_of, ids)),
        bos_id=model.bos_id(),
        eos_id=model.eos_id(),
        special_ids=frozenset(i for i in ids if model.is_control(i) or model.is_unknown(i)),
        control_ids={model.id_to_piece(i): i for i in ids if model.is_control(i)},
        encode=model.encode,
    )


def _read_tokenizer_json(file: Path) -> _Vocabulary:
    """A `tokenizer.json` that was made of a SentencePiece model, as Mixtral's were."""
    try:
        import tokenizers
    except ImportError as error:
        raise TokenizerError(f"{file} needs the package tokenizers: {error}") from error
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        model, added = content["model"], content.get("added_tokens") or []
        if model["type"] != "BPE" or not model["byte_fallback"]:
            raise ValueError("the model is not BPE with byte fallback, as SentencePiece's is")
        special = {token["content"]: token["id"] for token in added if token["special"]}
        plain = {token["content"]: token["id"] for token in added if not token["special"]}
        id_of: dict[str, int] = {**model["vocab"], **plain, **special}
        pieces = tuple(sorted(id_of, key=lambda piece: id_of[piece]))
        if [id_of[piece] for piece in pieces] != list(range(len(pieces))):
            raise ValueError("the ids have gaps or are given twice")
        # decided here and not in the library, which would look for control tokens in the text
        content |= {"post_processor": None, "truncation": None, "padding": None, "decoder": None}
        content["added_tokens"] = [token for token in added if not token["special"]]
        content |= _spaces_as_in_sentencepiece(content)
        encoder = tokenizers.Tokenizer.from_str(json.dumps(content))
        bos_id, eos_id = special["<s>"], special["</s>"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TokenizerError(f"{file} cannot be used: {error!r}") from error
    except Exception as error:  # all that the library raises for a wrong file is Exception
        raise TokenizerError(f"{file} is refused by the tokenizers library: {error}") from error

    unknown = model.get("unk_token") or "<unk>"

    def bytes_of(piece: str) -> bytes:
        if piece == unknown:
            return _UNKNOWN.encode()
        if piece in special:
            return b""
        byte_piece = _BYTE_PIECE.fullmatch(piece)
        if byte_piece:
            return bytes([int(byte_piece[1], 16)])
        return piece.replace(_SPACE, " ").encode()

    def encode(text: str) -> list[int]:
        ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
        return ids

    special_ids = frozenset(id_of[piece] for piece in {unknown, *special} if piece in id_of)
    return _Vocabulary(
        pieces=pieces,
        piece_bytes=tuple(map(bytes_of, pieces)),
        bos_id=bos_id,
        eos_id=eos_id,
        special_ids=special_ids,
        control_ids={piece: special[piece] for piece in special if piece != unknown},
        encode=encode,
    )


def _spaces_as_in_sentencepiece(content: dict[str, Any]) -> dict[str, Any]:
    """The normalizer and pre-tokenizer that treat spaces as SentencePiece does.

    Newer files let the pre-tokenizer Metaspace put the leading space. It puts none before a text
    that begins with a space; SentencePiece, and the normalizer of older files, always do.
    """
    pre_tokenizer = content.get("pre_tokenizer")
    if pre_tokenizer is None:
        return {}
    if pre_tokenizer.get("type") != "Metaspace" or content.get("normalizer") is not None:
        raise ValueError(f"the pre-tokenizer {pre_tokenizer.get('type')} is not SentencePiece's")
    steps: list[dict[str, Any]] = []
    if pre_tokenizer.get("prepend_scheme", "always") != "never":
        steps.append({"type": "Prepend", "prepend": _SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    return {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": steps}}
