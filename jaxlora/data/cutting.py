"""Renderings cut at the special tokens that the template wrote: what stands between two of them is one text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxlora.core.errors import InputError
from jaxlora.data.pieces import Piece, Queue, any_of
from jaxlora.data.template import Slot
from jaxlora.data.tools import Part


@dataclass(frozen=True)
class Run:
    """What stands between two special tokens and holds at least one message; tokenised as one piece."""

    parts: tuple[str | Slot, ...]
    first: bool  # nothing stands before it: some tokenizers put a space there, and only there


Plan = tuple[Piece | Run, ...]
"""A layout, cut at its special tokens; what holds no message is known in advance."""


def unended() -> InputError:
    """The refusal of a template that leaves an assistant's turn open."""
    return InputError("the chat template does not end the assistant's turns with a special token, so the model could "
                      "not learn to stop; use a template that does")  # fmt: skip


def fill_plan(plan: Plan, contents: Sequence[str], queue: Queue, *, trained: frozenset[int]) -> list[Piece]:
    """The pieces of a conversation with these contents, of which those of the messages in `trained` are trained."""
    pieces = []
    for step in plan:
        if isinstance(step, Piece):
            pieces.append(step)
            continue
        texts, spans, at = [], [], 0
        for part in step.parts:
            text = part if isinstance(part, str) else part.fill(contents)
            if text and not isinstance(part, str) and part.message in trained:
                spans.append((at, at + len(text)))
            texts.append(text)
            at += len(text)
        if at:
            pieces.append(queue.put("".join(texts), spans, first=step.first))
    return pieces


def cut_parts(
    parts: Sequence[Part], calling: frozenset[int], turn_end: str, controls: Mapping[str, int], queue: Queue
) -> list[Piece]:
    """The pieces of a conversation with tools.

    Of a turn in plain words its content is trained, of one with calls all that the template writes for it, and of both
    the token that ends the turn.

    Args:
        parts: the rendering, told apart.
        calling: the messages that call tools.
        turn_end: the special token that ends a turn. (One with calls may hold others, as "</tool_call>".)
        controls: the special tokens, text -> id.
        queue: takes what has to be tokenised.
    Raises:
        InputError: a turn is not ended by a special token.
    """
    pattern = any_of(controls)
    pieces: list[Piece] = []
    run: list[str] = []
    spans: list[tuple[int, int]] = []
    turn = -1  # the one that is open

    def add(text: str, trained: bool) -> None:
        start = sum(map(len, run))
        run.append(text)
        if trained and text:
            joined = spans.pop()[0] if spans and spans[-1][1] == start else start
            spans.append((joined, start + len(text)))

    def close_run() -> None:
        if any(run):
            pieces.append(queue.put("".join(run), tuple(spans), first=not pieces))
        run.clear()
        spans.clear()

    for part in parts:
        if part.turn not in (-1, turn):
            if turn >= 0:
                raise unended()
            turn = part.turn
        if not part.own:
            add(part.text, part.turn >= 0)
            continue
        for text in pattern.split(part.text):
            if text not in controls:
                add(text, turn in calling)
                continue
            close_run()
            pieces.append(Piece(text, (controls[text],), trained=turn >= 0))
            if part.turn < 0 and (turn not in calling or text == turn_end):
                turn = -1
    close_run()
    if turn >= 0:
        raise unended()
    return pieces


def text_of(pieces: Sequence[Piece]) -> str:
    """The text of the pieces, one after the other."""
    return "".join([piece.text for piece in pieces])
