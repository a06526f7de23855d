"""Conversations to token ids, and which of them are trained: the model's own chat template and tokenizer.

The trained tokens are each assistant turn's content and the token that ends the turn. They are found from the
template (see `template.py`), never by searching the text, and text inside messages never becomes a special token:
the rendering is cut at the special tokens that the template itself wrote, and everything between two of them is
tokenised with the parsing of special tokens switched off.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from jaxlora.core.errors import InputError
from jaxlora.data.cutting import Plan, Run, cut_parts, fill_plan, text_of, unended
from jaxlora.data.pieces import Piece, Queue, TextTokenizer, any_of
from jaxlora.data.rows import Conversation, Message, check_order
from jaxlora.data.template import ChatTemplate, ConversationError, Slot, begins, changes_what_it_has_shown
from jaxlora.data.tools import ToolTemplate, has_tools


class Encoded(NamedTuple):
    """One example: ids int32 [n], and trained bool [n], true where the id is to be learned."""

    ids: np.ndarray
    trained: np.ndarray


def load_tokenizer(path: str, revision: str = "") -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer by `transformers.AutoTokenizer`, without remote code.

    transformers picks the class by the model's architecture, and some classes (Qwen2's) then rebuild the text
    splitting they expect. A folder that says it holds a plain `PreTrainedTokenizerFast` means its tokenizer.json as
    it is written, and gets that.

    Args:
        path: Hugging Face id or local folder.
        revision: branch, tag or commit of a hub id; "" is the default branch.
    Raises:
        InputError: no such folder or id, no tokenizer in it, or one without a tokenizer.json.
    """
    folder = Path(path).expanduser()
    local = folder.exists() or path.startswith(("/", "./", "../", "~"))
    if local and not folder.is_dir():
        raise InputError(f"{path} is no folder; model.path takes a Hugging Face id or a model's folder")
    if local and not (folder / "tokenizer.json").exists():
        raise InputError(f"{path} holds no tokenizer.json; copy the tokenizer's files of the model into it")
    name = str(folder) if local else path
    options: dict[str, Any] = {} if local or not revision else {"revision": revision}
    try:
        declared = str(get_tokenizer_config(name, **options).get("tokenizer_class"))
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
        if declared in ("PreTrainedTokenizerFast", "TokenizersBackend") and type(tokenizer).__name__ not in (
            "PreTrainedTokenizerFast",
            "TokenizersBackend",
        ):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name, **options)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"the tokenizer of {path} cannot be loaded: {reason}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"the tokenizer of {path} has no tokenizer.json, which is the only form supported")
    return tokenizer


