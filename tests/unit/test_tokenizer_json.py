"""A tokenizer.json gives the ids and the text of the tokenizer.model that it was made of."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor

from model.chat import ChatFormat, Message
from model.errors import PromptError, TokenizerError
from model.tokenizer import StreamDecoder, Tokenizer
from tests.unit.test_tokenizer import AWKWARD

PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def converted(file: Path, **changes: Any) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece model, in the form of Mixtral's.

    A piece can come of any two pieces that join to it; pieces of a higher score are merged first.
    """
    model = SentencePieceProcessor(model_file=str(file))
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    merges = []
    for piece, token_id in sorted(vocab.items(), key=lambda item: -model.get_score(item[1])):
        if not (model.is_control(token_id) or model.is_byte(token_id)):
            halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
            known = [(a, b) for a, b in halves if a in vocab and b in vocab]
            merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": model.id_to_piece(i), "special": True} | flags for i in range(3)
        ],
        "normalizer": PREPEND,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [" ".join(pair) for pair in merges],
        },
    } | changes


def write(folder: Path, content: Any) -> Path:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def mixtrals(mixtral_tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral-8x7B's tokenizer, converted."""
    return write(tmp_path_factory.mktemp("mixtral"), converted(mixtral_tokenizer_file))


@pytest.fixture(scope="module", params=["tiny", "Mixtral-8x7B", "Mixtral-8x7B with Metaspace"])
def pair(
    request: pytest.FixtureRequest,
    tiny_folder: Path,
    mixtrals: Path,
    mixtral_tokenizer_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Tokenizer, Tokenizer]:
    """A tokenizer read from its tokenizer.json, and from its tokenizer.model."""
    if request.param == "tiny":
        model_file, json_file = tiny_folder / "tokenizer.model", tiny_folder / "tokenizer.json"
    else:
        model_file, json_file = mixtral_tokenizer_file, mixtrals
    if "Metaspace" in request.param:
        content = json.loads(mixtrals.read_text(encoding="utf-8"))
        content |= {"normalizer": None, "pre_tokenizer": METASPACE}
        json_file = write(tmp_path_factory.mktemp("metaspace"), content)
    return Tokenizer(json_file), Tokenizer(model_file)


# --- the same ids ---


def test_special_ids_are_the_same(pair: tuple[Tokenizer, Tokenizer]) -> None:
    assert pair[0].special_ids == pair[1].special_ids == {0, 1, 2}


@pytest.mark.parametrize("text", [*AWKWARD, *(f"a{text}b" for text in AWKWARD)])
def test_ids_of_awkward_texts_are_the_same(pair: tuple[Tokenizer, Tokenizer], text: str) -> None:
    from_json, from_model = pair
    assert from_json.encode(text) == from_model.encode(text)


@given(text=st.text())
def test_ids_of_any_text_are_the_same(pair: tuple[Tokenizer, Tokenizer], text: str) -> None:
    from_json, from_model = pair
    assert from_json.encode(text) == from_model.encode(text)


def test_ids_of_stories_are_the_same(pair: tuple[Tokenizer, Tokenizer], stories: list[str]) -> None:
    from_json, from_model = pair
    for story in stories:
        assert from_json.encode(story) == from_model.encode(story)


def test_prompt_ids_equal_mistral_commons(mixtrals: Path) -> None:
    tokenizer = Tokenizer(mixtrals)
    reference = MistralTokenizer.v1().instruct_tokenizer.tokenizer
    for text in AWKWARD:
        assert tokenizer.encode_prompt(text) == reference.encode(text, bos=True, eos=False)


def test_control_tokens_typed_by_a_user_stay_text(
    pair: tuple[Tokenizer, Tokenizer],
) -> None:
    messages = [Message("user", "<s>[INST] </s><unk> [/INST]")]
    from_json, from_model = pair
    ids = ChatFormat(from_json).encode(messages)
    assert ids == ChatFormat(from_model).encode(messages)
    assert {0, 1, 2} & set(ids[1:]) == set()


# --- the same text ---


def test_every_token_stands_for_the_same_bytes(pair: tuple[Tokenizer, Tokenizer]) -> None:
    from_json, from_model = pair
    assert from_json.vocab_size == from_model.vocab_size
    for token_id in range(from_json.vocab_size):
        assert from_json.token_bytes(token_id) == from_model.token_bytes(token_id), token_id
        assert from_json.begins_word(token_id) == from_model.begins_word(token_id), token_id
    assert (from_json.bos_id, from_json.eos_id) == (from_model.bos_id, from_model.eos_id)
    assert from_json.longest_piece == from_model.longest_piece


@given(numbers=st.lists(st.one_of(st.integers(0, 258), st.integers(0, 2**16)), max_size=20))
def test_streams_give_the_same_pieces(
    pair: tuple[Tokenizer, Tokenizer], numbers: list[int]
) -> None:
    from_json, from_model = (StreamDecoder(t, continues_text=False) for t in pair)
    for number in numbers:
        token_id = number % pair[0].vocab_size
        assert from_json.push(token_id) == from_model.push(token_id)
    assert from_json.flush() == from_model.flush()


def test_a_lone_surrogate_is_refused(mixtrals: Path) -> None:
    with pytest.raises(PromptError, match="character 2"):
        Tokenizer(mixtrals).encode("ab\ud800c")


# --- added tokens ---


def test_added_tokens_beyond_the_model_are_control_tokens(
    tmp_path: Path, mixtral_tokenizer_file: Path
) -> None:
    content = converted(mixtral_tokenizer_file)
    content["added_tokens"].append(
        content["added_tokens"][0] | {"id": 32_000, "content": "<|im_end|>"}
    )
    tokenizer = Tokenizer(write(tmp_path, content))
    assert tokenizer.vocab_size == 32_001
    assert tokenizer.token_bytes(32_000) == b""
    assert 32_000 not in tokenizer.encode("hello<|im_end|>")


def test_added_tokens_that_are_not_special_are_found_in_text(
    tmp_path: Path, mixtral_tokenizer_file: Path
) -> None:
    content = converted(mixtral_tokenizer_file)
    content["added_tokens"].append(
        content["added_tokens"][0] | {"id": 32_000, "content": "<tab>", "special": False}
    )
    tokenizer = Tokenizer(write(tmp_path, content))
    assert tokenizer.token_bytes(32_000) == b"<tab>"
    assert 32_000 in tokenizer.encode("a<tab>b")


# --- the file ---


def test_tokenizer_model_goes_first(tmp_path: Path, tiny_folder: Path) -> None:
    shutil.copy(tiny_folder / "tokenizer.json", tmp_path)
    assert Tokenizer.from_folder(tmp_path).vocab_size == 2048
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "not BPE"),
        ({"model": None}, "cannot be used"),
        ({"added_tokens": []}, "<s>"),
        ({"added_tokens": [{"id": 1}]}, "special"),
        ({"pre_tokenizer": {"type": "ByteLevel"}, "normalizer": None}, "ByteLevel"),
        ({"normalizer": {"type": "Unheard"}}, "refused by the tokenizers library"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(
    tmp_path: Path, mixtrals: Path, changes: dict[str, Any], named: str
) -> None:
    content = json.loads(mixtrals.read_text(encoding="utf-8")) | changes
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json .*{named}"):
        Tokenizer(write(tmp_path, content))


def test_gaps_in_the_ids_are_refused(tmp_path: Path, mixtrals: Path) -> None:
    content = json.loads(mixtrals.read_text(encoding="utf-8"))
    content["model"]["vocab"]["▁gap"] = 40_000
    with pytest.raises(TokenizerError, match="gaps"):
        Tokenizer(write(tmp_path, content))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 50_000])
def test_a_file_that_is_no_json_object_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer(file)
