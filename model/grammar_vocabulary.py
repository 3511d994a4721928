"""A tokenizer's vocabulary as the grammar engine sees it: bytes by token id, and bit masks.

Everything that is set up once for the engine (llguidance) is here: its tokenizers and its limits.
"""

import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from model.errors import GrammarError
from model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_MAX_LEXER_STATES = 20_000
"""Of one grammar, over all its sequences; 1 to 2 KiB each."""
_MAX_GRAMMAR_SIZE = 100_000
"""Symbols of a grammar's rules."""
_MAX_ROW_ITEMS = 4_000
"""Ways in which an answer may go on; 500 optional properties need more than the usual 2,000."""
_COMPILE_FUEL = 500_000
"""Steps that may go into regular expressions; a second or two."""


@dataclass
class _ByteTokens:
    """A vocabulary in the form in which the engine takes it."""

    tokens: list[bytes]
    eos_token_id: int
    id_of_byte: list[int]
    bos_token_id: int | None = None
    special_token_ids: tuple[int, ...] = ()

    def __call__(self, text: bytes) -> list[int]:
        """Text byte by byte, which every vocabulary can spell. With no_forcing nobody asks."""
        return [self.id_of_byte[value] for value in text]


class GrammarVocabulary:
    """A tokenizer's pieces as the engine wants them. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int], vocab_size: int) -> None:
        self.end_ids = frozenset(i for i in end_ids if i < vocab_size)
        if not self.end_ids:
            raise GrammarError(f"no end id of {list(end_ids)} is in a vocabulary of {vocab_size}")
        self.num_words = (vocab_size + 31) // 32
        not_text = tokenizer.special_ids | self.end_ids
        pieces = [tokenizer.token_bytes(i) for i in range(min(vocab_size, tokenizer.vocab_size))]
        self._pieces = [b"" if i in not_text else piece for i, piece in enumerate(pieces)]
        self._pieces += [b""] * (vocab_size - len(pieces))
        self._at_start = [
            piece[1:] if piece and tokenizer.begins_word(i) else piece
            for i, piece in enumerate(self._pieces)
        ]
        self.bare_spaces = [
            i for i, piece in enumerate(self._pieces) if piece and not self._at_start[i]
        ]
        """Tokens that are dropped whole where an answer begins."""
        id_of = {piece: i for i, piece in enumerate(self._pieces) if len(piece) == 1}
        missing = [value for value in range(256) if bytes([value]) not in id_of]
        if missing:
            raise GrammarError(f"the vocabulary has no token for the byte 0x{missing[0]:02X}")
        self._id_of_byte = [id_of[bytes([value])] for value in range(256)]
        self._lock = threading.Lock()

    def is_text(self, token_id: int) -> bool:
        return 0 <= token_id < len(self._pieces) and bool(self._pieces[token_id])

    def spelled_at_start(self, token_id: int) -> list[int]:
        """Ids of the single bytes that this token adds to an answer that begins with it."""
        return [self._id_of_byte[value] for value in self._at_start[token_id]]

    @property
    def engine_tokenizer(self) -> "LLTokenizer":
        with self._lock:
            return self._engine_tokenizer

    @property
    def engine_tokenizer_at_start(self) -> "LLTokenizer":
        with self._lock:
            return self._engine_tokenizer_at_start

    @cached_property
    def _engine_tokenizer(self) -> "LLTokenizer":
        return self._tokenizer_of(self._pieces)

    @cached_property
    def _engine_tokenizer_at_start(self) -> "LLTokenizer":
        return self._tokenizer_of(self._at_start)

    def _tokenizer_of(self, pieces: list[bytes]) -> "LLTokenizer":
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise GrammarError(f"structured output needs the package llguidance: {error}") from None
        ends = sorted(self.end_ids)
        return LLTokenizer(
            TokenizerWrapper(_ByteTokens(pieces, ends[0], self._id_of_byte)), eos_token=ends
        )

    @cached_property
    def _limits(self) -> "LLParserLimits":
        from llguidance import LLParserLimits

        return LLParserLimits(
            max_items_in_row=_MAX_ROW_ITEMS,
            initial_lexer_fuel=_COMPILE_FUEL,
            max_lexer_states=_MAX_LEXER_STATES,
            max_grammar_size=_MAX_GRAMMAR_SIZE,
            verbose_errors=False,
        )

    def engine(self, text: str, tokenizer: "LLTokenizer") -> "LLMatcher":
        """A matcher of the engine at its first mask. Raises GrammarError."""
        from llguidance import LLMatcher

        matcher = LLMatcher(tokenizer, text, log_level=0, limits=self._limits)
        if not matcher.is_error():
            mask = matcher.compute_bitmask()  # finds the grammars that allow nothing at all
            text_ids = set(self.ids_of(mask)) - self.end_ids
            if text_ids and not matcher.is_error():  # finds those that cannot be rolled back
                matcher.consume_token(min(text_ids))
                matcher.rollback(1)
        if matcher.is_error():
            raise GrammarError(one_line(matcher.get_error()))
        return matcher

    @cached_property
    def end_mask(self) -> Any:
        return self.mask_of(self.end_ids)

    def mask_of(self, ids: Iterable[int]) -> Any:
        """Words with these ids allowed."""
        import numpy as np

        bits = np.zeros(self.num_words * 32, dtype=np.uint8)
        bits[list(ids)] = 1
        return self.words(np.packbits(bits, bitorder="little").tobytes())

    def ids_of(self, mask: bytes) -> list[int]:
        """Ids that a mask allows."""
        import numpy as np

        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
        ids: list[int] = np.flatnonzero(bits).tolist()
        return ids

    def words(self, mask: bytes) -> Any:
        import numpy as np

        return np.frombuffer(mask, dtype="<i4")[
            : self.num_words
        ].copy()  # the engine has spare bits


def one_line(message: str) -> str:
    """What the engine says of a grammar, in one line."""
    if message.startswith("NoExtensionBias"):
        return "it allows no answer"
    if message.startswith("panic"):
        return "the grammar engine cannot handle it"
    if message.startswith("rollback"):
        return "rules with max_tokens=... or stop=... are not supported"
    reasons = re.findall(r"^error: (.*)", message, re.MULTILINE)  # of a regular expression
    line = f"regex: {reasons[-1]}" if reasons else message.strip().split("\n", 1)[0]
    return line if len(line) <= 300 else line[:300] + "..."
