"""A chat template seen from outside: which of its output is the template's own text, and which is the messages'.

A template is a program; nothing in it says where a message's text comes out. So it is asked: messages whose contents
are marks are rendered, and where the marks come out are the slots of a `Layout`. A layout is a hypothesis about the
template, and it is tested on every conversation: filled with the real contents it must equal what the template
itself renders. Where it does not (a template that rewrites messages), the conversation is refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from jaxlora.core.errors import InputError

Messages = list[dict[str, Any]]

_MARK = re.compile(r"slot(\d{6})mark")
# Different lengths, so that the length by which a literal has grown tells which of the two were kept.
_LEFT, _RIGHT = " ", " \n "
_KEPT = {
    0: (False, False),
    len(_LEFT): (False, True),
    len(_RIGHT): (True, False),
    len(_LEFT + _RIGHT): (True, True),
}


class ConversationError(InputError):
    """One conversation of a batch cannot be used.

    Attributes:
        index: its place in the batch, from 0.
        reason: why, without the place.
    """

    def __init__(self, index: int, reason: str):
        super().__init__(f"conversation {index + 1}: {reason}")
        self.index, self.reason = index, reason


def changes_what_it_has_shown(message: int) -> InputError:
    """The refusal of a template of which a conversation's beginning is not the rendering of the beginning."""
    return InputError(
        f"the chat template shows the assistant's message {message + 1}, or what comes before it, differently once "
        "the conversation goes on (as templates of reasoning models do), so the model would learn to answer other "
        "text than it is given; let each conversation end with its first answer, or put a chat_template.jinja that "
        "never changes what it has shown into the model's folder"
    )


def _why_not_rendered(error: Exception) -> str:
    """The reason a template gives for not rendering a conversation.

    Raises:
        InputError: it is no template, and would render none.
    """
    if isinstance(error, TemplateSyntaxError):
        raise InputError(f"the model's chat template is not valid jinja (line {error.lineno}: {error.message}); mend "
                         "the chat_template.jinja in its folder") from None  # fmt: skip
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".!")
    return f"the chat template does not render this conversation: {reason}; change the conversation, or leave it out"


@dataclass(frozen=True)
class Slot:
    """Where the content of one message comes out, and whether the template trims it first."""

    message: int
    trim_left: bool = False
    trim_right: bool = False

    def fill(self, contents: Sequence[str]) -> str:
        content = contents[self.message]
        if self.trim_left:
            content = content.lstrip()
        return content.rstrip() if self.trim_right else content


