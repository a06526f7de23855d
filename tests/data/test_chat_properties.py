"""What holds for every conversation and every template: nothing in a text moves the mask or makes a special token."""

import json
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlora.data.chat import ChatEncoder, load_tokenizer

# What is special in some template or other, pieces of it, and what templates trim, escape or take for JSON.
SPECIAL = [
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "</s>",
    "<s>",
    "[INST]",
    "[/INST]",
    "[CALLS]",
    "[TOOL_CALLS]",
]
TAGS = [
    "<tool_call>",
    "</tool_call>",
    "[TOOLS]",
    "[TOOL_RESULTS]",
    "<result>",
    "<tool_response>",
    "slot000000open",
]
PLAIN = ["<|im_", "end|>", "[/", "INST]", " ", "  ", "\n", "\n\n", "a", "B", "b is", ".", "{", '"', "\\", "0"]
BEYOND = [
    "🙂",
    "é",
    "e\u0301",
    "好",
    "\t",
    "\u200b",
    "\r\n",
    "\xa0",
    "'",
    "%",
    "{{ 1 }}",
    "▂",
]  # no tiny vocabulary has these

TINY = ("chatml", "mistral_like", "chatml_tools", "mistral_tools")
REAL = ("qwen2.5", "mistral-v0.1", "mistral-v0.3")
EXAMPLES = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def texts(pieces):
    return st.lists(st.sampled_from(pieces), max_size=5).map("".join)


def talks(pieces):
    """Contents of user and assistant in turn, of which at least one answer says something; and a system message."""
    turns = st.lists(texts(pieces), min_size=2, max_size=6)
    return st.tuples(turns.filter(lambda t: any(text.strip() for text in t[1::2])), st.none() | texts(pieces))


def tool_talks(pieces):
    """Conversations in which tools are called, with texts and structures of all kinds."""
    text = texts(pieces)
    filled = text.filter(str.strip)
    leaf = text | st.integers(-5, 5) | st.booleans() | st.none() | st.floats(-2, 2).map(lambda x: round(x, 3))
    tree = st.recursive(
        leaf, lambda t: st.lists(t, max_size=2) | st.dictionaries(filled, t, max_size=2), max_leaves=3
    )
    arguments = st.dictionaries(st.sampled_from(["where", "n"]) | filled, tree, max_size=3)
    schema = st.builds(
        lambda name, description, key, enum: {
            "type": "function",
            "function": {
                "name": name,
                "description": description,
                "parameters": {
                    "type": "object",
                    "properties": {key: {"type": "string", "enum": enum}},
                    "required": [key],
                },
            },
        },
        filled,
        text,
        st.sampled_from(["where", "n"]) | filled,
        st.lists(text, min_size=1, max_size=2),
    )
    call = st.builds(
        lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
        filled,
        arguments,
    )
    exchange = st.tuples(text, st.lists(call, min_size=1, max_size=2), text, text)

    def messages(exchanges, tools):
        found = []
        for question, calls, result, answer in exchanges:
            found += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "", "tool_calls": calls},
                *[{"role": "tool", "content": result}] * len(calls),
                {"role": "assistant", "content": answer},
            ]
        return [found[0] | ({"tools": tools} if tools else {}), *found[1:]]

    return st.builds(messages, st.lists(exchange, min_size=1, max_size=2), st.lists(schema, max_size=2))


def harmless(tree, words=None):
    """The same conversation, with a plain word for every text; what was equal stays so (templates compare messages)."""
    words = {"": ""} if words is None else words
    if isinstance(tree, dict):
        kept = {"role", "type"}
        return {
            (key if key.replace("_", "").isalpha() else f"k{i}"): value
            if key in kept
            else harmless(value, words)
            for i, (key, value) in enumerate(tree.items())
        }
    if isinstance(tree, list):
        return [harmless(child, words) for child in tree]
    return words.setdefault(tree, f"word {len(words)}") if isinstance(tree, str) else tree


def specials(encoder, encoded):
    """The special tokens and the tags of tools among the ids, in their order."""
    tokenizer = encoder.tokenizer
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    wanted = {id for id, token in added.items() if token.special or "tool_call>" in token.content}
    return [id for id in encoded.ids.tolist() if id in wanted - {tokenizer.unk_token_id}]


def rendered(encoder, messages):
    """The template's own rendering, of the messages as they are placed for it."""
    placed = encoder._tools.with_ids(encoder.template.keep_system(messages))
    bare = [{key: value for key, value in m.items() if key != "tools"} for m in placed]
    return encoder.tokenizer.apply_chat_template(bare, tools=placed[0].get("tools"), tokenize=False)


def same_text(encoder, one, other):
    """Equal, or equal once the tokenizer has composed characters, as Qwen's does."""
    normalizer = encoder.tokenizer.backend_tokenizer.normalizer
    if normalizer is not None and "NFC" in str(normalizer):
        one, other = (unicodedata.normalize("NFC", text) for text in (one, other))
    return one == other


