"""Tokenising pieces of text as they would be tokenised within the whole, with nothing in them read as special."""

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.models import BPE

from jaxlora.data.words import Words

Place = Literal["first", "later", "document"]
"""Where a text stands: at a conversation's beginning, after something else, or alone."""


FEW_CORES = 2
"""Up to so many cores, looking up words by Python's one thread is faster than the tokenizer's own (docs/speed.md)."""


class Group(NamedTuple):
    """Texts that are tokenised alike."""

    place: Place
    composed: bool
    words: bool = False  # whose ids are looked up
    offsets: bool = False  # of characters


Ticket = tuple[Group, int]


class Piece(NamedTuple):
    """A piece of one rendered conversation: its ids are known, or wait in a queue under a ticket."""

    text: str
    ids: Sequence[int] = ()
    ticket: Ticket | None = None
    spans: Sequence[tuple[int, int]] = ()  # characters of `text` that are trained
    trained: bool = False  # all of it is


class TextTokenizer:
    """Copies of a tokenizer to which special tokens are plain text; they share its vocabulary.

    One is for beginnings, since some tokenizers (Metaspace "first") put a space before the first word of a text only: a
    piece from the middle, handed over on its own, would look like a beginning to them. Where the tokenizer composes
    characters (NFC), text that is composed already goes to a copy that does not, which has less to do.

    Args:
        backend: the tokenizer.
        controls: tokens (text -> id) that text must never become; its special tokens are among them.
    Attributes:
        first, later: for what begins a text, and for what stands further in.
        composed: for composed text in either place; None where normalising is not NFC alone.
        words: looks up the words of ASCII text; None where that is not how text is split, or not faster.
        spaces_begin_words: the tokenizer is of the sentencepiece kind, which takes a space for the beginning of the
            next word.
    """

    def __init__(self, backend: Tokenizer, controls: Mapping[str, int]):
        state = {
            part: _state(getattr(backend, part)) for part in ("normalizer", "pre_tokenizer", "post_processor")
        }
        for node in _nodes(state["post_processor"]):
            if "trim_offsets" in node:
                node["trim_offsets"] = False  # a token's white space counts as its text
        self.spaces_begin_words = "▁" in json.dumps(
            [state["normalizer"], state["pre_tokenizer"]], ensure_ascii=False
        )
        self.first = self.later = _text_copy(backend, controls, state)
        spaced = [node for node in _nodes(state["pre_tokenizer"]) if node.get("prepend_scheme") == "first"]
        if spaced:
            for node in spaced:
                node["prepend_scheme"] = "never"
            self.later = _text_copy(backend, controls, state)
        added = backend.get_added_tokens_decoder().values()
        alone = state["normalizer"] == {"type": "NFC"} and not spaced
        alone = alone and all(_is_composed(token.content) for token in added)
        self.composed = _text_copy(backend, controls, {**state, "normalizer": None}) if alone else None
        self.words = Words.of(self.composed) if self.composed is not None and _cores() <= FEW_CORES else None
        self._added = [
            token.content for token in added if not token.special and token.content not in controls
        ]
        self._bytewise = _is_bytewise(backend.model, state["pre_tokenizer"], added)
        self._normalises = state["normalizer"] is not None

    def group(self, place: Place, text: str) -> Group:
        """Where a text belongs to, without offsets."""
        if self.words and place != "document" and text.isascii() and not any(t in text for t in self._added):
            return Group(place, composed=True, words=True)
        return Group(place, self.composed is not None and _is_composed(text))

    def of(self, group: Group) -> Tokenizer:
        """The copy that tokenises a group."""
        if group.composed and self.composed is not None:
            return self.composed
        return self.later if group.place == "later" else self.first

    def told_by_ids(self, group: Group) -> bool:
        """Whether each id stands for the same bytes of a text wherever it is, so that ids tell where a word begins."""
        return self._bytewise and (group.composed or not self._normalises)

    def ids(self, text: str, *, first: bool) -> list[int]:
        """The ids of one piece."""
        tokenizer = self.of(self.group("first" if first else "later", text))
        return tokenizer.encode(text, add_special_tokens=False).ids


