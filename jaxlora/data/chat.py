"""Conversations to token ids, and which of them are trained: the model's own chat template and tokenizer.

The trained tokens are each assistant turn's content and the token that ends the turn. They are found from the
template (see `template.py`), never by searching the text, and text inside messages never becomes a special token:
the rendering is cut at the special tokens that the template itself wrote, and everything between two of them is
tokenised with the parsing of special tokens switched off.
"""

import hashlib
import json
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxlora.core.errors import InputError
from jaxlora.data.sources import Conversation, Message, check_order
from jaxlora.data.template import ChatTemplate, ConversationError, Slot

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
    """One example: ids int32 [n], and trained bool [n], true where the id is to be learned."""

    ids: np.ndarray
    trained: np.ndarray


class _Piece(NamedTuple):
    """A piece of one rendered conversation, between two cuts: its ids are known, or come by a ticket of the queue."""

    text: str
    ids: Sequence[int] = ()
    ticket: tuple[str, int] | None = None
    spans: tuple[tuple[int, int], ...] = ()  # characters of `text` that are trained
    trained: bool = False  # all of it is


@dataclass(frozen=True)
class _Run:
    """What stands between two special tokens and holds at least one message; tokenised as one piece."""

    parts: tuple[str | Slot, ...]
    first: bool  # nothing stands before it: some tokenizers put a space there, and only there


_Plan = tuple[_Piece | _Run, ...]
"""A layout, cut at its special tokens; what holds no message is known in advance."""


