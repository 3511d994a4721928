"""Whatever a mask lets through has the form that was asked for, and every such answer gets through.

Answers are drawn at random among the allowed ids, as the worst of models would choose.
"""

import json
import random
import re
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import model
from cluster.ingress.tool_calls import CallReader, CallRules
from model.errors import GrammarError
from model.grammar import GrammarCompiler, GrammarMatcher
from model.grammar_spec import GrammarSpec
from model.tokenizer import StreamDecoder, Tokenizer

END = 2


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, [END])


def mask_of(compiler: GrammarCompiler, matcher: GrammarMatcher) -> Tensor:
    """Words of a mask."""
    masks_SW = torch.full((1, compiler.num_words), -1, dtype=torch.int32)
    assert compiler.fill({0: matcher}, masks_SW) == {}
    return masks_SW[0]


def allowed(compiler: GrammarCompiler, matcher: GrammarMatcher) -> list[int]:
    """Ids that a mask allows."""
    row = mask_of(compiler, matcher)
    ids: list[int] = np.flatnonzero(
        np.unpackbits(row.numpy().view(np.uint8), bitorder="little")
    ).tolist()
    return ids


def text_of(tokenizer: Tokenizer, ids: list[int], spec: GrammarSpec) -> str:
    stream = StreamDecoder(tokenizer, continues_text=spec.continues_text)
    return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()


def draw(
    compiler: GrammarCompiler, tokenizer: Tokenizer, spec: GrammarSpec, seed: int
) -> list[int]:
    """Ids of a random answer without its end.

    Prefers, more and more, what brings the answer to its end: end ids, then closing characters.
    """
    rng = random.Random(seed)
    matcher = compiler.compile(spec).matcher()
    ids: list[int] = []
    closing = [i for c in b'"}]' for i in range(3, 2048) if tokenizer.token_bytes(i) == bytes([c])]
    while True:
        ids_now = allowed(compiler, matcher)
        assert ids_now, "a sequence would be stuck"
        assert not {0, 1} & set(ids_now), "a control token is allowed inside"
        assert max(ids_now) < tokenizer.vocab_size
        if matcher.is_finished:
            assert ids_now == [END]
        hurry = rng.random() < len(ids) / 40
        ends = [i for i in [END, *closing] if i in ids_now] if hurry else []
        token_id = ends[0] if ends else rng.choice(ids_now)
        matcher.accept(token_id)
        if token_id == END:
            assert matcher.is_finished
            return ids
        ids.append(token_id)
        assert len(ids) < 600, text_of(tokenizer, ids, spec)


# --- what comes out fits ---

NAMES = st.sampled_from(["a", "b", "né", "two words", 'q"', "x/y"])
SCALARS = st.one_of(
    st.fixed_dictionaries({"type": st.just("string")}, optional={"maxLength": st.integers(0, 6)}),
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-50, 50),
        st.integers(0, 500),
    ),
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"const": {"k": [1, "é"]}},
            {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 1000},
            {"type": "string", "pattern": "^[a-c]{2,4}é?$"},
            {"type": "string", "format": "date"},
            {"type": ["string", "null"], "maxLength": 3},
        ]
    ),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.one_of(st.text(max_size=4), st.integers(), st.none()), min_size=1, max_size=4),
    ),
)


def objects_of(schemas: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def build(properties: dict[str, Any], optional: bool) -> dict[str, Any]:
        required = [] if optional else list(properties)
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }

    return st.builds(build, st.dictionaries(NAMES, schemas, max_size=3), st.booleans())


SCHEMAS = st.recursive(
    SCALARS,
    lambda schemas: st.one_of(
        objects_of(schemas),
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 2}, schemas),
        st.builds(lambda both: {"anyOf": both}, st.lists(schemas, min_size=1, max_size=2)),
    ),
    max_leaves=4,
)


