"""Conversations with tools, seen from outside: which text of a rendering is the template's, and which the row's.

Schemas, calls and results come out of a template in more places and shapes than a layout foresees: as JSON or not,
before the last user message or before the first. So nothing is foreseen. A conversation is rendered as it is, and
once more with a mark before and after each of its texts. Without the marks, the second rendering must be the first;
then whatever stands between two marks is the row's text, and all else the template's own.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from jaxlora.core.errors import InputError
from jaxlora.data.template import ChatTemplate, Messages, Slot, changes_what_it_has_shown

# Texts on which templates branch, or by which they look something up: with marks in them they would be others. They
# stay as they are, unless they hold a special token.
_BARE = ("type", "required", "id", "tool_call_id")
# Words of JSON schema itself, which a template that writes schemas in its own way need not repeat.
_SCHEMA = {"type", "function", "name", "description", "parameters", "properties", "required", "items", "enum"}

_MOST_OPENINGS = 10_000
_QUESTION = {"role": "user", "content": "What is it like there?"}
_CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": "there"}}}
_PLACE = {"type": "string", "description": "Where to look"}
_SCHEMAS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Looks",
            "parameters": {"type": "object", "properties": {"where": _PLACE}, "required": ["where"]},
        },
    }
]


def has_tools(messages: Messages) -> bool:
    """Whether a conversation describes, calls or answers with tools."""
    return "tools" in messages[0] or any("tool_calls" in m or m["role"] == "tool" for m in messages)


class Part(NamedTuple):
    """A stretch of a rendered conversation.

    Attributes:
        text: as it was rendered.
        own: it is the template's own; only here are there special tokens.
        turn: the assistant's message whose words these are; -1 where they are not the assistant's.
    """

    text: str
    own: bool
    turn: int = -1


class _Leaf(NamedTuple):
    """A text of a row: the message it is in (None: the description of the tools), and what it is for a person."""

    message: int | None
    what: str


class _Cut(NamedTuple):
    """A rendering cut at its marks: leaf i's text stands between own[i] and own[i + 1]."""

    own: list[str]
    leaves: list[tuple[int, str]]

    @property
    def text(self) -> str:
        return "".join([a + b for a, (_, b) in zip(self.own, self.leaves, strict=False)]) + self.own[-1]

    def before(self, place: int) -> int:
        """The leaf before the one at this place; -1 for the first."""
        return self.leaves[place - 1][0] if place else -1


