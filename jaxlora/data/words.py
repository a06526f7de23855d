"""Ids of ASCII text by its words, each of which a tokenizer's model is asked once."""

import json
import re
from collections.abc import Sequence
from itertools import chain

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

MOST_WORDS = 1 << 18
"""Words that are remembered, some 200 bytes each: beyond them all are forgotten and asked anew."""

_LEVEL = ByteLevel(add_prefix_space=False, use_regex=False)
_ASCII = {r"\p{L}": "A-Za-z", r"\p{N}": "0-9"}
# What means the same to Python's expressions as to the tokenizer's, about ASCII: no anchors, whose meaning differs, no
# quantifiers but the greedy ones, no sets within sets.
_ONE = r"(?: \\p\{[LN]\} | \\[rnsS] | ['a-z\ ] )"
_ALIKE = re.compile(
    rf"(?: {_ONE} | \[\^?{_ONE}+\] | \(\?(?:i:|!) | [|)] | (?:[?*+]|\{{\d,\d?\}})(?![?*+{{]) )+", re.VERBOSE
)


class Words:
    """Splits ASCII text as a tokenizer does, by the same regular expression, and remembers the ids of each word.

    Byte-level BPE looks at one word at a time, so a word has the same ids wherever it stands. Text repeats its words:
    Python's `re` and a dict need a quarter of the time in which a thread of the tokenizer encodes each of them again,
    of which most goes into memory for every token's text and place.

    Args:
        tokenizer: byte-level BPE.
        pattern: what its words are, as Python understands it.
    """

    def __init__(self, tokenizer: Tokenizer, pattern: re.Pattern[str]):
        self._tokenizer, self._find, self._known = tokenizer, pattern.findall, _Known(tokenizer.model)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Words | None":
        """Those of a tokenizer; None where text is not split as this can: by one expression, nothing added."""
        model, splitter = tokenizer.model, tokenizer.pre_tokenizer
        match json.loads(splitter.__getstate__()).get("pretokenizers") if splitter is not None else None:
            case [
                {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ] if isinstance(model, BPE) and not model.dropout and tokenizer.normalizer is None:
                pattern = as_python(expression)
                return None if pattern is None else cls(tokenizer, pattern)
        return None

    def ids(self, text: str) -> list[int]:
        """The ids of ASCII text in which nothing is special."""
        words = self._find(text)
        if len("".join(words)) != len(text):  # the expression leaves some of it out, which is a word too
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        if len(self._known) > MOST_WORDS:
            self._known.clear()
        return list(chain.from_iterable(map(self._known.__getitem__, words)))


class _Known(dict[str, Sequence[int]]):
    """Word -> ids, found where they are missing."""

    def __init__(self, model: BPE):
        super().__init__()
        self._model = model

    def __missing__(self, word: str) -> Sequence[int]:
        [(characters, _)] = _LEVEL.pre_tokenize_str(word)
        ids = self[word] = tuple(token.id for token in self._model.tokenize(characters))
        return ids


def as_python(expression: str) -> re.Pattern[str] | None:
    """A tokenizer's regular expression (Oniguruma's) as one of Python's that matches the same of ASCII text.

    None where it has anything that is not known to mean the same to both, or matches nothing, between characters.
    """
    if _ALIKE.fullmatch(expression) is None:
        return None
    parts, within = [], False
    for part in re.findall(r"\\p\{[LN]\}|\\.|.", expression):
        within = part == "[" or (within and part != "]")
        letters = _ASCII.get(part, part)
        parts.append(letters if within or part not in _ASCII else f"[{letters}]")
    try:
        pattern = re.compile("".join(parts), re.ASCII)
    except re.error:
        return None
    return None if pattern.match("") else pattern