@given(schema=SCHEMAS, continues=st.booleans(), seed=st.integers(0, 2**32))
def test_every_answer_fits_its_schema(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    schema: dict[str, Any],
    continues: bool,
    seed: int,
) -> None:
    spec = GrammarSpec("json_schema", json.dumps(schema), continues)
    ids = draw(compiler, tokenizer, spec, seed)
    answer = json.loads(text_of(tokenizer, ids, spec))
    jsonschema.validate(answer, schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("seed", range(10))
def test_a_json_object_is_one(compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int) -> None:
    spec = GrammarSpec("json_object")
    ids = draw(compiler, tokenizer, spec, seed)
    assert isinstance(json.loads(text_of(tokenizer, ids, spec)), dict)


PIECES = [
    "a",
    "[b-d]",
    "é",
    "日|本",
    " ",
    "(x|yz)",
    r"\d",
    "[^a]",
    "/",
    '"',
    r"\.",
    "n{2,3}",
    r"\n",
]
REGEXES = st.lists(
    st.builds(
        lambda piece, often: f"(?:{piece}){often}",
        st.sampled_from(PIECES),
        st.sampled_from(["", "?", "{0,2}", "{1,3}"]),
    ),
    min_size=1,
    max_size=5,
).map("".join)


@given(regex=REGEXES, anchors=st.booleans(), continues=st.booleans(), seed=st.integers(0, 2**32))
def test_every_answer_matches_its_regex(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    regex: str,
    anchors: bool,
    continues: bool,
    seed: int,
) -> None:
    spec = GrammarSpec("regex", f"^{regex}$" if anchors else regex, continues)
    ids = draw(compiler, tokenizer, spec, seed)
    text = text_of(tokenizer, ids, spec)
    assert re.fullmatch(regex, text), text


CHOICES = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=6
)


@given(choices=CHOICES, continues=st.booleans(), seed=st.integers(0, 2**32))
def test_every_answer_is_a_choice(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    choices: list[str],
    continues: bool,
    seed: int,
) -> None:
    spec = GrammarSpec.one_of(choices, continues_text=continues)
    ids = draw(compiler, tokenizer, spec, seed)
    assert text_of(tokenizer, ids, spec) in choices


@given(choices=CHOICES, continues=st.booleans())
def test_every_choice_can_be_reached(
    compiler: GrammarCompiler, tokenizer: Tokenizer, choices: list[str], continues: bool
) -> None:
    spec = GrammarSpec.one_of(choices, continues_text=continues)
    for choice in choices:
        matcher = compiler.compile(spec).matcher()
        # as SentencePiece cuts it: with a space before the first word, where that is dropped
        ids = tokenizer.encode(choice)
        if continues:
            ids = [3 + byte for byte in choice.encode()]
        assert text_of(tokenizer, ids, spec) == choice
        for token_id in ids:
            assert token_id in allowed(compiler, matcher)
            matcher.accept(token_id)
        assert END in allowed(compiler, matcher)


@pytest.mark.parametrize(
    "text",
    [
        'start: sum\nsum: NUM ("+" sum)?\nNUM: /[0-9]{1,3}/',
        'root ::= num ("+" root)?\nnum ::= [0-9] [0-9]? [0-9]?',
    ],
    ids=["Lark", "EBNF"],
)
@pytest.mark.parametrize("seed", range(5))
def test_every_answer_is_in_the_language_of_its_grammar(
    compiler: GrammarCompiler, tokenizer: Tokenizer, text: str, seed: int
) -> None:
    spec = GrammarSpec("grammar", text)
    ids = draw(compiler, tokenizer, spec, seed)
    assert re.fullmatch(r"[0-9]{1,3}(\+[0-9]{1,3})*", text_of(tokenizer, ids, spec))