class ToolTemplate:
    """How a chat template shows tools.

    Args:
        template: of the model.
    Attributes:
        template: the same.
    """

    def __init__(self, template: ChatTemplate):
        self.template = template
        self._openings: dict[tuple[Any, ...], str] = {}

    @cached_property
    def problem(self) -> str | None:
        """Why the template cannot show tools; None where it can."""
        try:
            self._trace(self.example(), re.compile(r"(?!)"), generation=False, spoken=True)
        except InputError as error:
            return str(error)
        return None

    @cached_property
    def written(self) -> str:
        """The template's own text in a conversation with tools; "" where it cannot show them."""
        if self.problem is not None:
            return ""
        parts = self._trace(self.example(), re.compile(r"(?!)"), generation=False, spoken=True)
        return "\0".join(part.text for part in parts if part.own)

    @cached_property
    def needs_ids(self) -> bool:
        """Whether the template shows calls only with ids (Mistral v0.3's: of nine letters or digits)."""
        try:
            self._render(self.example(ids=False))
        except InputError:
            return self.problem is None
        return False

    def example(self, *, ids: bool = True) -> Messages:
        """A conversation with everything that belongs to tools."""
        call, result = ({**_CALL, "id": "call00001"}, {"tool_call_id": "call00001"}) if ids else (_CALL, {})
        return [
            {**_QUESTION, "tools": _SCHEMAS},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "Sunny", **result},
            {"role": "assistant", "content": "It is sunny."},
        ]

    def with_ids(self, messages: Messages) -> Messages:
        """The messages, with ids where the template needs them and the row has none at all.

        The calls of a conversation are numbered, and results get the numbers of the calls before them, in order. (An
        id that is drawn, as Mistral's own are, is noise to be learned by heart; a number can be known.)

        Raises:
            InputError: more results than calls.
        """
        if self._has_ids(messages) or not self.needs_ids:
            return messages
        numbered, count = [], 0
        open_ids: list[str] = []
        for number, message in enumerate(messages, 1):
            if calls := message.get("tool_calls"):
                open_ids = [f"call{count + i:05d}" for i in range(1, len(calls) + 1)]
                count += len(calls)
                calls = [{**call, "id": id} for call, id in zip(calls, open_ids, strict=True)]
                message = {**message, "tool_calls": calls}
            elif message["role"] == "tool":
                if not open_ids:
                    raise InputError(f"message {number} is one result more than there are calls before it; the chat "
                                     "template ties each result to a call")  # fmt: skip
                message = {**message, "tool_call_id": open_ids.pop(0)}
            numbered.append(message)
        return numbered

    @staticmethod
    def _has_ids(messages: Messages) -> bool:
        return any("tool_call_id" in m or any("id" in c for c in m.get("tool_calls", ())) for m in messages)

    def trace(
        self, messages: Messages, controls: re.Pattern[str], *, generation: bool = False, spoken: bool = True
    ) -> list[Part]:
        """The rendering of a conversation, told apart.

        Args:
            messages: the conversation, with its tools.
            controls: what would be a special token if the template wrote it.
            generation: opens an assistant turn at the end.
            spoken: whether it has to be known what the assistant says.
        Raises:
            InputError: the template does not render it, loses a part of it, rewrites it, or opens the assistant's
                turns differently once the conversation goes on.
        """
        try:
            return self._trace(messages, controls, generation=generation, spoken=spoken)
        except InputError as error:
            if self.problem is not None:
                raise InputError(
                    f"it has tools, which the model's chat template does not show ({error}); use a model whose "
                    "template does, as Qwen2.5's or Mistral v0.3's, or remove them"
                ) from None
            if self.needs_ids and self._has_ids(messages) and "does not render" in str(error):
                raise InputError(f"{error} (without any id, its calls and results are numbered)") from None
            raise

    def _render(self, messages: Messages, *, generation: bool = False) -> str:
        bare = [{key: value for key, value in message.items() if key != "tools"} for message in messages]
        return self.template.render_one(bare, tools=messages[0].get("tools"), generation=generation)

    def _trace(
        self, messages: Messages, controls: re.Pattern[str], *, generation: bool, spoken: bool
    ) -> list[Part]:
        text = self._render(messages, generation=generation)
        for trim_results in (False, True):
            marker = _Marker(messages, controls, self._trims | {"tool": (trim_results, trim_results)})
            marked = marker.messages()
            cut = marker.find(self._render(marked, generation=generation))
            if cut.text == text:
                break
        else:
            raise InputError("the chat template rewrites the text of this conversation's messages, calls or tools, so "
                             "what is trained cannot be told from what is not")  # fmt: skip
        marker.check_nothing_is_lost(cut)
        turns = {k: marker.places(k, cut) for k, m in enumerate(messages) if m["role"] == "assistant"}
        opened = {}
        if spoken:
            opened = {
                places.start: self._opened(k, marked, marker, cut, places.start)
                for k, places in turns.items()
            }
        calls = {k for k in turns if messages[k].get("tool_calls")}
        turn_of = {place: k for k, places in turns.items() for place in places}
        parts = []
        for place, own in enumerate(cut.own):
            turn, opening = turn_of.get(place, -1), opened.get(place, own)
            within = turn in calls and turn_of.get(place - 1) == turn
            parts.append(Part("" if within else opening, True))
            parts.append(Part(own if within else own[len(opening) :], True, turn))
            if place < len(cut.leaves):
                parts.append(Part(cut.leaves[place][1], False, turn))
        return [part for part in parts if part.text or not part.own]

    def _opened(self, k: int, marked: Messages, marker: "_Marker", cut: _Cut, place: int) -> str:
        """The template's own text from what was said before turn k up to the turn's first word.

        What opens a turn is what stands there when the assistant is asked for it, or answers in plain words: all that
        comes after it in a turn with calls, the assistant has to write itself.
        """
        own, before = cut.own[place], cut.before(place)
        known = (*((m["role"], "tool_calls" in m) for m in marked[: k + 1]), own)
        if known in self._openings:
            return self._openings[known]
        plain = {"role": "assistant", "content": marker.mark("x", k, "")}
        probe = marker.find(self._render([*marked[:k], plain]))
        at = [leaf for leaf, _ in probe.leaves].index(len(marker.leaves) - 1)
        openings = [(probe.own[at], probe.before(at))]
        if "tool_calls" in marked[k]:
            asked = marker.find(self._render(marked[:k], generation=True))
            openings.append((asked.own[-1], asked.before(len(asked.leaves))))
        for opening, leaf in openings:
            if leaf == before and own.startswith(opening) and ("tool_calls" in marked[k] or own == opening):
                if len(self._openings) == _MOST_OPENINGS:  # a row's own ids may stand in them
                    self._openings.clear()
                self._openings[known] = opening
                return opening
        raise changes_what_it_has_shown(k)

    @cached_property
    def _trims(self) -> dict[str, tuple[bool, bool]]:
        """The roles whose contents the template trims, left and right."""
        trims = {}
        for roles in [("user", "assistant"), ("system", "user", "assistant")]:
            try:
                slots = [part for part in self.template.layout(roles) if isinstance(part, Slot)]
            except InputError:
                continue
            trims |= {roles[slot.message]: (slot.trim_left, slot.trim_right) for slot in slots}
        return trims


