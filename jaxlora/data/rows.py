"""Rows of a data set as conversations: which kind they are, by their columns, and what each one says."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from jaxlora.core.errors import InputError

Message = dict[str, str]
Conversation = list[Message] | str
"""Messages {"role", "content"} in order, or the plain text of a row that is no conversation."""

ROLES = ("system", "user", "assistant")

# The first kind whose columns are all there is the one used: a set that carries both conversations and a flattened
# copy of them (as several on the hub do) is read as conversations.
KINDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL_COLUMNS = {"alpaca": ("input", "system"), "sharegpt": ("system",)}
SPEAKERS = {"human": "user", "gpt": "assistant"}
# Fields of a message that carry text which the conversation would lose if they were passed over.
UNSUPPORTED_FIELDS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def recognise(columns: Sequence[str], name: str) -> str:
    """The kind of rows that have these columns.

    Raises:
        InputError: no kind has them; found and accepted columns are named.
    """
    for kind, needed in KINDS.items():
        if all(column in columns for column in needed):
            return kind
    accepted = "; ".join(
        ", ".join(needed) + "".join(f" ({extra})" for extra in OPTIONAL_COLUMNS.get(kind, ()))
        for kind, needed in KINDS.items()
    )
    raise InputError(
        f"{name} has the columns {', '.join(columns)}, which are not recognised; "
        f"accepted are: {accepted} (those in parentheses are optional)"
    )


def read_row(kind: str, row: Mapping[str, Any]) -> Conversation:
    """Reads one row of the given kind; nothing that belongs to the conversation is left out.

    Args:
        kind: a key of `KINDS`.
        row: column -> value.
    Returns:
        Messages, or the text of a row of text.
    Raises:
        InputError: not text where text must be, an unknown role, or turns in an order no template can show.
    """
    if row.get("tools"):
        raise InputError("it has tools, which are not supported: their description would be lost")
    if kind == "text":
        return _text(row["text"], "text")
    if kind == "alpaca":
        question = _text(row["instruction"], "instruction")
        if row.get("input"):
            question += "\n\n" + _text(row["input"], "input")
        answer = _text(row["output"], "output")
        messages = [*_system(row), _message("user", question), _message("assistant", answer)]
    elif kind == "prompt_completion":
        messages = _turns(row["prompt"], "user", "prompt") + _turns(
            row["completion"], "assistant", "completion"
        )
    else:
        messages = _system(row) if kind == "sharegpt" else []
        messages += _messages(row[KINDS[kind][0]], KINDS[kind][0])
    check_order(messages)
    return messages


def check_order(messages: list[Message]) -> None:
    """Raises InputError unless the user speaks first and user and assistant take turns."""
    if not messages:
        raise InputError("the conversation is empty")
    speakers = [message["role"] for message in messages if message["role"] != "system"]
    for turn, role in enumerate(speakers):
        expected = ("user", "assistant")[turn % 2]
        if role != expected:
            problem = (
                "the conversation starts with the assistant" if turn == 0 else f"two {role} turns in a row"
            )
            raise InputError(f"{problem}; user and assistant must take turns, the user first")


def _system(row: Mapping[str, Any]) -> list[Message]:
    return [_message("system", _text(row["system"], "system"))] if row.get("system") else []


def _turns(value: Any, role: str, column: str) -> list[Message]:
    """A prompt or completion: plain text, or messages."""
    return [_message(role, value)] if isinstance(value, str) else _messages(value, column)


def _messages(value: Any, column: str) -> list[Message]:
    if isinstance(value, str):  # csv has no lists; there a conversation is written as JSON
        with suppress(ValueError):
            value = json.loads(value)
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not all(isinstance(m, Mapping) for m in value)
    ):
        raise InputError(f"{column} is {_shown(value)}; expected a list of messages with role and content")
    return [_read_message(message, number) for number, message in enumerate(value, 1)]


def _read_message(message: Mapping[str, Any], number: int) -> Message:
    role = message.get("role") or message.get("from")
    if role not in ROLES and role not in SPEAKERS:
        raise InputError(f"message {number} has the unknown role {_shown(role)}; allowed: {', '.join(ROLES)} "
                         f"(or {', '.join(SPEAKERS)} in sharegpt)")  # fmt: skip
    for field in UNSUPPORTED_FIELDS:
        if message.get(field):
            raise InputError(
                f"message {number} carries {field}, which is not supported: its text would be lost"
            )
    content = message.get("content") if message.get("content") is not None else message.get("value")
    return _message(SPEAKERS.get(role, role), _text(content, f"the content of message {number}"))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what} is {_shown(value)}; expected text")
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 60 else shown[:57] + "..."
