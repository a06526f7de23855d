"""An encoded conversation as a person can check it: token by token, with newlines and controls visible."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from jaxlora.core.printing import printable
from jaxlora.data.chat import Encoded
from jaxlora.data.detokenizer import Detokenizer

OPEN, CLOSE = "⟦", "⟧"
"""What encloses trained text where there is no colour."""


class Token(NamedTuple):
    """One id in a text.

    Attributes:
        text: what it adds to the text, printable; "" in the middle of a character, which comes whole with its last id.
        trained: whether it carries loss.
        special: whether it is one of the tokenizer's special tokens, which no text can become.
    """

    text: str
    trained: bool
    special: bool


def tokens(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[Token]:
    """The ids of a conversation one by one; their texts together are what all ids decode to, made printable."""
    added = cast(Tokenizer, tokenizer.backend_tokenizer).get_added_tokens_decoder()
    special = {id for id, token in added.items() if token.special}
    ids = encoded.ids.tolist()
    detokenizer = Detokenizer(tokenizer, special=True)
    texts: list[str] = []
    for id in ids:
        if id in special and texts:
            texts[-1] += detokenizer.end()  # bytes that never became a character belong to the text before it
        texts.append(detokenizer.push(id))
    texts[-1] += detokenizer.end()
    return [
        Token(printable(text), trained, id in special)
        for id, trained, text in zip(ids, encoded.trained.tolist(), texts, strict=True)
    ]


def bracketed(shown: Sequence[Token]) -> str:
    """The text without colours: each unbroken stretch of trained tokens in brackets."""
    stretches = groupby(shown, key=lambda token: token.trained)
    texts = [(trained, "".join(token.text for token in stretch)) for trained, stretch in stretches]
    return "".join(f"{OPEN}{text}{CLOSE}" if trained else text for trained, text in texts)