class _Marker:
    """Puts marks around the texts of a conversation, and finds them in what a template makes of it."""

    def __init__(self, messages: Messages, controls: re.Pattern[str], trims: Mapping[str, tuple[bool, bool]]):
        self._messages, self._controls, self._trims = messages, controls, trims
        self.leaves: list[_Leaf] = []
        self._uses: Counter[int] = Counter()
        self._asked: dict[tuple[str, str], int] = {}
        self._shown: list[tuple[str, Any]] = []  # what has no marks, and has to be shown all the same
        everything = json.dumps(messages, ensure_ascii=False)
        word = "slot"
        while word in everything:
            word += "x"
        self._word = word
        self._pattern = re.compile(word + r"(\d{6})(open|shut)")

    def messages(self) -> Messages:
        """The conversation with a mark before and after every text."""
        marked = [self._message(k, message) for k, message in enumerate(self._messages)]
        if tools := self._messages[0].get("tools"):
            marked[0]["tools"] = [self._tree(tool, None, "the description of the tools") for tool in tools]
            for tool in tools:
                self._note(tool.get("function", tool), "the description of the tools")
        return marked

    def mark(self, text: str, message: int | None, what: str) -> str:
        """The text between two marks of a new leaf."""
        self.leaves.append(_Leaf(message, what))
        return self._between(len(self.leaves) - 1, text)

    def find(self, text: str) -> _Cut:
        """Cuts a rendering at its marks.

        Raises:
            InputError: they do not come in pairs.
        """
        pieces = self._pattern.split(text)
        opened, shut = (list(zip(pieces[i::6], pieces[i + 1 :: 6], strict=False)) for i in (1, 4))
        pairs = all(
            a == (n, "open") and b == (n, "shut") for a, b, n in zip(opened, shut, pieces[1::6], strict=False)
        )
        if len(opened) != len(shut) or not pairs:
            raise InputError(
                "the chat template takes texts of this conversation apart, which is not supported"
            )
        return _Cut(pieces[::6], [(int(n), leaf) for (n, _), leaf in zip(opened, pieces[3::6], strict=True)])

    def places(self, message: int, cut: _Cut) -> range:
        """Where the texts of an assistant's message stand among the leaves.

        Raises:
            InputError: the template shows others between them, or one of them again.
        """
        places = [i for i, (leaf, _) in enumerate(cut.leaves) if self.leaves[leaf].message == message]
        if len({cut.leaves[i][0] for i in places}) < len(places):
            raise InputError(
                f"the chat template shows a part of the assistant's message {message + 1} more than once"
            )
        if places != list(range(places[0], places[-1] + 1)):
            raise InputError(
                f"the chat template scatters the assistant's message {message + 1}, which is not supported"
            )
        return range(places[0], places[-1] + 1)

    def check_nothing_is_lost(self, cut: _Cut) -> None:
        """Raises InputError, saying what, unless every text of the conversation is shown."""
        found = Counter(leaf for leaf, _ in cut.leaves)
        for number, leaf in enumerate(self.leaves):
            if found[number] < self._uses[number]:
                raise InputError(f"the chat template leaves out {leaf.what}, so its text would be lost")
        own = "\0".join(cut.own)
        for what, value in self._shown:
            shapes = {str(value), json.dumps(value, ensure_ascii=False).strip('"')}
            if not any(shape in own for shape in shapes):
                raise InputError(f"the chat template leaves out {value!r} of {what}, so it would be lost")

    def _between(self, leaf: int, text: str) -> str:
        self._uses[leaf] += 1
        return f"{self._word}{leaf:06d}open{text}{self._word}{leaf:06d}shut"

    def _message(self, k: int, message: Mapping[str, Any]) -> dict[str, Any]:
        role, content = message["role"], message["content"]
        for trims, strip in zip(self._trims.get(role, ()), (str.lstrip, str.rstrip), strict=False):
            content = strip(content) if trims else content
        what = f"the {role}'s message {k + 1}" if role != "tool" else f"the tool's result in message {k + 1}"
        marked = {**message, "content": content}
        for key in ("tool_call_id", "name"):
            if key in message:
                marked[key] = self._tree(message[key], k, what, "id")
        if calls := message.get("tool_calls"):
            if content:  # templates ask whether there is any
                marked["content"] = self.mark(content, k, f"the text of {what}, which calls a tool as well")
            marked["tool_calls"] = [self._call(k, call) for call in calls]
        elif role == "user":  # templates compare them: what was equal has to stay so
            if (role, content) not in self._asked:
                self._asked[role, content] = len(self.leaves)
                self.leaves.append(_Leaf(k, what))
            marked["content"] = self._between(self._asked[role, content], content)
        else:
            marked["content"] = self.mark(content, k, what)
        return marked

    def _call(self, k: int, call: Mapping[str, Any]) -> dict[str, Any]:
        what, function = f"the call of a tool in message {k + 1}", call["function"]
        self._note(function["arguments"], what)
        marked = {
            "name": self.mark(function["name"], k, what),
            "arguments": self._tree(function["arguments"], k, what),
        }
        given = {key: self._tree(value, k, what, key) for key, value in call.items() if key != "function"}
        return {**given, "function": {**function, **marked}}

    def _tree(self, tree: Any, message: int | None, what: str, key: str = "") -> Any:
        """A JSON tree with marks around its texts, and around keys that hold a special token."""
        if isinstance(tree, Mapping):
            return {
                self.mark(name, message, what) if self._controls.search(name) else name: self._tree(
                    value, message, what, name
                )
                for name, value in tree.items()
            }
        if isinstance(tree, list):
            return [self._tree(child, message, what, key) for child in tree]
        if not isinstance(tree, str) or (key in _BARE and not self._controls.search(tree)):
            return tree
        return self.mark(tree, message, what)

    def _note(self, tree: Any, what: str) -> None:
        """Remembers the keys, numbers and truths of a JSON tree, which marks cannot follow."""
        for value in _unmarked(tree):
            if not (isinstance(value, str) and (value in _SCHEMA or self._controls.search(value))):
                self._shown.append((what, value))


def _unmarked(tree: Any) -> Iterator[str | int | float | bool]:
    if isinstance(tree, Mapping):
        yield from tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for child in tree:
            yield from _unmarked(child)
    elif tree is not None and not isinstance(tree, str):
        yield tree