class Queue:
    """Pieces to be tokenised together: each different text once, character offsets only where they are needed.

    Args:
        text: the tokenizer.
        offsets: whether spans will be asked for at all.
    """

    def __init__(self, text: TextTokenizer, *, offsets: bool):
        self._text, self._offsets = text, offsets
        self._waiting: dict[Group, dict[str, int]] = {}
        self._encodings: dict[Group, list[Encoding]] = {}
        self._ids: dict[Group, list[list[int]]] = {}
        self._leads: dict[tuple[Place, str], list[int]] = {}

    def put(self, text: str, spans: Sequence[tuple[int, int]], *, first: bool) -> Piece:
        """Adds a piece of a conversation, of which the characters in `spans` are trained."""
        group = self._text.group("first" if first else "later", text)
        if list(spans) == [(0, len(text))]:
            return Piece(text, ticket=self._ticket(group, text), trained=True)
        if spans and self._offsets and not self._ends_trained(group, text, spans):
            group = group._replace(offsets=True, words=False)
        return Piece(text, ticket=self._ticket(group, text), spans=spans)

    def put_document(self, text: str) -> Piece:
        """Adds a whole text, which gets the special tokens that the tokenizer puts around any text (as "<s>")."""
        return Piece(text, ticket=self._ticket(self._text.group("document", text), text), trained=True)

    def run(self) -> None:
        """Tokenises all that was put in: word by word, or on the tokenizer's own threads."""
        for group, texts in self._waiting.items():
            tokenizer, document = self._text.of(group), group.place == "document"
            if group.offsets:
                self._encodings[group] = tokenizer.encode_batch(list(texts), add_special_tokens=document)
            elif group.words and self._text.words is not None:
                self._ids[group] = list(map(self._text.words.ids, texts))
            else:
                encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=document)
                self._ids[group] = [encoding.ids for encoding in encodings]

    def ids(self, piece: Piece) -> Sequence[int]:
        """The ids of a piece."""
        if piece.ticket is None:
            return piece.ids
        group, number = piece.ticket
        return self._encodings[group][number].ids if group.offsets else self._ids[group][number]

    def trained_ranges(self, piece: Piece) -> list[tuple[int, int]]:
        """The tokens, as (first, one after the last), that hold at least one character of each span.

        A token that holds text of the template and the first character of an answer ("▁The" after "[/INST]") is what
        the model must produce to begin that answer. For the same reason the one space before an answer counts as its
        first character where spaces begin words: "▁3" is two pieces only because the vocabulary has no such word.
        """
        if not piece.spans or piece.ticket is None or not self._offsets:
            return []
        group, end = piece.ticket[0], len(piece.text)
        if group.offsets:
            encoding = self._encodings[group][piece.ticket[1]]
        else:
            # The text before the span has, alone, the ids with which the whole begins: as tokens stand for bytes, the
            # next one begins where the span does.
            ids, lead = self.ids(piece), self._lead(group.place, piece.text[: piece.spans[0][0]])
            if ids[: len(lead)] == lead:
                return [(len(lead), len(ids))]
            encoding = self._text.of(group).encode(piece.text, add_special_tokens=False)

        def token_from(character: int) -> int:
            tokens = (encoding.char_to_token(c) for c in range(character, end))
            return next((token for token in tokens if token is not None), len(encoding))

        ranges = []
        for start, stop in piece.spans:
            if self._text.spaces_begin_words and piece.text[:start].endswith(" "):
                start -= 1
            after = token_from(stop)
            if after < len(encoding) and encoding.offsets[after][0] < stop:
                after += 1
            ranges.append((token_from(start), after))
        return ranges

    def _ends_trained(self, group: Group, text: str, spans: Sequence[tuple[int, int]]) -> bool:
        """Whether one span reaches to the end of a text whose ids tell where it begins."""
        return len(spans) == 1 and spans[0][1] == len(text) and self._text.told_by_ids(group)

    def _lead(self, place: Place, text: str) -> list[int]:
        if (place, text) not in self._leads:
            self._leads[place, text] = self._text.ids(text, first=place == "first")
        return self._leads[place, text]

    def _ticket(self, group: Group, text: str) -> Ticket:
        texts = self._waiting.setdefault(group, {})
        return group, texts.setdefault(text, len(texts))


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest where one begins with another; splitting by it keeps them."""
    alternatives = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return re.compile(f"({alternatives})" if alternatives else r"(?!)()")


def _cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_composed(text: str) -> bool:
    """Whether NFC would leave a text as it is, by Python's tables.

    They are newer than the tokenizer's, to which a letter that they do not know is one that nothing is done with: what
    is composed by the newer ones is by the older ones too.
    """
    return unicodedata.is_normalized("NFC", text)


def _is_bytewise(model: Any, pre_tokenizer: Any, added: Iterable[AddedToken]) -> bool:
    """Whether tokens are runs of bytes: byte-level BPE that adds nothing to a text, and no token that takes spaces."""
    nodes = _nodes(pre_tokenizer)
    levels = [node for node in nodes if node.get("type") == "ByteLevel"]
    return (
        isinstance(model, BPE)
        and not (
            model.unk_token or model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix
        )
        and {node.get("type") for node in nodes} <= {"Sequence", "Split", "Digits", "ByteLevel", None}
        and [node.get("add_prefix_space") for node in levels] == [False]
        and not any(token.lstrip or token.rstrip or token.single_word or token.normalized for token in added)
    )


def _text_copy(backend: Tokenizer, controls: Mapping[str, int], state: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer of this state with the backend's vocabulary, in which `controls` are text."""
    added = sorted(backend.get_added_tokens_decoder().items())
    for _, token in added:
        token.special = token.special or token.content in controls
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    shell = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "decoder": None,
        "model": empty,
    }
    copy = Tokenizer.from_str(json.dumps({**shell, **state}))
    copy.model = backend.model  # shared, not copied: vocabularies take a second to read and 100 MB to hold
    copy.add_tokens([token for _, token in added])
    if any(copy.token_to_id(token.content) != id for id, token in added if token.content not in controls):
        # Numbers with gaps between them, which adding cannot give: these have to be read in full.
        tokens = [{**token.__getstate__(), "id": id} for id, token in added]
        model = json.loads(backend.to_str())["model"]
        copy = Tokenizer.from_str(json.dumps({**shell, **state, "model": model, "added_tokens": tokens}))
    copy.encode_special_tokens = True
    return copy


def _state(component: Any) -> Any:
    """A tokenizer's component as the JSON it is stored as; None where there is none."""
    return None if component is None else json.loads(component.__getstate__())


def _nodes(tree: Any) -> list[dict[str, Any]]:
    """Every dict in a JSON tree."""
    if isinstance(tree, dict):
        return [tree, *(node for child in tree.values() for node in _nodes(child))]
    return [node for child in tree for node in _nodes(child)] if isinstance(tree, list) else []