Layout = tuple[str | Slot, ...]
"""The template's own text and the slots of the messages, in the order in which they come out."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Raises:
        InputError: the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        try:
            self.source = tokenizer.get_chat_template()
        except ValueError:
            raise InputError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template; use a chat model, or put a "
                "chat_template.jinja into the model's folder (of the model it was made from, or ChatML's)"
            ) from None
        self._tokenizer = tokenizer
        self._layouts: dict[tuple[tuple[str, ...], bool], Layout] = {}

    def render(self, conversations: Sequence[Messages], *, generation: bool = False) -> list[str]:
        """The template's own rendering of each conversation; `generation` opens an assistant turn at the end.

        Raises:
            ConversationError: the template refuses a conversation (with its own reason).
            InputError: it is no template.
        """
        options = {"tokenize": False, "add_generation_prompt": generation, "chat_template": self.source}
        try:
            return cast(list[str], self._tokenizer.apply_chat_template(list(conversations), **options))
        except Exception:  # a template is someone's program and may raise anything: find the conversation
            for index, messages in enumerate(conversations):
                try:
                    self._tokenizer.apply_chat_template(list(messages), **options)
                except Exception as error:
                    raise ConversationError(index, _why_not_rendered(error)) from None
            raise

    def render_one(
        self, messages: Messages, *, tools: list[dict[str, Any]] | None = None, generation: bool = False
    ) -> str:
        """The template's rendering of one conversation, with the descriptions of the tools it may call.

        Raises:
            InputError: the template refuses it (with its own reason).
        """
        options: dict[str, Any] = {
            "tools": tools,
            "tokenize": False,
            "add_generation_prompt": generation,
            "chat_template": self.source,
        }
        try:
            return cast(str, self._tokenizer.apply_chat_template(messages, **options))
        except Exception as error:  # a template is someone's program and may raise anything
            raise InputError(_why_not_rendered(error)) from None

    def layout(self, roles: tuple[str, ...], *, generation: bool = False) -> Layout:
        """Where the contents of messages with these roles come out.

        Raises:
            InputError: the template leaves a message out, shows an assistant turn twice, or rewrites contents.
        """
        key = (roles, generation)
        if key not in self._layouts:
            self._layouts[key] = self._find_layout(roles, generation)
        return self._layouts[key]

    def rewritten(
        self, roles: tuple[str, ...], contents: list[str], rendered: str, *, generation: bool = False
    ) -> InputError:
        """The refusal of a conversation that is not rendered as its layout says: the first message that differs."""
        at, where = 0, len(roles) - 1
        for part in self.layout(roles, generation=generation):
            text = part if isinstance(part, str) else part.fill(contents)
            where = where if isinstance(part, str) else part.message
            if not rendered.startswith(text, at):
                break
            at += len(text)
        return InputError(
            f"the chat template rewrites the text of message {where + 1} (the {roles[where]}'s) or drops a part of it "
            "(as templates of reasoning models drop the reasoning of earlier answers), so what is trained cannot be "
            "told from what is not; write the message as the template shows it, or put a chat_template.jinja that "
            "shows messages as they are into the model's folder"
        )

    def keep_system(self, messages: Messages, *, generation: bool = False) -> Messages:
        """The messages with a system message placed where the template does not lose it.

        Mistral v0.3's template shows the system message with the last user message, but only while that message is
        the very last: in a conversation that ends with the assistant, the system message disappears. Mistral's own
        tokenizer (mistral-common) keeps it with the last user message, and so do we: it is written in front of
        that message here, exactly as the template would have written it. Where nobody is asked for an answer
        (`generation`), it is the last one that was answered: after that, there is nothing to learn.
        """
        if messages[0]["role"] != "system" or self._late_system_joint is None:
            return messages
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not generation and answers:
            users = [i for i in users if i < answers[-1]]
        elif messages[-1]["role"] == "user":
            return messages
        last_user = users[-1]
        content = messages[0]["content"] + self._late_system_joint + messages[last_user]["content"]
        kept = [*messages[1:last_user], {"role": "user", "content": content}, *messages[last_user + 1 :]]
        if "tools" in messages[0]:
            kept[0] = {**kept[0], "tools": messages[0]["tools"]}
        return kept

    @cached_property
    def _late_system_joint(self) -> str | None:
        """The text between system and user message in templates that show the former only with a final user message."""
        try:
            ended = self._marked(("system", "user", "assistant"), False)
            waiting = self._marked(("system", "user"), False)
            bare = self._marked(("user",), False)
        except InputError:
            return None
        if Slot(0) in ended or Slot(0) not in waiting or len(waiting) != 5 or len(bare) != 3:
            return None
        before, system, joint, user, after = waiting
        fits = (system, user) == (Slot(0), Slot(1)) and bare == (before, Slot(0), after)
        return joint if fits and isinstance(joint, str) else None

    def _find_layout(self, roles: tuple[str, ...], generation: bool) -> Layout:
        plain = self._marked(roles, generation)
        padded = self._marked(roles, generation, _LEFT, _RIGHT)
        seen = [part.message for part in plain if isinstance(part, Slot)]
        for message, role in enumerate(roles):
            if message not in seen:
                raise InputError(f"the chat template leaves out the {role} message (message {message + 1} of "
                                 f"{len(roles)}), so its text would be lost; remove the message, or put a "
                                 "chat_template.jinja that always shows it into the model's folder")  # fmt: skip
            if role == "assistant" and seen.count(message) > 1:
                raise InputError(
                    f"the chat template shows the assistant's message {message + 1} more than once"
                )
        if seen != [part.message for part in padded if isinstance(part, Slot)]:
            raise InputError("the chat template orders messages by their text, which is not supported")
        return self._with_trims(plain, padded)

    def _with_trims(self, plain: Layout, padded: Layout) -> Layout:
        """The layout, with what became of the white space around the marks of `padded` noted in the slots."""
        # Literals and slots alternate, a literal first and last: literal i stands left of slot i and right of i - 1.
        kept = []
        for literal, grown in zip(plain[::2], padded[::2], strict=True):
            right, left = _KEPT.get(len(grown) - len(literal), (None, None))  # type: ignore[arg-type]
            if right is None or grown != _RIGHT * right + literal + _LEFT * left:  # type: ignore[operator]
                raise InputError(
                    "the chat template rewrites the text around messages, which is not supported"
                )
            kept.append((right, left))
        slots = [
            Slot(slot.message, trim_left=not kept[i][1], trim_right=not kept[i + 1][0])  # type: ignore[union-attr]
            for i, slot in enumerate(plain[1::2])
        ]
        parts = [part for pair in zip(plain[::2], [*slots, ""], strict=True) for part in pair]
        return tuple(part for part in parts if part != "")

    def _marked(self, roles: tuple[str, ...], generation: bool, left: str = "", right: str = "") -> Layout:
        """Literals and slots of a rendering of marks, alternating, a (perhaps empty) literal first and last."""
        messages = [
            {"role": role, "content": f"{left}slot{i:06d}mark{right}"} for i, role in enumerate(roles)
        ]
        try:
            (text,) = self.render([messages], generation=generation)
        except ConversationError as error:
            raise InputError(error.reason) from None
        pieces = _MARK.split(text)
        return tuple(Slot(int(piece)) if i % 2 else piece for i, piece in enumerate(pieces))


def begins(layout: Layout, beginning: Layout) -> bool:
    """Whether a conversation with this layout begins as the other layout says."""
    for part, start in zip(layout, beginning, strict=False):
        if part != start:
            last = start is beginning[-1]
            return last and isinstance(part, str) and isinstance(start, str) and part.startswith(start)
    return len(beginning) <= len(layout)
