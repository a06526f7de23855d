"""Looking up words gives the ids that the tokenizer gives, and is done only where text is split as it assumes."""

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from jaxlora.data import batches, pieces, words
from jaxlora.data.chat import ChatEncoder, load_tokenizer
from jaxlora.data.pieces import Queue, TextTokenizer
from jaxlora.data.sources import load_conversations
from jaxlora.data.words import Words, as_python
from tests.data.conftest import byte_level

# Published: Qwen2.5's, and one that takes digits by threes.
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
THREES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ASCII = st.text(st.characters(max_codepoint=127)) | st.lists(
    st.sampled_from(
        [
            "the",
            " hello",
            "  ",
            "\n",
            "\r\n",
            "'S",
            "'ll",
            "12",
            "345",
            ".",
            "\t",
            " \n ",
            "\x0b",
            "\x1c",
            "\x00",
        ]
    ),
).map("".join)


def tokenizer(expression: str = QWEN, behavior: str = "isolated", invert: bool = False) -> Tokenizer:
    backend = byte_level().backend_tokenizer
    split = pre_tokenizers.Split(Regex(expression), behavior, invert)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return backend


def looked_up(backend: Tokenizer) -> Words:
    found = Words.of(backend)
    assert found is not None
    return found


BACKENDS = {expression: tokenizer(expression) for expression in (QWEN, THREES, r"\p{L}+|\p{N}")}
WORDS = {expression: looked_up(backend) for expression, backend in BACKENDS.items()}


@given(st.sampled_from([QWEN, THREES]), ASCII)
def test_python_splits_ascii_text_as_the_tokenizer_does(expression, text):
    pattern = as_python(expression)
    assert pattern is not None
    split = pre_tokenizers.Split(Regex(expression), "isolated").pre_tokenize_str(text)
    assert pattern.findall(text) == [word for word, _ in split]


@given(st.sampled_from(list(WORDS)), ASCII)
def test_ids_are_those_of_the_tokenizer(expression, text):
    """Also of an expression that leaves something out, as the last one does of spaces and signs."""
    assert WORDS[expression].ids(text) == BACKENDS[expression].encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "expression",
    [
        r"\p{Lu}+", r"\w+", r"^ \p{L}", r"\p{L}+$", r"\p{L}++", r"\p{L}+?", r"(\p{L})+", r"(?>\p{L}+)", r"[a[b]]+",
        r"[a&&b]+", r"[a-z]+", r"(?<=a)b", "[]a]", "a{2}{3}", "(?!", "a|*",
        r"\p{L}*", r"\s+|(?!a)",
    ],
)  # fmt: skip
def test_expressions_that_may_mean_something_else_are_not_taken(expression):
    assert as_python(expression) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda b: setattr(b, "normalizer", normalizers.Lowercase()),
        lambda b: setattr(b, "pre_tokenizer", None),
        lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        lambda b: setattr(b, "pre_tokenizer", tokenizer(QWEN, "removed").pre_tokenizer),
        lambda b: setattr(b, "pre_tokenizer", tokenizer(QWEN, invert=True).pre_tokenizer),
        lambda b: setattr(b, "pre_tokenizer", tokenizer(r"\w+").pre_tokenizer),
        lambda b: setattr(b.model, "dropout", 0.1),
    ],
)
def test_tokenizers_that_do_something_else_are_not_taken(change):
    backend = tokenizer()
    assert Words.of(backend) is not None
    change(backend)
    assert Words.of(backend) is None


def test_no_more_words_are_remembered_than_said(monkeypatch):
    monkeypatch.setattr(words, "MOST_WORDS", 3)
    backend = tokenizer()
    few = looked_up(backend)
    for text in ("a b c d e f", "hello the cat", "a b"):
        assert few.ids(text) == backend.encode(text, add_special_tokens=False).ids
    assert len(few._known) <= 3 + 3


def queued(backend: Tokenizer, *texts: str) -> tuple[list[list[int]], list[bool]]:
    """The ids of texts in the middle of conversations, and whether each had its words looked up."""
    controls = {t.content: id for id, t in backend.get_added_tokens_decoder().items() if t.special}
    queue = Queue(TextTokenizer(backend, controls), offsets=False)
    put = [queue.put(text, [], first=False) for text in texts]
    queue.run()
    return [list(queue.ids(piece)) for piece in put], [bool(p.ticket and p.ticket[0].words) for p in put]


TEXTS = ["the hello cat", "caf\u00e9 the", "hello <tag> the", "<|im_end|> the", "hello"]


def composing() -> Tokenizer:
    backend = tokenizer()
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken("<tag>", normalized=False)])
    return backend


def test_text_with_other_letters_or_tokens_of_its_own_is_left_to_the_tokenizer(monkeypatch):
    monkeypatch.setattr(pieces, "_cores", lambda: pieces.FEW_CORES)
    ids, where = queued(composing(), *TEXTS)
    assert where == [True, False, False, True, True]
    monkeypatch.setattr(pieces, "_cores", lambda: pieces.FEW_CORES + 1)
    others, where = queued(composing(), *TEXTS)
    assert not any(where)
    assert ids == others


@pytest.mark.parametrize(
    ("cores", "content", "document", "alone"),
    [
        (2, "the hello cat", False, True),
        (2, "the hello cat", True, False),
        (2, "caf\u00e9", False, False),
        (64, "the", False, False),
    ],
)
def test_one_thread_encodes_what_python_does_and_more_the_rest(
    cores, content, document, alone, monkeypatch, write, talk
):
    monkeypatch.setattr(pieces, "_cores", lambda: cores)
    monkeypatch.setattr(batches, "CHUNK", 2)
    threads = set()

    class Watched(ChatEncoder):
        def encode_batch(self, conversations):
            threads.add(threading.current_thread() is threading.main_thread())
            return super().encode_batch(conversations)

    wrapped = byte_level()
    wrapped._tokenizer = composing()
    texts = [content + " the" * n for n in range(5)]
    rows = [{"text": text} if document else {"messages": talk("hello", text)} for text in texts]
    source = load_conversations(write("d.jsonl", *rows))
    found = dict(batches.encoded_chunks(source, Watched(wrapped)))
    assert threads == {alone}
    assert [len(chunk) for chunk in found.values()] == [2, 2, 1]


def test_real_conversations(real, monkeypatch):
    """GSM8K by Qwen2.5's tokenizer."""
    with (real / "data" / "gsm8k" / "train.jsonl").open() as file:
        conversations = [json.loads(line)["messages"] for line, _ in zip(file, range(500), strict=False)]
    encoded = {}
    for cores in (2, 64):
        monkeypatch.setattr(pieces, "_cores", lambda cores=cores: cores)
        encoder = ChatEncoder(load_tokenizer(str(real / "tokenizers" / "qwen2.5")))
        assert (encoder._text.words is not None) is (cores == 2)
        encoded[cores] = [[array.tolist() for array in row] for row in encoder.encode_batch(conversations)]
    assert encoded[2] == encoded[64]
