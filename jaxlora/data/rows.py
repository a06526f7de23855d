"""Rows of a data set as conversations: which kind they are, by their columns, and what each one says."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from jaxlora.core.errors import InputError

Message = dict[str, Any]
"""{"role", "content"}, both text. Besides them an assistant's may have "tool_calls", a tool's "tool_call_id" and
"name", and the first of a conversation "tools": the JSON schemas of what may be called in it (kept there, they stay
with every beginning of the conversation)."""

Conversation = list[Message] | str
"""Messages in order, or the plain text of a row that is no conversation."""

ROLES = ("system", "user", "assistant", "tool")

# The first kind whose columns are all there is the one used: a set that carries both conversations and a flattened
# copy of them (as several on the hub do) is read as conversations.
KINDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL_COLUMNS = {
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system", "tools"),
    "prompt_completion": ("tools",),
}
SPEAKERS = {"human": "user", "gpt": "assistant"}
# Fields of a message that carry text which the conversation would lose if they were passed over.
UNSUPPORTED_FIELDS = ("function_call", "reasoning_content", "reasoning", "thinking")
# What may speak after whom; "calls" is an assistant's turn that calls tools.
NEXT = {
    "": ("user",),
    "user": ("assistant", "calls"),
    "assistant": ("user",),
    "calls": ("tool",),
    "tool": ("tool", "assistant", "calls"),
}


def recognise(columns: Sequence[str], name: str) -> str:
    """The kind of rows that have these columns.

    Raises:
        InputError: no kind has them; found and accepted columns are named.
    """
    for kind, needed in KINDS.items():
        if all(column in columns for column in needed):
            return kind
    accepted = "; ".join(
        ", ".join(needed) + (f" ({', '.join(OPTIONAL_COLUMNS[kind])})" if kind in OPTIONAL_COLUMNS else "")
        for kind, needed in KINDS.items()
    )
    raise InputError(
        f"{name} has the columns {', '.join(columns)}, which are not recognised; "
        f"accepted are: {accepted} (those in parentheses are optional)"
    )


def read_row(kind: str, row: Mapping[str, Any], *, exact: bool = False) -> Conversation:
    """Reads one row of the given kind; nothing that belongs to the conversation is left out.

    Args:
        kind: a key of `KINDS`.
        row: column -> value.
        exact: the values are the file's own. Where they come out of a typed table (arrow), it has given every schema
            and every call the keys of all others, without a value: there keys without a value count as absent.
    Returns:
        Messages, or the text of a row of text.
    Raises:
        InputError: not text where text must be, an unknown role, or turns in an order no template can show.
    """
    tools = _tools(row.get("tools"), exact)
    if kind == "text":
        if tools:
            raise InputError("it has tools, but its text is no conversation in which they could be shown")
        return _text(row["text"], "text")
    if kind == "alpaca":
        question = _text(row["instruction"], "instruction")
        if row.get("input"):
            question += "\n\n" + _text(row["input"], "input")
        answer = _text(row["output"], "output")
        messages = [*_system(row), _message("user", question), _message("assistant", answer)]
    elif kind == "prompt_completion":
        messages = _turns(row["prompt"], "user", "prompt", exact)
        messages += _turns(row["completion"], "assistant", "completion", exact)
    else:
        messages = _system(row) if kind == "sharegpt" else []
        messages += _messages(row[KINDS[kind][0]], KINDS[kind][0], exact)
    check_order(messages)
    if tools:
        messages[0] = {**messages[0], "tools": tools}
    return messages


def check_order(messages: list[Message]) -> None:
    """Raises InputError unless the user speaks first, user and assistant take turns, and tools answer calls."""
    if not messages:
        raise InputError("the conversation is empty")
    before = ""
    for number, message in enumerate(messages, 1):
        role = "calls" if message.get("tool_calls") else message["role"]
        if role == "system":
            continue
        if role not in NEXT[before]:
            raise InputError(_disorder(before, role, number))
        before = role


def _disorder(before: str, role: str, number: int) -> str:
    """What is wrong with a message of this role after the one before it, and what to do."""
    speaker = "assistant" if role == "calls" else role
    if role == "tool":
        return f"message {number} is a tool's result, but no call of a tool stands before it; put the assistant's " \
               "message with tool_calls there, or remove the result"  # fmt: skip
    if before == "calls":
        return f"message {number} is the {speaker}'s, but the call of a tool before it has no result; put a message " \
               "of the role tool between them"  # fmt: skip
    if before == "tool":
        return f"message {number} is the {speaker}'s, but the assistant has not answered the tool's result; " \
               "put its answer between them"  # fmt: skip
    if before == "":
        return f"the conversation starts with the {speaker}; user and assistant must take turns, the user first: " \
               "remove what comes before the user's first message"  # fmt: skip
    return f"message {number} makes two {speaker} turns in a row; user and assistant must take turns: join the two, " \
           "or remove one"  # fmt: skip


def _system(row: Mapping[str, Any]) -> list[Message]:
    return [_message("system", _text(row["system"], "system"))] if row.get("system") else []


def _turns(value: Any, role: str, column: str, exact: bool) -> list[Message]:
    """A prompt or completion: plain text, or messages."""
    return [_message(role, value)] if isinstance(value, str) else _messages(value, column, exact)


def _messages(value: Any, column: str, exact: bool) -> list[Message]:
    if isinstance(value, str):  # csv has no lists; there a conversation is written as JSON
        value, exact = _parsed(value), True
    if not _is_list_of_objects(value):
        raise InputError(f"{column} is {_shown(value)}; expected a list of messages with role and content")
    return [_read_message(message, number, exact) for number, message in enumerate(value, 1)]


def _read_message(message: Mapping[str, Any], number: int, exact: bool) -> Message:
    role = message.get("role") or message.get("from")
    if role not in ROLES and role not in SPEAKERS:
        raise InputError(f"message {number} has the unknown role {_shown(role)}; allowed: {', '.join(ROLES)} "
                         f"(or {', '.join(SPEAKERS)} in sharegpt)")  # fmt: skip
    role = SPEAKERS.get(role, role)
    for field in UNSUPPORTED_FIELDS:
        if message.get(field):
            raise InputError(
                f"message {number} carries {field}, which is not supported: its text would be lost"
            )
    content = message.get("content") if message.get("content") is not None else message.get("value")
    if message.get("tool_calls"):
        if role != "assistant":
            raise InputError(
                f"message {number} is the {role}'s and carries tool_calls; only the assistant calls tools"
            )
        spoken = "" if content is None else _text(content, f"the content of message {number}")
        return {**_message(role, spoken), "tool_calls": _calls(message["tool_calls"], number, exact)}
    said = _message(role, _text(content, f"the content of message {number}"))
    if role == "tool":
        said |= {field: message[field] for field in ("tool_call_id", "name") if message.get(field)}
    return said


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _tools(value: Any, exact: bool) -> list[dict[str, Any]]:
    """The JSON schemas of the tools, given as such or as JSON text; none is an empty list."""
    if isinstance(value, str):
        value, exact = _parsed(value) if value.strip() else None, True
    if not value:
        return []
    if not _is_list_of_objects(value):
        raise InputError(
            f"tools is {_shown(value)}; expected a list of JSON schemas, or the same as JSON text"
        )
    return [_plain(tool, exact) for tool in value]


def _calls(value: Any, number: int, exact: bool) -> list[dict[str, Any]]:
    """An assistant's calls, each as {"type": "function", "function": {"name", "arguments"}} and its id if it has one.

    Arguments given as JSON text (as OpenAI's API has them) are read: templates write them as JSON themselves, and
    would put text into quotation marks.
    """
    if isinstance(value, str):
        value, exact = _parsed(value), True
    if not _is_list_of_objects(value):
        raise InputError(f"the tool_calls of message {number} are {_shown(value)}; expected a list of "
                         '{"type": "function", "function": {"name", "arguments"}}')  # fmt: skip
    calls = []
    for place, call in enumerate(value, 1):
        which = f"tool call {place} of message {number}"
        function = call.get("function") or {
            key: call[key] for key in call if key not in ("type", "id", "index")
        }
        name, arguments = (function.get(key) for key in ("name", "arguments"))
        if not isinstance(name, str) or not name:
            raise InputError(f"{which} has the name {_shown(name)}; expected the name of a function")
        text = isinstance(arguments, str)
        if isinstance(arguments, str):
            arguments = _parsed(arguments) if arguments.strip() else {}
        if not isinstance(arguments, Mapping | None):
            raise InputError(
                f"{which} has the arguments {_shown(arguments)}; expected an object, or one as JSON text"
            )
        if lost := [
            key for key in function if key not in ("name", "arguments") and function[key] is not None
        ]:
            raise InputError(f"{which} carries {', '.join(lost)}, which is not supported: it would be lost")
        read = {
            "type": "function",
            "function": {"name": name, "arguments": _plain(arguments or {}, exact or text)},
        }
        calls.append(read | ({"id": call["id"]} if call.get("id") else {}))
    return calls


def _plain(tree: Any, exact: bool) -> Any:
    """A JSON tree, without the keys that have no value unless it is exact."""
    if isinstance(tree, Mapping):
        return {key: _plain(value, exact) for key, value in tree.items() if exact or value is not None}
    return [_plain(child, exact) for child in tree] if isinstance(tree, list) else tree


def _parsed(text: str) -> Any:
    """What a text says in JSON; the text itself where it is none."""
    with suppress(ValueError):
        return json.loads(text)
    return text


def _is_list_of_objects(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(item, Mapping) for item in value)
    )


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what} is {_shown(value)}; expected text")
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 60 else shown[:57] + "..."
