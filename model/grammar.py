"""Which tokens may come next, so that an answer has the form that was asked for.

    GrammarCompiler   a tokenizer's vocabulary and end ids; turns a GrammarSpec into a Grammar
    Grammar           compiled; shared by all sequences that want the same form
    GrammarMatcher    one sequence's place in a grammar

A mask row has ceil(V/32) words of int32; bit i of word w, counted from the lowest, is token
32w + i, and 1 means allowed. End ids are allowed exactly where the answer may end. Control tokens
and <unk> are never allowed otherwise.

The engine is llguidance, imported when the first grammar is compiled. It sees tokens as bytes, as
StreamDecoder does. Only the first token of an answer that does not continue the prompt's text
differs: the decoder drops the space that it begins with, so that "▁yes" there means "yes".
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from model.errors import GrammarError
from model.grammar_spec import GrammarSpec, engine_text
from model.grammar_vocabulary import GrammarVocabulary, one_line
from model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

_STACK_BYTES = 128 << 20
"""Of the thread that compiles: the engine recurses along chains of rules, up to 8 KiB for each.
Virtual memory; only what a grammar really needs is touched."""

_stack_size_lock = threading.Lock()
"""The stack size of new threads is one setting for the whole process."""


class MaskRow(Protocol):
    """What is needed of a tensor; spares this module the import of torch."""

    def numpy(self) -> Any: ...


class GrammarCompiler:
    """Compiles specs for one vocabulary, and fills masks. Safe to share between threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_ids: Sequence[int],
        *,
        vocab_size: int | None = None,
        num_cached: int = 32,
        num_threads: int = 1,
    ) -> None:
        """end_ids: ids that end an answer; one out of vocabulary is never chosen, and left out.
        vocab_size: width of the logits, where that is not the tokenizer's.
        num_cached: compiled grammars kept, each up to some 40 MB, mostly far below 1.
        num_threads: that fill masks at once; a row of 32,000 tokens takes 10 to 70 us.

        Raises GrammarError where the vocabulary has no end id or cannot spell every byte.
        """
        self._vocabulary = GrammarVocabulary(tokenizer, end_ids, vocab_size or tokenizer.vocab_size)
        self._num_cached = num_cached
        self._num_threads = num_threads
        self._cached: OrderedDict[GrammarSpec, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_words(self) -> int:
        """Words of a mask row."""
        return self._vocabulary.num_words

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        return self._vocabulary.end_ids

    def compile(self, spec: GrammarSpec) -> "Grammar":
        """The grammar for `spec`, from the cache where it is there.

        Takes milliseconds as a rule and, for the worst texts that are let through, seconds,
        without holding the GIL: call it on a thread that may wait.
        Raises GrammarError where the spec is wrong, too big, or allows no answer.
        """
        with self._lock:
            grammar = self._cached.get(spec)
            if grammar is not None and not grammar.is_worn:
                self._cached.move_to_end(spec)
                return grammar
        grammar = _on_deep_stack(lambda: Grammar(spec, self._vocabulary))
        with self._lock:
            self._cached[spec] = grammar
            self._cached.move_to_end(spec)
            while len(self._cached) > self._num_cached:
                self._cached.popitem(last=False)
        return grammar

    def fill(
        self, matchers: Mapping[int, "GrammarMatcher"], masks_SW: MaskRow
    ) -> dict[int, GrammarError]:
        """Write the mask of each matcher into the row of `masks_SW` that is its key.

        masks_SW: int32, on the CPU, contiguous; other rows are left alone. The GIL is free while
        masks are computed, so this can run on a thread beside the forward pass; the matchers must
        be left alone meanwhile.
        Returns the rows that have no mask because their grammar turned out too costly, with the
        reason; such a sequence cannot go on.
        """
        masks = masks_SW.numpy()
        assert masks.shape[1:] == (self.num_words,), (masks.shape, self.num_words)
        assert masks.dtype == "int32", masks.dtype
        assert masks.flags.c_contiguous
        to_compute = []
        for row, matcher in matchers.items():
            known = matcher.known_mask()
            if known is None:
                to_compute.append((matcher.engine, row))
            else:
                masks[row] = known
        if to_compute:
            address, row_bytes = masks.ctypes.data, masks.strides[0]
            self._executor.unsafe_compute_mask_ptr(to_compute, address, row_bytes, len(masks))
        return {row: error for row, m in matchers.items() if (error := m.failure()) is not None}

    @cached_property
    def _executor(self) -> "LLExecutor":
        from llguidance import LLExecutor

        return LLExecutor(self._num_threads)


class Grammar:
    """A compiled grammar. Immutable to its users, who share what the engine learns by matching."""

    def __init__(self, spec: GrammarSpec, vocabulary: GrammarVocabulary) -> None:
        """Raises GrammarError."""
        self.is_worn = False
        """A matcher failed: the shared state may be full or broken. Compile again."""
        self.vocabulary = vocabulary
        text = engine_text(spec)
        self._engine = vocabulary.engine(text, vocabulary.engine_tokenizer)
        self.first_mask: Any = None
        """Words of the first row; None where the first token is like any other."""
        if not spec.continues_text:
            at_start = vocabulary.engine(text, vocabulary.engine_tokenizer_at_start)
            self.first_mask = vocabulary.words(at_start.compute_bitmask())
            if not self._engine.is_stopped():
                self.first_mask |= vocabulary.mask_of(vocabulary.bare_spaces)

    def matcher(self) -> "GrammarMatcher":
        """A matcher at the beginning of an answer; takes microseconds."""
        return GrammarMatcher(self, self._engine.deep_copy())


class GrammarMatcher:
    """How far one sequence has come. Not thread-safe."""

    def __init__(self, grammar: Grammar, engine: "LLMatcher") -> None:
        """Use Grammar.matcher."""
        self.engine = engine
        self._grammar = grammar
        self._num_accepted = 0
        self._has_ended = False

    @property
    def is_finished(self) -> bool:
        """Whether no text can follow: only end ids are allowed, or one was accepted."""
        return self._has_ended or self.engine.is_stopped()

    def accept(self, *token_ids: int) -> None:
        """Move past these ids: a token just sampled, or all that a replayed request has emitted.

        Raises GrammarError at the first that is not allowed; those before it stay accepted.
        """
        vocabulary = self._grammar.vocabulary
        for token_id in token_ids:
            if token_id in vocabulary.end_ids and not self._has_ended and self._can_end:
                self._has_ended = True
                self._num_accepted += 1
                continue
            fed = self._engine_ids(token_id)
            num_taken = 0 if fed is None else self.engine.try_consume_tokens(fed)
            if fed is None or num_taken < len(fed):
                self.engine.rollback(num_taken)
                self._check()
                raise GrammarError(
                    f"token id {token_id} is not allowed after {self._num_accepted} tokens"
                )
            self._num_accepted += 1

    def known_mask(self) -> Any:
        """Words of the next mask where nothing has to be computed, else None."""
        if self._has_ended:
            return self._grammar.vocabulary.end_mask
        return None if self._num_accepted else self._grammar.first_mask

    def failure(self) -> GrammarError | None:
        """Why the engine gave up on this sequence, or None."""
        if not self.engine.is_error():
            return None
        self._grammar.is_worn = True
        return GrammarError(f"the grammar is too costly: {one_line(self.engine.get_error())}")

    @property
    def _can_end(self) -> bool:
        return self.engine.is_accepting()

    def _engine_ids(self, token_id: int) -> list[int] | None:
        """What to feed the engine for a token; None where it can only be wrong."""
        vocabulary = self._grammar.vocabulary
        if self._has_ended or not vocabulary.is_text(token_id):
            return None
        if self._num_accepted or self._grammar.first_mask is None:
            return [token_id]
        return vocabulary.spelled_at_start(token_id)

    def _check(self) -> None:
        failure = self.failure()
        if failure is not None:
            raise failure


def _on_deep_stack(build: Callable[[], Grammar]) -> Grammar:
    """Run `build` on a thread whose stack the deepest grammar does not overflow."""
    built: list[Grammar] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            built.append(build())
        except BaseException as error:  # a panic of the engine is no Exception
            failed.append(error)

    with _stack_size_lock:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="compile-grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if not failed:
        return built[0]
    if isinstance(failed[0], Exception):
        raise failed[0]
    raise GrammarError(f"it cannot be compiled: {one_line(str(failed[0]))}") from failed[0]
