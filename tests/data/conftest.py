"""Tiny tokenizers and files made on the spot, so that this room's tests stand without any real model."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jaxlora.data.chat import ChatEncoder

CORPUS = [
    "What is two plus two? It is four. The capital of France is Paris, and nobody knows why.",
    "user assistant system message answer question hello world 0 1 2 3 4 5 6 7 8 9",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mistral v0.3's: the system message comes with the last user message, and only if that is the last of all; the
# assistant's content is trimmed.
LATE_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)

# In the manner of Qwen2.5's: tools in the system message, calls as JSON between tags that are tokens, no ids.
CHATML_TOOLS = (
    "{% set system = messages[0].content if messages[0].role == 'system' else 'Help.' %}"
    "{{ '<|im_start|>system\n' + system }}{% for tool in tools or [] %}"
    "{{ ('\n# Tools, called by <tool_call></tool_call>' if loop.first else '') + '\n' + tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ '<|im_start|>user\n<result>' + m.content + '</result><|im_end|>\n' }}"
    "{% elif m.role != 'system' %}{{ '<|im_start|>' + m.role }}"
    "{% if m.content or not m.tool_calls %}{{ '\n' + m.content }}{% endif %}{% for call in m.tool_calls or [] %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# In the manner of Mistral v0.3's: the tools stand before the last user message, calls need ids of nine characters, and
# a turn that calls has no text.
LATE_TOOLS = (
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}"
    "{% if tools and m == users[-1] %}{{ '[TOOLS] ' + tools | tojson + '[/TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[CALLS] [' }}{% for call in m.tool_calls %}"
    "{% if not call.id or call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    "{{ (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' + (']' if loop.last else ', ') }}{% endfor %}"
    "{{ eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[RESULT] {\"content\": ' + m.content }}"
    "{{ ', \"id\": \"' + m.tool_call_id + '\"}[/RESULT]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"
)
TOOL_TAGS = ("<tool_call>", "</tool_call>")

Conversation = list[dict[str, Any]]


def talk(*contents: str, system: str | None = None) -> Conversation:
    """Contents of user and assistant in turn, after an optional system message."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


def byte_level(template: str | None = CHATML, added: tuple[AddedToken, ...] = ()) -> PreTrainedTokenizerBase:
    """A byte-level BPE of a few hundred pieces, as Qwen's, with ChatML's special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # Offsets that leave white space out, as many published tokenizers have them.
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))  # type: ignore[call-arg]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_tokens([*(AddedToken(token, special=True, normalized=False) for token in special), *added])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def metaspace(template: str | None = LATE_SYSTEM) -> PreTrainedTokenizerBase:
    """A BPE in which spaces begin words, as Mistral's, with [INST] and [/INST] as special tokens."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    special += ["[TOOLS]", "[/TOOLS]", "[CALLS]", "[RESULT]", "[/RESULT]"]
    alphabet = ["\n", *map(chr, range(33, 127)), "▁"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)  # type: ignore[call-arg]
    backend.train_from_iterator(["▁".join(["", *text.split()]) for text in CORPUS], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def spell(encoder: ChatEncoder, ids: list[int]) -> str:
    """What ids say, with every special token and every space."""
    if "<s>" not in encoder.tokenizer.all_special_tokens:
        return encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    pieces = encoder.tokenizer.convert_ids_to_tokens(ids)  # the decoder drops spaces at beginnings
    raw = [bytes([int(p[3:5], 16)]) if re.fullmatch("<0x..>", p) else p.encode() for p in pieces]
    return b"".join(raw).decode(errors="replace").replace("▁", " ")


def trained_texts(encoder: ChatEncoder, encoded: Any) -> list[str]:
    """What each unbroken stretch of trained tokens says, special tokens included."""
    texts: list[str] = []
    stretch: list[int] = []
    for id, trained in [*zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True), (0, False)]:
        if trained:
            stretch.append(id)
        elif stretch:
            texts.append(encoder.tokenizer.decode(stretch, clean_up_tokenization_spaces=False))
            stretch = []
    return texts


@pytest.fixture(scope="session")
def chatml() -> ChatEncoder:
    return ChatEncoder(byte_level())


@pytest.fixture(scope="session")
def mistral_like() -> ChatEncoder:
    return ChatEncoder(metaspace())


@pytest.fixture(scope="session")
def chatml_tools() -> ChatEncoder:
    tags = tuple(AddedToken(tag, special=False, normalized=False) for tag in TOOL_TAGS)
    return ChatEncoder(byte_level(CHATML_TOOLS, tags))


@pytest.fixture(scope="session")
def mistral_tools() -> ChatEncoder:
    return ChatEncoder(metaspace(LATE_TOOLS))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """write("a.jsonl", row, row, ...) -> the path; a str is written as it is, anything else as a line of JSON."""

    def write(name: str, *rows: Any) -> str:
        path = tmp_path / name
        path.write_text(
            "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows), encoding="utf-8"
        )
        return str(path)

    return write


@pytest.fixture(scope="session", name="talk")
def _talk() -> Callable[..., Conversation]:
    return talk


@pytest.fixture(scope="session", name="byte_level")
def _byte_level() -> Callable[..., PreTrainedTokenizerBase]:
    return byte_level


@pytest.fixture(scope="session", name="metaspace")
def _metaspace() -> Callable[..., PreTrainedTokenizerBase]:
    return metaspace


@pytest.fixture(scope="session", name="spell")
def _spell() -> Callable[[ChatEncoder, list[int]], str]:
    return spell


@pytest.fixture(scope="session", name="trained_texts")
def _trained_texts() -> Callable[[ChatEncoder, Any], list[str]]:
    return trained_texts