def spoken(encoder, encoded, spell):
    """What is trained: the text of every turn, each cut after the token that ends it."""
    turns, turn = [], []
    for id, trained in zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True):
        if trained:
            turn.append(id)
        if turn and (not trained or id in encoder.end_of_turn_ids):
            turns.append(spell(encoder, turn))
            turn = []
    return turns


def check(encoder, messages, turns, spell):
    """All that has to hold of one conversation in which the assistant says these turns."""
    encoded, tame = encoder.encode_batch([messages, harmless(messages)])
    assert same_text(encoder, spell(encoder, encoded.ids.tolist()), rendered(encoder, messages))
    assert specials(encoder, encoded) == specials(encoder, tame)
    end = encoder.tokenizer.eos_token
    found = spoken(encoder, encoded, spell)
    assert len(found) == len(turns)
    for text, turn in zip(found, turns, strict=True):
        # The first token of a turn may hold the white space that the template put before it.
        assert any(same_text(encoder, text, opening + turn + end) for opening in ("", " ", "\n"))


def check_plain(encoder, contents, system, spell):
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    answers = contents[1::2]
    if "content|trim" in encoder.template.source.replace(" ", "").replace('["content"]', ".content"):
        answers = [answer.strip() for answer in answers]
    check(encoder, messages, answers, spell)


def check_tools(encoder, messages, spell):
    """`json.dumps` writes calls as the templates do."""
    trims, turns = "trim" in encoder.template.source, []
    for message in encoder._tools.with_ids(messages):
        calls = [
            (c["function"]["name"], c["function"]["arguments"], c.get("id"))
            for c in message.get("tool_calls", ())
        ]
        if calls and encoder._tools.needs_ids:
            opening = "[TOOL_CALLS] [" if "[TOOL_CALLS]" in encoder.template.source else "[CALLS] ["
            written = [{"name": name, "arguments": arguments} for name, arguments, _ in calls]
            written = [json.dumps(call, ensure_ascii=False)[:-1] for call in written]
            turns.append(
                opening
                + ", ".join(f'{c}, "id": "{id}"}}' for c, (_, _, id) in zip(written, calls, strict=True))
                + "]"
            )
        elif calls:
            turns.append(
                "\n".join(
                    f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n'
                    "</tool_call>"
                    for name, arguments, _ in calls
                )
            )
        elif message["role"] == "assistant":
            turns.append(message["content"].strip() if trims else message["content"])
    check(encoder, messages, turns, spell)


# ---- tiny templates


@pytest.mark.parametrize("name", TINY)
@EXAMPLES
@given(talks(SPECIAL + TAGS + PLAIN))
def test_texts_change_neither_specials_nor_masks(name, request, spell, talk):
    contents, system = talk
    if name == "mistral_tools":  # its template takes no system message
        system = None
    check_plain(request.getfixturevalue(name), contents, system, spell)


@pytest.mark.parametrize("name", ["chatml", "chatml_tools"])
@EXAMPLES
@given(talks(SPECIAL + PLAIN + BEYOND))
def test_nor_does_anything_beyond_the_alphabet(name, request, spell, talk):
    check_plain(request.getfixturevalue(name), *talk, spell)


@pytest.mark.parametrize("name", ["chatml_tools", "mistral_tools"])
@EXAMPLES
@given(tool_talks(SPECIAL + TAGS + PLAIN))
def test_nor_does_anything_in_tools_calls_and_results(name, request, spell, messages):
    check_tools(request.getfixturevalue(name), messages, spell)


@pytest.mark.parametrize("name", TINY)
@EXAMPLES
@given(talks(SPECIAL + PLAIN))
def test_a_prompt_is_what_stands_before_the_answer(name, request, talk):
    encoder = request.getfixturevalue(name)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(talk[0])]
    (encoded,) = encoder.encode_batch([messages])
    for k in range(1, len(messages), 2):
        if (
            "mistral" not in name or messages[k]["content"].strip()
        ):  # nothing is trained of an empty answer but its end
            prompt = encoder.encode_prompt(messages[:k])
            assert encoded.ids[: len(prompt)].tolist() == prompt.tolist()
            assert encoded.trained[len(prompt)]


# ---- real ones


@pytest.fixture(scope="module")
def encoders(real):
    return {name: ChatEncoder(load_tokenizer(str(real / "tokenizers" / name))) for name in REAL}


@pytest.mark.parametrize("name", REAL)
@EXAMPLES
@given(talks(SPECIAL + TAGS + PLAIN + BEYOND))
def test_real_texts_change_neither_specials_nor_masks(name, encoders, spell, talk):
    check_plain(encoders[name], *talk, spell)


@pytest.mark.parametrize("name", ["qwen2.5", "mistral-v0.3"])
@EXAMPLES
@given(tool_talks(SPECIAL + TAGS + PLAIN + BEYOND))
def test_nor_does_anything_in_real_tools_calls_and_results(name, encoders, spell, messages):
    check_tools(encoders[name], messages, spell)