def test_mixtrals_own_vocabulary_and_a_wider_head(mixtral_tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(mixtral_tokenizer, [END, 32_005], vocab_size=32_010)
    assert compiler.num_words == 1001
    matcher = compiler.compile(GrammarSpec.one_of(["日本語 is ☃", "yes"])).matcher()
    first = allowed(compiler, matcher)
    assert mixtral_tokenizer.encode("yes")[0] in first  # "▁yes"
    assert END not in first
    matcher.accept(*mixtral_tokenizer.encode("日本語 is ☃"))
    assert allowed(compiler, matcher) == [END, 32_005]


# --- the first token ---


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> set[bytes]:
    return {tokenizer.token_bytes(token_id) for token_id in ids}


def test_the_space_before_an_answers_first_word_is_no_part_of_it(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiler.compile(GrammarSpec.one_of(["he"])).matcher()
    assert {b"h", b" h", b"he", b" he", b" "} == pieces_of(tokenizer, allowed(compiler, matcher))
    (space,) = tokenizer.encode("")[:1] or tokenizer.encode(" x")[:1]
    matcher.accept(space)  # dropped whole: nothing is said yet, and no space may follow
    assert {b"h", b"he"} == pieces_of(tokenizer, allowed(compiler, matcher))


def test_a_space_byte_is_not_dropped(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(GrammarSpec.one_of(["he"])).matcher()
    space_byte = 3 + ord(" ")
    assert tokenizer.token_bytes(space_byte) == b" "
    assert space_byte not in allowed(compiler, matcher)
    with pytest.raises(GrammarError, match="token id 35 is not allowed after 0 tokens"):
        matcher.accept(space_byte)


def test_text_that_goes_on_keeps_its_space(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    spec = GrammarSpec.one_of(["he"], continues_text=True)
    matcher = compiler.compile(spec).matcher()
    assert {b"h", b"he"} == pieces_of(tokenizer, allowed(compiler, matcher))


# --- replaying ---


@given(schema=SCHEMAS, continues=st.booleans(), seed=st.integers(0, 2**32))
def test_a_replayed_matcher_is_where_the_first_one_was(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    schema: dict[str, Any],
    continues: bool,
    seed: int,
) -> None:
    spec = GrammarSpec("json_schema", json.dumps(schema), continues)
    ids = draw(compiler, tokenizer, spec, seed)
    at = random.Random(seed).randrange(len(ids) + 1)
    first, replayed = (compiler.compile(spec).matcher() for _ in range(2))
    for token_id in ids[:at]:
        first.accept(token_id)
        allowed(compiler, first)
    replayed.accept(*ids[:at])
    assert allowed(compiler, replayed) == allowed(compiler, first)
    replayed.accept(*ids[at:], END)
    assert replayed.is_finished


def test_a_refused_token_changes_nothing(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(GrammarSpec("regex", "ab+")).matcher()
    (a, b) = (3 + ord("a"), 3 + ord("b"))
    matcher.accept(a)
    for wrong in [a, 0, 1, END, -1, tokenizer.vocab_size]:
        with pytest.raises(GrammarError, match=f"token id {wrong} is not allowed after 1 tokens"):
            matcher.accept(wrong)
    matcher.accept(b, END)
    with pytest.raises(GrammarError, match="after 3 tokens"):
        matcher.accept(b)


# --- many at once ---


def test_a_batch_is_filled_as_each_alone_and_other_rows_are_left(
    compiler: GrammarCompiler,
) -> None:
    fresh = compiler.compile(GrammarSpec("json_object")).matcher()
    inside, also_inside = (compiler.compile(GrammarSpec("json_object")).matcher() for _ in "ab")
    inside.accept(3 + ord("{"))
    also_inside.accept(3 + ord("{"))
    ended = compiler.compile(GrammarSpec("regex", "a?")).matcher()
    ended.accept(END)
    matchers = {0: inside, 2: fresh, 3: ended, 5: also_inside}
    masks_SW = torch.full((6, compiler.num_words), 7, dtype=torch.int32)
    assert compiler.fill(matchers, masks_SW) == {}
    for row in range(6):
        expected = torch.full((compiler.num_words,), 7, dtype=torch.int32)
        if row in matchers:
            expected = mask_of(compiler, matchers[row])
        assert torch.equal(masks_SW[row], expected)


def test_the_masks_of_a_batch_are_computed_while_other_threads_run(
    compiler: GrammarCompiler,
) -> None:
    grammar = compiler.compile(GrammarSpec("regex", r"(\p{L}\P{Lu}){1,2000}.{1,9999}", True))
    masks_SW = torch.zeros((2, compiler.num_words), dtype=torch.int32)
    steps, done = 0, threading.Event()

    def step() -> None:
        nonlocal steps
        while not done.is_set():
            steps += 1
            time.sleep(0)  # lets go of the GIL

    thread = threading.Thread(target=step)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # whoever has the GIL keeps it, unless it lets go by itself
    try:
        thread.start()
        for _ in range(200):
            matchers = {0: grammar.matcher(), 1: grammar.matcher()}
            before = steps
            compiler.fill(matchers, masks_SW)
            if steps > before:
                return
        pytest.fail("no other thread ran during 200 fills")
    finally:
        done.set()
        sys.setswitchinterval(interval)
        thread.join()


def test_one_sequence_that_is_too_costly_does_not_harm_the_others(
    compiler: GrammarCompiler,
) -> None:
    spec = GrammarSpec("regex", "((((a{1,100}){1,100}){1,100}){1,100}){1,100}")
    grammar = compiler.compile(spec)
    costly, good = grammar.matcher(), compiler.compile(GrammarSpec("regex", "a+")).matcher()
    a = 3 + ord("a")
    masks_SW = torch.zeros((2, compiler.num_words), dtype=torch.int32)
    failed: dict[int, GrammarError] = {}
    for _ in range(50):
        failed = compiler.fill({0: costly, 1: good}, masks_SW)
        assert int(masks_SW[1, a // 32]) >> (a % 32) & 1
        if failed:
            break
        costly.accept(a)
        good.accept(a)
    assert list(failed) == [0]
    assert "too costly" in str(failed[0])
    assert compiler.compile(spec) is not grammar, "what failed must not be handed out again"


# --- what is refused ---


def names(count: int) -> list[str]:
    """Short distinct names, the same at every call."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [a + b + c for a in letters for b in letters for c in letters][:count]


@pytest.mark.parametrize(
    ("kind", "text", "problem"),
    [
        ("json_schema", "{", "it is not JSON"),
        ("json_schema", '{"minimum": NaN}', "NaN is not JSON"),
        ("json_schema", "[]", "a schema must be a JSON object"),
        ("json_schema", '{"type": "strin"}', "Invalid type: strin"),
        ("json_schema", '{"not": {}}', "not"),
        ("json_schema", '{"$ref": "http://host/x"}', "http://host/x"),
        ("json_schema", '{"$ref": "#"}', "it allows no answer"),
        ("json_schema", '{"type": "integer", "minimum": 2, "maximum": 1}', "minimum"),
        ("json_schema", '{"enum": ["\\ud800"]}', "hex escape"),
        ("regex", "(", "unclosed group"),
        ("regex", "(?=a)", "look-around"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "a\\", "lone backslash"),
        ("regex", r"[^\s\S]", "it allows no answer"),
        ("regex", "(" * 300 + "a" + ")" * 300, "nested parentheses"),
        ("choice", "[]", "there is no choice"),
        ("choice", '["a", 1]', "must be a list of strings"),
        ("choice", "a", "it is not JSON"),
        ("grammar", "", "no start rule"),
        ("grammar", 'start: "a', "lexer error"),
        ("grammar", "start: other", "other"),
        ("grammar", 'root ::= "a', "it is not EBNF"),
        ("grammar", 'start: "a" <[1]> "b"', "names token ids"),
        ("grammar", 'start: "a" <s> "b"', "cannot handle it|unknown special token"),
        ("grammar", 'start: word "."\nword[max_tokens=3]: /[a-z]*/', "max_tokens"),
        ("grammar", 'start: word "."\nword[stop="."]: /[a-z]*/', "are not supported"),
        ("grammar", 'start: "a" %json {"multipleOf": 1000003}', "least common multiple"),
        ("grammar", 'start: %json {} | %json {"multipleOf": 1000003}', "least common multiple"),
        ("grammar", f"start: %json {json.dumps({'required': names(501)})}", "500 are allowed"),
        ("grammar", "start: %json []", "a schema must be a JSON object"),
        ("grammar", 'start: "%json"', "must be followed by a schema"),
        ("grammar", "start: " + "(" * 500 + '"a"' + ")" * 500, "too deeply nested"),
        ("json_object", "{}", "at most 0 are allowed"),
        ("xml", "", "no kind of grammar"),
        ("regex", "\ud800", "not valid Unicode at character 0"),
        ("regex", "a" * 10_000, "it has 10000 bytes; at most 8192 are allowed"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(
    compiler: GrammarCompiler, kind: Any, text: str, problem: str
) -> None:
    with pytest.raises(GrammarError, match=problem) as refused:
        compiler.compile(GrammarSpec(kind, text))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_grammar_may_hold_schemas(compiler: GrammarCompiler) -> None:
    schema = '{"type": "integer", "multipleOf": 7, "description": "no %json here"}'
    grammar = compiler.compile(GrammarSpec("grammar", f'start: "a" %json {schema}'))
    assert allowed(compiler, grammar.matcher())


def chain(rule: str, last: str, count: int, join: str = "\n") -> str:
    """Rules of which each needs the next: what the engine follows by recursion."""
    some = names(count)
    links = [rule.format(a, b) for a, b in pairwise(some)]
    return join.join([*links, last.format(some[-1])])


HOSTILE = {
    "nested schema": ("json_schema", '{"items":' * 5_000 + "{}" + "}" * 5_000),
    "many properties": (
        "json_schema",
        json.dumps({"properties": {name: {} for name in names(4_000)}}),
    ),
    "many required": ("json_schema", json.dumps({"required": names(4_000)})),
    "a slow divisor": ("json_schema", '{"type": "integer", "multipleOf": 1000003}'),
    "slow divisors": (
        "json_schema",
        json.dumps({"allOf": [{"type": "integer", "multipleOf": p} for p in (499, 503, 0.509)]}),
    ),
    "a product of alternatives": (
        "json_schema",
        json.dumps(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"k{i}{j}": {}}} for j in range(8)]}
                    for i in range(8)
                ]
            }
        ),
    ),
    "doubling terminals": (
        "grammar",
        "start: AAA\n" + chain("{0}: {1} {1}", '{0}: "a"', 40).upper(),
    ),
    "many EBNF rules": ("grammar", chain("{0} ::= {1}", '{0} ::= "a"', 1_500)),
    "nested EBNF": ("grammar", "root ::= " + "(" * 5_000 + '"a"' + ")" * 5_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_refused(compiler: GrammarCompiler, name: str) -> None:
    kind, text = HOSTILE[name]
    with pytest.raises(GrammarError):
        compiler.compile(GrammarSpec(kind, text))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("grammar", "start:aaa\n" + chain("{0}:{1}", '{0}:"a"', 2_000)),
        (
            "json_schema",
            '{"$ref":"#/$defs/aaa","$defs":{'
            + chain('"{0}":{{"$ref":"#/$defs/{1}"}}', '"{0}":{{}}', 2_000, ",")
            + "}}",
        ),
        ("regex", "(a|b)*a(a|b){400}"),
    ],
    ids=["rules", "references", "exponential automaton"],
)
def test_the_deepest_that_is_let_through_does_not_overflow_the_stack(
    compiler: GrammarCompiler, kind: Any, text: str
) -> None:
    matchers: list[GrammarMatcher] = []
    caller = threading.Thread(
        target=lambda: matchers.append(compiler.compile(GrammarSpec(kind, text)).matcher())
    )
    caller.start()  # a thread with the usual stack
    caller.join()
    assert allowed(compiler, matchers[0])


def test_a_vocabulary_without_all_bytes_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(GrammarError, match="no token for the byte 0x61"):
        GrammarCompiler(tokenizer, [END], vocab_size=100)


def test_an_end_id_out_of_vocabulary_ends_nothing(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, [END, 10**6])
    assert compiler.end_ids == {END}
    matcher = compiler.compile(GrammarSpec.one_of(["a"])).matcher()
    matcher.accept(*tokenizer.encode("a"))
    assert allowed(compiler, matcher) == [END]
    with pytest.raises(GrammarError, match="no end id"):
        GrammarCompiler(tokenizer, [10**6])


# --- the cache, and imports ---


def test_compiled_grammars_are_kept_up_to_a_bound(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, [END], num_cached=2)
    one, two, three = (GrammarSpec("regex", str(i)) for i in range(3))
    first = compiler.compile(one)
    second = compiler.compile(two)
    assert compiler.compile(one) is first
    compiler.compile(three)  # the least recently used, two, has to go
    assert compiler.compile(one) is first
    assert compiler.compile(two) is not second


def test_the_engine_is_not_imported_before_a_grammar_is_compiled(tiny_folder: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from model.grammar import GrammarCompiler
from model.grammar_spec import GrammarSpec
from model.tokenizer import Tokenizer
compiler = GrammarCompiler(Tokenizer.from_folder(Path({str(tiny_folder)!r})), [2])
heavy = {{"torch", "llguidance"}} & set(sys.modules)
assert not heavy, heavy
compiler.compile(GrammarSpec("regex", "a"))
assert "torch" not in sys.modules
"""
    root = Path(model.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)


def test_bit_i_of_word_w_is_token_32w_plus_i(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiler.compile(GrammarSpec("regex", "ab", True)).matcher()
    words = [word & 0xFFFFFFFF for word in mask_of(compiler, matcher).tolist()]
    by_hand = [32 * w + i for w, word in enumerate(words) for i in range(32) if word >> i & 1]
    assert by_hand == allowed(compiler, matcher)
    assert pieces_of(tokenizer, by_hand) == {b"a", b"ab"}


# --- calls of tools ---

PLACE = {"type": "string", "maxLength": 8}
WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/place"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"place": PLACE},
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.mark.parametrize("only_one", [False, True])
def test_calls_are_of_the_functions_and_their_arguments_fit(
    compiler: GrammarCompiler, tokenizer: Tokenizer, only_one: bool
) -> None:
    """Whatever a model would like to write; and they are found where they are looked for."""
    functions = {"weather": WEATHER, "clock": NOTHING}
    spec = GrammarSpec.for_calls(list(functions.items()), only_one=only_one)
    for seed in range(4):
        ids = draw(compiler, tokenizer, spec, seed)
        text = text_of(tokenizer, ids, spec)
        written = json.loads(text)
        assert len(written) == 1 or not only_one
        for call in written:
            assert list(call) == ["name", "arguments"]
            jsonschema.validate(call["arguments"], functions[call["name"]])
        reader = CallReader(CallRules(frozenset(functions), begins_with_calls=True))
        content, deltas = reader.push(text)
        assert (content, reader.num_calls) == ("", len(written))
        told = [each.arguments for each in deltas if each.arguments]
        assert [json.loads(each) for each in told] == [call["arguments"] for call in written]


def test_a_function_whose_schema_cannot_be_enforced_is_named(compiler: GrammarCompiler) -> None:
    deep: dict[str, Any] = {}
    for _ in range(70):
        deep = {"properties": {"a": deep}}
    with pytest.raises(GrammarError, match="parameters of weather: it is nested more than"):
        compiler.compile(GrammarSpec.for_calls([("weather", deep)], only_one=False))
