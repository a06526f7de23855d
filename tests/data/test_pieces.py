"""Pieces of text: the shorter ways by which they are tokenised give what the longer ones do."""

import sys
import unicodedata
from itertools import chain, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from jaxlora.data.chat import load_tokenizer
from jaxlora.data.pieces import Queue, TextTokenizer
from tests.data.conftest import byte_level, metaspace

COMPOSED = ["", "hello the cat", " two  spaces", "\n\nlines\n", "caf\u00e9", "\uac00", "\U0001f600", "\x00"]
APART = ["cafe\u0301", "\u0301", "\u1100\u1161", "\u212b", "a\u0323\u0307", "\u0958"]
"""What NFC changes: marks apart from their letters, syllables in parts, letters that have another form."""
LEADS = ["assistant\n", "user", "a ", "\n", "caf\u00e9 "]


def qwen_like() -> Tokenizer:
    backend = byte_level().backend_tokenizer
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+|[^\s\p{L}]+"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    backend.normalizer = normalizers.NFC()
    return backend


def text_tokenizer(backend: Tokenizer) -> TextTokenizer:
    specials = {t.content: id for id, t in backend.get_added_tokens_decoder().items() if t.special}
    return TextTokenizer(backend, specials)


def with_offsets(text: TextTokenizer) -> TextTokenizer:
    """The same, which normalises every text and asks for offsets wherever something is trained."""
    text.composed, text.words, text._bytewise = None, None, False
    return text


def found(text: TextTokenizer, lead: str, content: str, tail: str, first: bool):
    """Ids, and the trained ones among them, of content between two texts of a template."""
    queue = Queue(text, offsets=True)
    whole = lead + content + tail
    piece = queue.put(whole, [(len(lead), len(lead) + len(content))], first=first)
    queue.run()
    return list(queue.ids(piece)), queue.trained_ranges(piece)


KINDS = {
    "nfc": qwen_like,
    "bytes": lambda: byte_level().backend_tokenizer,
    "spaces": lambda: metaspace().backend_tokenizer,
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    make = KINDS[request.param]
    return text_tokenizer(make()), with_offsets(text_tokenizer(make()))


def test_shorter_ways_give_the_same_ids_and_ranges(pair):
    for lead, content, tail, first in product(LEADS, COMPOSED + APART, ("", "\n", "e\u0301"), (True, False)):
        if content:
            case = (lead, content, tail, first)
            assert found(pair[0], *case) == found(pair[1], *case), case


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(COMPOSED + APART + LEADS) | st.text(max_size=4), min_size=2, max_size=5))
def test_shorter_ways_of_any_text(parts):
    lead, content = parts[0], "".join(parts[1:])
    if content:
        assert found(SHORT, lead, content, "", True) == found(LONG, lead, content, "", True)


SHORT, LONG = text_tokenizer(qwen_like()), with_offsets(text_tokenizer(qwen_like()))


def test_what_python_calls_composed_the_tokenizer_leaves_as_it_is():
    """Every character alone, and as a mark on a letter: the tables of the two may be of different years."""
    normalize = normalizers.NFC().normalize_str
    texts = (
        text
        for code in chain(range(0xD800), range(0xE000, sys.maxunicode + 1))
        for text in (chr(code), "a" + chr(code))
        if unicodedata.is_normalized("NFC", text)
    )
    assert not [text for text in texts if not text.isascii() and normalize(text) != text]


def groups(text: TextTokenizer, content: str):
    queue = Queue(text, offsets=True)
    queue.put("assistant\n" + content, [(10, 10 + len(content))], first=False)
    return {(group.composed, group.offsets) for group in queue._waiting}


def test_a_queue_that_will_not_be_asked_for_spans_finds_none():
    queue = Queue(text_tokenizer(metaspace().backend_tokenizer), offsets=False)
    piece = queue.put("the hello cat", [(4, 9)], first=True)
    queue.run()
    assert queue.ids(piece)
    assert queue.trained_ranges(piece) == []


def test_composed_text_is_neither_normalised_nor_traced():
    assert groups(SHORT, "caf\u00e9") == {(True, False)}
    assert groups(SHORT, "cafe\u0301") == {(False, True)}
    assert SHORT.composed is not None
    assert SHORT.composed.normalizer is None


def test_ids_of_a_lead_that_joins_its_content_do_not_tell_where_it_ends():
    """One token may hold the end of the one and the beginning of the other, and is trained then."""
    ids, ranges = found(SHORT, "user hel", "lo the cat", "", False)
    alone = SHORT.ids("user hel", first=False)
    assert ids[: len(alone)] != alone  # what this test is about
    assert ranges == found(LONG, "user hel", "lo the cat", "", False)[1]


@pytest.mark.parametrize(
    ("change", "composes", "told"),
    [
        (lambda b: None, True, True),
        (lambda b: setattr(b, "normalizer", normalizers.NFKC()), False, False),
        (lambda b: setattr(b, "normalizer", normalizers.Sequence([normalizers.NFC()])), False, False),
        (lambda b: setattr(b.model, "unk_token", "<unk>"), True, False),
        (lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), True, False),
        (lambda b: b.add_tokens([AddedToken("<tag>", lstrip=True, normalized=False)]), True, False),
        (lambda b: b.add_tokens([AddedToken("e\u0301", normalized=False)]), False, False),
    ],
)  # fmt: skip
def test_what_other_tokenizers_do_is_not_assumed(change, composes, told):
    backend = qwen_like()
    change(backend)
    text = text_tokenizer(backend)
    assert (text.composed is not None) is composes
    assert text.told_by_ids(text.group("later", "plain")) is told


def test_real_tokenizers(real):
    """Qwen's takes both short ways, Mistral's neither."""
    for name, short in (("qwen2.5", True), ("mistral-v0.3", False)):
        backend = load_tokenizer(str(real / "tokenizers" / name)).backend_tokenizer
        text, other = text_tokenizer(backend), with_offsets(text_tokenizer(backend))
        assert text.told_by_ids(text.group("later", "plain")) is short
        for lead, content in product(LEADS, COMPOSED[1:] + APART):
            assert found(text, lead, content, "", False) == found(other, lead, content, "", False)