def load_tokenizer(path: str, revision: str = "") -> "PreTrainedTokenizerBase":
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
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found" is no news here
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    folder = Path(path).expanduser()
    local = folder.exists() or path.startswith(("/", "./", "../", "~"))
    if local and not folder.is_dir():
        raise InputError(f"{path} is no folder; model.path takes a Hugging Face id or a model's folder")
    if local and not (folder / "tokenizer.json").exists():
        raise InputError(f"{path} holds no tokenizer.json; copy the tokenizer's files of the model into it")
    name, options = str(folder) if local else path, {"revision": revision} if revision and not local else {}
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

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", train_on: str = "assistant"):
        self.tokenizer, self.train_on = tokenizer, train_on
        self._backend: Tokenizer = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        self._template: ChatTemplate | None = None
        self._no_template: InputError | None = None
        try:
            self._template = ChatTemplate(tokenizer)
        except InputError as error:  # rows of text need none, so this is said when a conversation comes
            self._no_template = error
        serialised = self._backend.to_str()
        self._controls = self._find_controls(json.loads(serialised)["added_tokens"])
        self._control_pattern = _any_of(self._controls)
        self._first, self._later = _text_tokenizers(serialised, self._controls)
        self._spaces_begin_words = _spaces_begin_words(serialised)
        self._plans: dict[tuple[tuple[str, ...], bool], _Plan] = {}
        template = self._template.source if self._template else ""
        known = [serialised, template, train_on, json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)]
        self.fingerprint = hashlib.sha256("\0".join(known).encode()).hexdigest()[:32]

    @property
    def template(self) -> ChatTemplate:
        """The chat template; InputError where the tokenizer has none."""
        if self._template is None:
            raise self._no_template or InputError("the tokenizer has no chat template")
        return self._template

    @property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """The ids at which an answer ends: the template's end of an assistant turn, and the tokenizer's eos."""
        ends = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]
        if self._template is not None:
            plan = self._plan(("user", "assistant"))
            ends = [step.ids[0] for step in plan if isinstance(step, _Piece) and step.trained] + ends
        return tuple(dict.fromkeys(ends))

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Encodes conversations, and plain texts (every token trained, closed by eos), on all cores.

        Raises:
            ConversationError: a conversation that cannot be encoded faithfully, or has nothing to train.
        """
        queue = _Queue(self._first, self._later, offsets=self.train_on == "assistant")
        cut = self._cut(conversations, queue)
        queue.run()
        return [self._join(pieces, queue, isinstance(row, str)) for pieces, row in zip(cut, conversations, strict=True)]

    def encode_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """The ids [n] int32 after which the assistant answers: the conversation and an opened assistant turn.

        Raises:
            InputError: turns in an impossible order, or a template that does not show them faithfully.
        """
        check_order(messages)
        queue = _Queue(self._first, self._later, offsets=False)
        pieces = self._cut_conversation(messages, self._render([messages], generation=True)[0], queue, generation=True)
        queue.run()
        return self._join(pieces, queue, False).ids

    # ---- planning: once for a sequence of roles -----------------------------------------------------------------

    def _find_controls(self, added_tokens: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """The tokens that text must never become: all special ones, and added ones the template itself writes."""
        controls = {token["content"]: token["id"] for token in added_tokens if token["special"]}
        others = {token["content"]: token["id"] for token in added_tokens if not token["special"]}
        if self._template is not None and others:
            for roles in [("user", "assistant"), ("system", "user", "assistant")]:
                try:
                    layout = self._template.layout(roles)
                except InputError:
                    continue  # not every template takes a system message
                written = "\0".join(part for part in layout if isinstance(part, str))
                controls |= {token: others[token] for token in _any_of(others).findall(written)}
        return controls

    def _plan(self, roles: tuple[str, ...], *, generation: bool = False) -> _Plan:
        if (roles, generation) not in self._plans:
            self._plans[roles, generation] = self._make_plan(roles, generation)
        return self._plans[roles, generation]

    def _make_plan(self, roles: tuple[str, ...], generation: bool) -> _Plan:
        """Cuts the layout at its special tokens, and finds the one that ends each assistant turn."""
        plan: list[_Piece | _Run] = []
        run: list[str | Slot] = []
        open_turn = False

        def close_run() -> None:
            if any(isinstance(part, Slot) for part in run):
                plan.append(_Run(tuple(run), first=not plan))
            elif run:
                text = "".join(map(str, run))
                tokenizer = self._later if plan else self._first
                plan.append(_Piece(text, tokenizer.encode(text, add_special_tokens=False).ids))
            run.clear()

        unended = InputError("the chat template does not end the assistant's turns with a special token, so the "
                             "model could not learn to stop; use a template that does")  # fmt: skip
        for part in self.template.layout(roles, generation=generation):
            if isinstance(part, Slot):
                if open_turn:
                    raise unended
                open_turn = roles[part.message] == "assistant"
                run.append(part)
                continue
            for piece in self._control_pattern.split(part):
                if piece in self._controls:
                    close_run()
                    plan.append(_Piece(piece, (self._controls[piece],), trained=open_turn))
                    open_turn = False
                elif piece:
                    run.append(piece)
        close_run()
        if open_turn:
            raise unended
        self._check_plan(tuple(plan), len(roles))
        return tuple(plan)

    def _check_plan(self, plan: _Plan, messages: int) -> None:
        """Piece by piece must give the ids of the whole text: a tokenizer that looks across its specials is refused."""
        contents = [f"Probe {i}, as plain as it gets." for i in range(messages)]
        queue = _Queue(self._first, self._later, offsets=False)
        pieces = _fill(plan, contents, queue, trained=frozenset())
        queue.run()
        whole = self._backend.encode(_text_of(pieces), add_special_tokens=False)
        if whole.ids != self._join(pieces, queue, False).ids.tolist():
            raise InputError("this tokenizer reads text differently beside its special tokens (lstrip, rstrip or "
                             "single_word in tokenizer.json), which is not supported")  # fmt: skip

    # ---- encoding -----------------------------------------------------------------------------------------------

    def _render(self, conversations: Sequence[Sequence[Message]], *, generation: bool = False) -> list[str]:
        return self.template.render(conversations, generation=generation)

    def _cut(self, conversations: Sequence[Conversation], queue: "_Queue") -> list[list[_Piece]]:
        """The pieces of every conversation, with those that need tokenising put into the queue."""
        chats = {i: row for i, row in enumerate(conversations) if not isinstance(row, str)}
        for i, messages in chats.items():
            if self.train_on == "assistant" and not any(m["role"] == "assistant" and m["content"] for m in messages):
                raise ConversationError(i, "it has no assistant turn with any text, so nothing in it would be trained")
            chats[i] = self.template.keep_system(messages)  # type: ignore[assignment]
        places = list(chats)
        try:
            rendered = dict(zip(places, self._render(list(chats.values())) if chats else [], strict=True))
        except ConversationError as error:
            raise ConversationError(places[error.index], error.reason) from None
        cut = []
        for i, row in enumerate(conversations):
            if isinstance(row, str):
                if not row:
                    raise ConversationError(i, "its text is empty, so nothing in it would be trained")
                cut.append([queue.put_document(row)])
                continue
            try:
                cut.append(self._cut_conversation(chats[i], rendered[i], queue))
            except InputError as error:
                raise ConversationError(i, str(error)) from None
        return cut

    def _cut_conversation(
        self, messages: Sequence[Message], rendered: str, queue: "_Queue", *, generation: bool = False
    ) -> list[_Piece]:
        roles = tuple(message["role"] for message in messages)
        assistant = frozenset(i for i, role in enumerate(roles) if role == "assistant")
        plan = self._plan(roles, generation=generation)
        pieces = _fill(plan, [message["content"] for message in messages], queue, trained=assistant)
        if _text_of(pieces) != rendered:
            raise InputError("the chat template rewrites the text of this conversation's messages, so what is "
                             "trained cannot be told from what is not")  # fmt: skip
        return pieces

    def _join(self, pieces: Sequence[_Piece], queue: "_Queue", document: bool) -> Encoded:
        ids: list[int] = []
        ranges: list[tuple[int, int]] = []
        for piece in pieces:
            start = len(ids)
            ids += piece.ids if piece.ticket is None else queue.ids(piece.ticket)
            if piece.trained:
                ranges.append((start, len(ids)))
            elif piece.spans and piece.ticket and self.train_on == "assistant":
                spans = _with_word_starts(piece) if self._spaces_begin_words else piece.spans
                ranges += [(start + a, start + b) for a, b in queue.token_ranges(piece.ticket, spans)]
        if document and self.tokenizer.eos_token_id is not None and ids[-1:] != [self.tokenizer.eos_token_id]:
            ids.append(int(self.tokenizer.eos_token_id))
        everything = document or self.train_on == "all"
        trained = np.full(len(ids), everything)
        for a, b in ranges:
            trained[a:b] = True
        return Encoded(np.array(ids, np.int32), trained)


def _fill(plan: _Plan, contents: Sequence[str], queue: "_Queue", *, trained: frozenset[int]) -> list[_Piece]:
    pieces = []
    for step in plan:
        if isinstance(step, _Piece):
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
            text, whole = "".join(texts), spans == [(0, at)]
            ticket = queue.put(text, first=step.first, offsets=bool(spans) and not whole)
            pieces.append(_Piece(text, ticket=ticket, spans=() if whole else tuple(spans), trained=whole))
    return pieces


def _text_of(pieces: Sequence[_Piece]) -> str:
    return "".join([piece.text for piece in pieces])


def _with_word_starts(piece: _Piece) -> list[tuple[int, int]]:
    """The spans, each with the one space in front of it."""
    return [(start - (piece.text[:start][-1:] == " "), stop) for start, stop in piece.spans]


class _Queue:
    """Texts to be tokenised together: each different text once, character offsets only where they are needed."""

    def __init__(self, first: "Tokenizer", later: "Tokenizer", *, offsets: bool):
        self._tokenizers = {"first": first, "later": later, "document": first}
        self._offsets_wanted = offsets
        self._texts: dict[str, dict[str, int]] = {}
        self._encodings: dict[str, list[Any]] = {}
        self._ids: dict[tuple[str, int], list[int]] = {}

    def put(self, text: str, *, first: bool, offsets: bool) -> tuple[str, int]:
        group = ("first" if first else "later") + ("+offsets" if offsets and self._offsets_wanted else "")
        texts = self._texts.setdefault(group, {})
        return group, texts.setdefault(text, len(texts))

    def put_document(self, text: str) -> _Piece:
        texts = self._texts.setdefault("document", {})
        return _Piece(text, ticket=("document", texts.setdefault(text, len(texts))), trained=True)

    def run(self) -> None:
        for group, texts in self._texts.items():
            name, _, offsets = group.partition("+")
            tokenizer = self._tokenizers[name]
            encode = tokenizer.encode_batch if offsets else tokenizer.encode_batch_fast
            self._encodings[group] = encode(list(texts), add_special_tokens=name == "document")

    def ids(self, ticket: tuple[str, int]) -> list[int]:
        if ticket not in self._ids:
            self._ids[ticket] = self._encodings[ticket[0]][ticket[1]].ids
        return self._ids[ticket]

    def token_ranges(
        self, ticket: tuple[str, int], spans: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """The tokens that overlap each span of characters.

        A token that holds both template text and the first character of an answer ("▁The" after "[/INST]") is the
        token that the model must produce to begin that answer, so it is trained.
        """
        offsets = self._encodings[ticket[0]][ticket[1]].offsets
        return [
            (bisect_right(offsets, start, key=lambda o: o[1]), bisect_left(offsets, stop, key=lambda o: o[0]))
            for start, stop in spans
        ]


def _any_of(tokens: Mapping[str, int]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest where one begins with another; splitting by it keeps them."""
    return re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")" if tokens else r"(?!)()")


