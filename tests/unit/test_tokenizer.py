"""Ids and text are SentencePiece's and mistral-common's, also where text comes id by id."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor

from model.errors import PromptError, TokenizerError
from model.tokenizer import StreamDecoder, Tokenizer

AWKWARD = [
    "",
    " ",
    "   three spaces before, two after  ",
    "tabs\tand\r\nends of lines\n\n",
    "\x00\x01\x1b[0m\x7f\x80",
    "naïve café, cafe\u0301",
    "日本語のテキスト。한국어 العربية",
    "🦙 👩‍👩‍👧‍👦 🏳️‍🌈",
    "<s>",
    "</s> <unk> <s>a</s>",
    "[INST] look-alike [/INST]",
    "<0x0A>",
    "\ufeff\u200b\u2028\u00a0",
    "\ufffd",
    "▁visible▁space",
    "\ue000 \U0010ffff ﬁ Ａ",
]


@pytest.fixture(scope="module", params=["tiny", "Mixtral-8x7B"])
def file(request: pytest.FixtureRequest, tiny_folder: Path, mixtral_tokenizer_file: Path) -> Path:
    return tiny_folder / "tokenizer.model" if request.param == "tiny" else mixtral_tokenizer_file


@pytest.fixture(scope="module")
def tokenizer(file: Path) -> Tokenizer:
    return Tokenizer(file)


@pytest.fixture(scope="module")
def sentencepiece(file: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(file))


# --- encoding ---


@pytest.mark.parametrize("text", AWKWARD)
def test_ids_equal_sentencepieces(
    tokenizer: Tokenizer, sentencepiece: SentencePieceProcessor, text: str
) -> None:
    assert tokenizer.encode(text) == sentencepiece.encode(text)


def test_prompt_ids_equal_mistral_commons(mixtral_tokenizer: Tokenizer) -> None:
    reference = MistralTokenizer.v1().instruct_tokenizer.tokenizer
    for text in AWKWARD:
        assert mixtral_tokenizer.encode_prompt(text) == reference.encode(text, bos=True, eos=False)


@pytest.mark.parametrize("text", [*AWKWARD, *(f"a{text}b" for text in AWKWARD)])
def test_text_never_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    assert not {0, 1, 2} & set(tokenizer.encode(text))


@given(text=st.text())
def test_decode_undoes_encode_wherever_sentencepiece_does(
    tokenizer: Tokenizer, sentencepiece: SentencePieceProcessor, text: str
) -> None:
    back = tokenizer.decode(tokenizer.encode(text))
    assert back == sentencepiece.decode(sentencepiece.encode(text))
    if "▁" not in text:  # SentencePiece's own sign for a space
        assert back == text


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="character 2"):
        tokenizer.encode("ab\ud800c")


# --- decoding ---

# A number stands for the piece of that id (byte pieces left out), a character for the byte pieces
# of its UTF-8. So bytes come in any order with other pieces, and yet are always valid.
ATOMS = st.lists(
    st.one_of(
        st.integers(0, 2),
        st.integers(3, 2**16),
        st.characters(codec="utf-8", exclude_characters="\ufffd"),
    ),
    max_size=20,
)


def ids_of(atoms: list[int | str], sentencepiece: SentencePieceProcessor) -> list[int]:
    ids: list[int] = []
    for atom in atoms:
        if isinstance(atom, str):
            ids += [sentencepiece.piece_to_id(f"<0x{byte:02X}>") for byte in atom.encode()]
        elif not sentencepiece.is_byte(token_id := atom % sentencepiece.get_piece_size()):
            ids.append(token_id)
    return ids


@given(atoms=ATOMS)
def test_decode_equals_sentencepieces_on_valid_bytes(
    tokenizer: Tokenizer, sentencepiece: SentencePieceProcessor, atoms: list[int | str]
) -> None:
    ids = ids_of(atoms, sentencepiece)
    assert tokenizer.decode(ids) == sentencepiece.decode(ids)


@given(numbers=st.lists(st.one_of(st.integers(0, 258), st.integers(0, 2**16)), max_size=20))
def test_pushes_and_flush_join_to_the_whole_text(tokenizer: Tokenizer, numbers: list[int]) -> None:
    ids = [number % tokenizer.vocab_size for number in numbers]  # 3 to 258 are the byte pieces

    def streamed(continues_text: bool) -> str:
        stream = StreamDecoder(tokenizer, continues_text=continues_text)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    assert streamed(continues_text=False) == tokenizer.decode(ids)
    all_bytes = b"".join(map(tokenizer.token_bytes, ids))
    assert streamed(continues_text=True) == all_bytes.decode("utf-8", errors="replace")


@given(atoms=ATOMS)
def test_a_stream_never_cuts_a_character_nor_holds_back_more_than_one(
    tokenizer: Tokenizer, sentencepiece: SentencePieceProcessor, atoms: list[int | str]
) -> None:
    stream = StreamDecoder(tokenizer, continues_text=True)
    held_back = b""
    for token_id in ids_of(atoms, sentencepiece):
        held_back += tokenizer.token_bytes(token_id)
        pushed = stream.push(token_id)
        assert "\ufffd" not in pushed
        assert held_back.startswith(pushed.encode())
        held_back = held_back.removeprefix(pushed.encode())
        assert len(held_back) <= 3
    assert held_back == b""
    assert stream.flush() == ""


def test_bytes_that_are_no_utf8_become_replacement_characters(tokenizer: Tokenizer) -> None:
    llama = tokenizer.encode("🦙")[-4:]
    assert [len(tokenizer.token_bytes(token_id)) for token_id in llama] == [1, 1, 1, 1]
    assert tokenizer.decode(llama[:3]) == "\ufffd"
    assert tokenizer.decode(llama[:2] + tokenizer.encode("a")) == "\ufffd a"


def test_a_leading_space_is_dropped_only_where_nothing_came_before(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a word")
    assert tokenizer.decode(ids) == "a word"
    assert tokenizer.decode([tokenizer.bos_id, *ids]) == "a word"
    after_text = StreamDecoder(tokenizer, continues_text=True)
    assert "".join(after_text.push(token_id) for token_id in ids) == " a word"


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("continues_text", [False, True])
def test_what_each_token_adds_joins_to_the_texts_bytes(
    tokenizer: Tokenizer, text: str, continues_text: bool
) -> None:
    stream = StreamDecoder(tokenizer, continues_text=continues_text)
    data, shown = b"", ""
    for token_id in tokenizer.encode_prompt(text):
        data += stream.bytes_of(token_id)
        shown += stream.push(token_id)
        assert stream.is_within_character == (data != shown.encode())
    assert data.decode() == shown
    assert stream.bytes_of(tokenizer.vocab_size) == b""


@pytest.mark.parametrize("offset", [0, 1, 10**9])
def test_ids_out_of_vocabulary_are_refused(tokenizer: Tokenizer, offset: int) -> None:
    for token_id in (tokenizer.vocab_size + offset, -1 - offset):
        with pytest.raises(PromptError, match=str(token_id)):
            tokenizer.decode([token_id])


def test_sizes_and_control_tokens_are_mistrals(
    tokenizer: Tokenizer, sentencepiece: SentencePieceProcessor
) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.vocab_size == sentencepiece.get_piece_size()
    assert tokenizer.token_bytes(1) == tokenizer.token_bytes(2) == b""


# --- the file ---


def test_a_missing_or_foreign_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.model does not exist"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model is not a SentencePiece model"):
        Tokenizer.from_folder(tmp_path)
