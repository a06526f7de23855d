"""Ids to text as they come."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character (yet)


class Detokenizer:
    """Turns ids into text one by one; the pieces together are the text of all ids.

    A character may be spread over several ids: it comes out whole, with the last of them. Each id is decoded together
    with those of the piece before it, because some tokenizers drop the space in front of the first word they decode.

    Args:
        tokenizer: the model's.
        special: whether special tokens are shown, and spaces left as they are; otherwise they are left out.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", special: bool = False):
        self._tokenizer = tokenizer
        self._options = {"clean_up_tokenization_spaces": False} if special else {"skip_special_tokens": True}
        self._context: list[int] = []  # ids of the piece that came out last
        self._waiting: list[int] = []  # ids whose text has not come out yet

    def push(self, token: int) -> str:
        """Takes one id; returns the text that is certain now, "" in the middle of a character."""
        self._waiting.append(token)
        text = self._text()
        return "" if text.endswith(_REPLACEMENT) else self._release(text)

    def end(self) -> str:
        """The rest, after the last id: bytes that never became a character, if any."""
        return self._release(self._text())

    def _text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._waiting)[len(before) :]

    def _release(self, text: str) -> str:
        # Ids without any text (special tokens) must not become the context: the next id would count as the first.
        if text:
            self._context, self._waiting = self._waiting, []
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, **self._options))
