"""Text to token ids and back, with SentencePiece's byte-fallback BPE. No torch, no chat format.

Decoding works on bytes: a piece is its UTF-8 text, a byte piece one byte, a control token nothing.
So a stream can be cut after any token without ever cutting a character.
"""

import codecs
from pathlib import Path

import sentencepiece

from model.errors import PromptError, TokenizerError

_SPACE = "\u2581"  # SentencePiece's visible space
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """A checkpoint's `tokenizer.model`. Immutable; safe to share between threads."""

    def __init__(self, file: Path) -> None:
        """Raises TokenizerError when the file is missing or not a SentencePiece model."""
        if not file.is_file():
            raise TokenizerError(f"{file} does not exist; a checkpoint needs its tokenizer.model")
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"{file} is not a SentencePiece model: {error}") from error
        self.vocab_size: int = self._pieces.get_piece_size()
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self._bytes = tuple(self._bytes_of(token_id) for token_id in range(self.vocab_size))
        self.longest_piece: int = max(
            len(self._pieces.id_to_piece(token_id)) for token_id in range(self.vocab_size)
        )
        """Characters of the longest piece: no text has fewer tokens than its length over this."""
        self._word_starts = frozenset(
            token_id
            for token_id in range(self.vocab_size)
            if self._pieces.id_to_piece(token_id).startswith(_SPACE)
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """The tokenizer of the checkpoint in `folder`. Raises TokenizerError."""
        return cls(folder / "tokenizer.model")

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
        ids: list[int] = self._pieces.encode(text)
        return ids

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

    def begins_word(self, token_id: int) -> bool:
        """Whether the piece begins with SentencePiece's space (a space byte or <unk> does not)."""
        return token_id in self._word_starts

    def _bytes_of(self, token_id: int) -> bytes:
        pieces = self._pieces
        if pieces.is_control(token_id):
            return b""
        if pieces.is_unknown(token_id):
            return str(pieces.decode([token_id])).encode()
        piece: str = pieces.id_to_piece(token_id)
        if pieces.is_byte(token_id):
            return bytes([int(piece[3:-1], 16)])  # "<0x0A>"
        return piece.replace(_SPACE, " ").encode()


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

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; possibly empty."""
        data = self._tokenizer.token_bytes(token_id)
        if data and self._drop_space:
            self._drop_space = False
            if self._tokenizer.begins_word(token_id):
                data = data[1:]
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What was held back: U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)