class ChatEncoder:
    """Turns conversations into ids and the mask of what is trained.

    Args:
        tokenizer: from `load_tokenizer`.
        train_on: "assistant" trains each assistant turn's content and the token that ends it; "all" trains
            every token.
    Attributes:
        fingerprint: stable hash of everything the encoding depends on.
    Raises:
        InputError: a tokenizer that cannot be used without spoiling its ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: str = "assistant"):
        self.tokenizer, self.train_on = tokenizer, train_on
        self._backend = cast(Tokenizer, tokenizer.backend_tokenizer)
        self._eos = cast(int | None, tokenizer.eos_token_id)
        self._template: ChatTemplate | None = None
        self._no_template: InputError | None = None
        try:
            self._template = ChatTemplate(tokenizer)
            self._tools = ToolTemplate(self._template)
        except InputError as error:  # rows of text need none, so this is said when a conversation comes
            self._no_template = error
        self._controls = self._find_controls(self._backend.get_added_tokens_decoder())
        self._control_pattern = any_of(self._controls)
        self._text = TextTokenizer(self._backend, self._controls)
        self._plans: dict[tuple[tuple[str, ...], bool], Plan] = {}
        self._consistent: set[tuple[str, ...]] = set()
        template = self._template.source if self._template else ""
        specials = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
        known = "\0".join([self._backend.to_str(), template, specials, train_on])
        self.fingerprint = hashlib.sha256(known.encode()).hexdigest()[:32]

    @property
    def template(self) -> ChatTemplate:
        """The chat template; InputError where the tokenizer has none."""
        if self._template is None:
            raise self._no_template or InputError("the tokenizer has no chat template")
        return self._template

    @property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """The ids at which an answer ends: the template's end of an assistant turn, and the tokenizer's eos."""
        ends = [] if self._eos is None else [self._eos]
        if self._template is not None:
            plan = self._plan(("user", "assistant"))
            ends = [step.ids[0] for step in plan if isinstance(step, Piece) and step.trained] + ends
        return tuple(dict.fromkeys(ends))

    def looks_up(self, conversations: Sequence[Conversation]) -> bool:
        """Whether to encode most of these is Python's work, which one thread does at a time."""
        plain = sum(not isinstance(row, str) and str(row).isascii() for row in conversations)
        return self._text.words is not None and 2 * plain > len(conversations)

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Encodes conversations, and plain texts (every token trained, closed by eos).

        Raises:
            ConversationError: a conversation that cannot be encoded faithfully, or has nothing to train.
        """
        queue = Queue(self._text, offsets=self.train_on == "assistant")
        cut = self._cut(conversations, queue)
        queue.run()
        return [
            self._join(pieces, queue, document=isinstance(row, str))
            for pieces, row in zip(cut, conversations, strict=True)
        ]

    def encode_prompt(self, messages: list[Message]) -> np.ndarray:
        """The ids [n] int32 after which the assistant answers: the conversation and an opened assistant turn.

        Raises:
            InputError: turns in an impossible order, or a template that does not show them faithfully.
        """
        check_order(messages)
        queue = Queue(self._text, offsets=False)
        if has_tools(messages):
            pieces = self._cut_with_tools(
                self.template.keep_system(messages, generation=True), queue, generation=True
            )
        else:
            rendered = self.template.render([messages], generation=True)
            pieces = self._cut_conversation(messages, rendered[0], queue, generation=True)
        queue.run()
        return self._join(pieces, queue).ids

    # ---- planning: once for a sequence of roles -----------------------------------------------------------------

    def _find_controls(self, added: dict[int, AddedToken]) -> dict[str, int]:
        """The tokens that text must never become: all special ones, and added ones the template itself writes."""
        controls = {token.content: id for id, token in added.items() if token.special}
        others = {token.content: id for id, token in added.items() if not token.special}
        if self._template is not None and others:
            for roles in [("user", "assistant"), ("system", "user", "assistant")]:
                try:
                    layout = self._template.layout(roles)
                except InputError:
                    continue  # not every template takes a system message
                written = "\0".join(part for part in layout if isinstance(part, str))
                controls |= {token: others[token] for token in any_of(others).findall(written)}
            controls |= {token: others[token] for token in any_of(others).findall(self._tools.written)}
        return controls

    def _plan(self, roles: tuple[str, ...], *, generation: bool = False) -> Plan:
        if (roles, generation) not in self._plans:
            self._plans[roles, generation] = self._make_plan(roles, generation)
        return self._plans[roles, generation]

    def _make_plan(self, roles: tuple[str, ...], generation: bool) -> Plan:
        """Cuts the layout at its special tokens, and finds the one that ends each assistant turn."""
        plan: list[Piece | Run] = []
        run: list[str | Slot] = []
        open_turn = False

        def close_run() -> None:
            if any(isinstance(part, Slot) for part in run):
                plan.append(Run(tuple(run), first=not plan))
            elif run:
                text = "".join(map(str, run))
                plan.append(Piece(text, self._text.ids(text, first=not plan)))
            run.clear()

        for part in self.template.layout(roles, generation=generation):
            if isinstance(part, Slot):
                if open_turn:
                    raise unended()
                open_turn = roles[part.message] == "assistant"
                run.append(part)
                continue
            for piece in self._control_pattern.split(part):
                if piece in self._controls:
                    close_run()
                    plan.append(Piece(piece, (self._controls[piece],), trained=open_turn))
                    open_turn = False
                elif piece:
                    run.append(piece)
        close_run()
        if open_turn:
            raise unended()
        self._check_plan(tuple(plan), len(roles))
        return tuple(plan)

    def _check_plan(self, plan: Plan, messages: int) -> None:
        """Piece by piece must give the ids of the whole text: a tokenizer that looks across its specials is refused."""
        contents = [f"Probe {i}, as plain as it gets." for i in range(messages)]
        queue = Queue(self._text, offsets=False)
        self._check_pieces(fill_plan(plan, contents, queue, trained=frozenset()), queue)

    def _check_pieces(self, pieces: list[Piece], queue: Queue) -> None:
        queue.run()
        # Asked through transformers, which says how specials are to be read: the backend keeps what was last said.
        text = text_of(pieces)
        whole = self.tokenizer(text, verbose=False, add_special_tokens=False, split_special_tokens=False)[
            "input_ids"
        ]
        if whole != self._join(pieces, queue).ids.tolist():
            raise InputError("this tokenizer reads text differently beside its special tokens (lstrip, rstrip or "
                             "single_word in tokenizer.json), which is not supported")  # fmt: skip

    # ---- encoding -----------------------------------------------------------------------------------------------

    def _cut(self, conversations: Sequence[Conversation], queue: Queue) -> list[list[Piece]]:
        """The pieces of every conversation, with those that need tokenising put into the queue."""
        chats = {i: row for i, row in enumerate(conversations) if not isinstance(row, str)}
        for i, messages in chats.items():
            answers = [m for m in messages if m["role"] == "assistant"]
            if self.train_on == "assistant" and not any(
                m["content"].strip() or "tool_calls" in m for m in answers
            ):
                raise ConversationError(
                    i, "no assistant turn in it has any text, so nothing in it would be trained"
                )
            chats[i] = self.template.keep_system(messages)
        places = [i for i, messages in chats.items() if not has_tools(messages)]
        try:
            texts = self.template.render([chats[i] for i in places]) if places else []
            rendered = dict(zip(places, texts, strict=True))
        except ConversationError as error:
            raise ConversationError(places[error.index], error.reason) from None
        cut = []
        for i, row in enumerate(conversations):
            try:
                if isinstance(row, str):
                    if not row:
                        raise InputError("its text is empty, so nothing in it would be trained")
                    cut.append([queue.put_document(row)])
                elif i in rendered:
                    cut.append(self._cut_conversation(chats[i], rendered[i], queue))
                else:
                    cut.append(self._cut_with_tools(chats[i], queue))
            except InputError as error:
                raise ConversationError(i, str(error)) from None
        return cut

    def _cut_conversation(
        self, messages: list[Message], rendered: str, queue: Queue, *, generation: bool = False
    ) -> list[Piece]:
        roles = tuple(message["role"] for message in messages)
        assistant = frozenset(i for i, role in enumerate(roles) if role == "assistant")
        plan = self._plan(roles, generation=generation)
        contents = [message["content"] for message in messages]
        pieces = fill_plan(plan, contents, queue, trained=assistant)
        if text_of(pieces) != rendered:
            raise self.template.rewritten(roles, contents, rendered, generation=generation)
        if not generation and self.train_on == "assistant" and roles not in self._consistent:
            self._check_beginnings(roles)
        return pieces

    def _check_beginnings(self, roles: tuple[str, ...]) -> None:
        """Refuses a template that shows the beginning of a conversation otherwise than as a conversation of its own.

        Each answer has to be learned after the text after which it will be asked for. (Mistral v0.3's system message,
        the one exception, is a part of the last user message by now.)
        """
        plan, layout = self._plan(roles), self.template.layout(roles)
        for k in [i for i, role in enumerate(roles) if role == "assistant"]:
            beginning = self._plan(roles[: k + 1])
            end = 1 + max(i for i, step in enumerate(beginning) if isinstance(step, Piece) and step.trained)
            asked = self.template.layout(roles[:k], generation=True)
            if plan[:end] != beginning[:end] or not begins(layout, asked):
                raise changes_what_it_has_shown(k)
        self._consistent.add(roles)

    @cached_property
    def _turn_end(self) -> str:
        """The special token that ends an assistant turn."""
        plan = self._plan(("user", "assistant"))
        return next(step.text for step in plan if isinstance(step, Piece) and step.trained)

    def _cut_with_tools(
        self, messages: list[Message], queue: Queue, *, generation: bool = False
    ) -> list[Piece]:
        messages = self._tools.with_ids(messages)
        spoken = self.train_on == "assistant" and not generation
        parts = self._tools.trace(messages, self._control_pattern, generation=generation, spoken=spoken)
        calling = frozenset(i for i, message in enumerate(messages) if "tool_calls" in message)
        return cut_parts(parts, calling, self._turn_end, self._controls, queue)

    def _join(self, pieces: Sequence[Piece], queue: Queue, *, document: bool = False) -> Encoded:
        everything = document or self.train_on == "all"
        ids: list[int] = []
        ranges: list[tuple[int, int]] = []
        for piece in pieces:
            start = len(ids)
            ids += queue.ids(piece)
            if piece.trained:
                ranges.append((start, len(ids)))
            elif piece.spans and not everything:
                ranges += [(start + a, start + b) for a, b in queue.trained_ranges(piece)]
        if document and self._eos is not None and ids[-1:] != [self._eos]:
            ids.append(self._eos)
        trained = np.full(len(ids), everything)
        for a, b in ranges:
            trained[a:b] = True
        return Encoded(np.array(ids, np.int32), trained)