def _text_tokenizers(serialised: str, controls: Mapping[str, int]) -> tuple["Tokenizer", "Tokenizer"]:
    """Two copies of the tokenizer to which the controls are plain text: for a text's beginning, and for later pieces.

    They differ where a tokenizer puts a space before the first word of a text only (Metaspace "first"): to such a
    tokenizer, a piece from the middle that is handed over on its own would look like a beginning.
    """
    from tokenizers import Tokenizer

    state = json.loads(serialised)
    state["truncation"] = state["padding"] = None
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["content"] in controls
    for node in _nodes(state["post_processor"]):
        if "trim_offsets" in node:
            node["trim_offsets"] = False  # a token's white space counts as its text
    first = _as_text(Tokenizer.from_str(json.dumps(state)))
    spaced = [node for node in _nodes(state["pre_tokenizer"]) if node.get("prepend_scheme") == "first"]
    if not spaced:
        return first, first
    for node in spaced:
        node["prepend_scheme"] = "never"
    return first, _as_text(Tokenizer.from_str(json.dumps(state)))


def _spaces_begin_words(serialised: str) -> bool:
    """Whether the tokenizer is one of the sentencepiece kind, to which a space is the beginning of the next word.

    There the space that a template writes before an answer is the answer's first piece or a part of it: "▁The" is one
    piece, and "▁3" is two only because the vocabulary has no such word. The model has to produce it either way.
    """
    state = json.loads(serialised)
    return "▁" in json.dumps([state["normalizer"], state["pre_tokenizer"]], ensure_ascii=False)


def _as_text(tokenizer: "Tokenizer") -> "Tokenizer":
    tokenizer.encode_special_tokens = True
    return tokenizer


def _nodes(tree: Any) -> list[dict[str, Any]]:
    """Every dict in a JSON tree."""
    if isinstance(tree, dict):
        return [tree, *(node for child in tree.values() for node in _nodes(child))]
    return [node for child in tree for node in _nodes(child)] if isinstance(tree, list) else []
