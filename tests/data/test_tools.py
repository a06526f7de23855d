"""Conversations with tools: what is trained, what stays text, and that nothing is lost without a word."""

import json

import pytest
from tokenizers import AddedToken

from jaxlora.core.errors import InputError
from jaxlora.data.chat import ChatEncoder
from jaxlora.data.template import ConversationError

LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": 'Looks "there"',
        "parameters": {
            "type": "object",
            "properties": {"where": {"type": "string", "enum": ["in", "out"]}, "times": {"type": "integer"}},
            "required": ["where"],
        },
    },
}


def call(name="look", id=None, **arguments):
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made | ({"id": id} if id else {})


def calling(*calls, content=""):
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(content, **more):
    return {"role": "tool", "content": content, **more}


def user(content, tools=None):
    return {"role": "user", "content": content} | ({"tools": tools} if tools else {})


def said(content):
    return {"role": "assistant", "content": content}


TALK = [
    user("Is it sunny?", [LOOK]),
    calling(call(where="out", times=2), call(where="in")),
    result("yes"),
    result("no"),
    said("Only outside."),
    user("And now?"),
    calling(call(where="out")),
    result("still"),
    said("Still."),
]


def whole(encoder, messages):
    """The template's own rendering."""
    bare = [{key: value for key, value in m.items() if key != "tools"} for m in messages]
    return encoder.tokenizer.apply_chat_template(bare, tools=messages[0].get("tools"), tokenize=False)


def stretches(encoder, encoded, spell):
    """What every stretch of trained tokens says, cut after each token that ends a turn."""
    found, stretch = [], []
    for id, trained in zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True):
        if trained:
            stretch.append(id)
        if stretch and (not trained or id in encoder.end_of_turn_ids):
            found.append(spell(encoder, stretch))
            stretch = []
    return found


# ---- what is trained


def test_calls_and_answers_are_trained_and_nothing_else(chatml_tools, spell):
    (encoded,) = chatml_tools.encode_batch([TALK])
    assert spell(chatml_tools, encoded.ids.tolist()) == whole(chatml_tools, TALK)
    assert stretches(chatml_tools, encoded, spell) == [
        '<tool_call>\n{"name": "look", "arguments": {"where": "out", "times": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "look", "arguments": {"where": "in"}}\n</tool_call><|im_end|>',
        "Only outside.<|im_end|>",
        '<tool_call>\n{"name": "look", "arguments": {"where": "out"}}\n</tool_call><|im_end|>',
        "Still.<|im_end|>",
    ]


def test_the_ids_are_those_of_the_rendered_text(chatml_tools):
    (encoded,) = chatml_tools.encode_batch([TALK])
    text = whole(chatml_tools, TALK)
    assert encoded.ids.tolist() == chatml_tools.tokenizer.encode(text, add_special_tokens=False)


def test_a_turn_may_speak_and_call(chatml_tools, spell):
    messages = [
        user("?", [LOOK]),
        calling(call(where="in"), content=" Let me see.\n"),
        result("x"),
        said("y"),
    ]
    (encoded,) = chatml_tools.encode_batch([messages])
    assert stretches(chatml_tools, encoded, spell)[0] == (
        ' Let me see.\n\n<tool_call>\n{"name": "look", "arguments": {"where": "in"}}\n</tool_call><|im_end|>'
    )


def test_calls_alone_are_something_to_train(chatml_tools, spell):
    (encoded,) = chatml_tools.encode_batch([[user("?", [LOOK]), calling(call(where="in"))]])
    assert len(stretches(chatml_tools, encoded, spell)) == 1


def test_calls_get_the_ids_that_a_template_needs(mistral_tools, spell):
    (encoded,) = mistral_tools.encode_batch([TALK])
    first = '{"name": "look", "arguments": {"where": "out", "times": 2}, "id": "call00001"}'
    assert stretches(mistral_tools, encoded, spell) == [
        f'[CALLS] [{first}, {{"name": "look", "arguments": {{"where": "in"}}, "id": "call00002"}}]</s>',
        " Only outside.</s>",
        '[CALLS] [{"name": "look", "arguments": {"where": "out"}, "id": "call00003"}]</s>',
        " Still.</s>",
    ]
    text = spell(mistral_tools, encoded.ids.tolist())
    assert 'yes, "id": "call00001"' in text
    assert 'no, "id": "call00002"' in text
    assert text.split("[TOOLS]")[0].endswith(
        "Only outside.</s>"
    )  # with the last user message, and only there


def test_given_ids_are_kept(mistral_tools, chatml_tools, spell):
    messages = [
        user("?", [LOOK]),
        calling(call(id="abcdefgh1", where="in")),
        result("x", tool_call_id="abcdefgh1"),
    ]
    (encoded,) = mistral_tools.encode_batch([messages])
    assert spell(mistral_tools, encoded.ids.tolist()).count("abcdefgh1") == 2


def test_wrong_ids_are_refused_with_the_remedy(mistral_tools):
    messages = [user("?", [LOOK]), calling(call(id="call_1", where="in")), result("x", tool_call_id="call_1")]
    with pytest.raises(
        ConversationError, match=r"ids have 9 characters; .*without any id, its calls and results are numb"
    ):
        mistral_tools.encode_batch([messages])
    with pytest.raises(ConversationError, match="message 4 is one result more than there are calls"):
        mistral_tools.encode_batch([[user("?", [LOOK]), calling(call(where="in")), result("x"), result("y")]])


def test_all_trains_every_token(chatml_tools):
    encoder = ChatEncoder(chatml_tools.tokenizer, train_on="all")
    (encoded,) = encoder.encode_batch([TALK])
    assert encoded.trained.all()
    assert encoded.ids.tolist() == chatml_tools.encode_batch([TALK])[0].ids.tolist()


@pytest.mark.parametrize("end", [1, 4, 6, 8])
def test_a_prompt_is_the_beginning_of_the_conversation_it_asks_for(end, chatml_tools):
    (encoded,) = chatml_tools.encode_batch([TALK])
    prompt = chatml_tools.encode_prompt(TALK[:end])
    assert encoded.ids[: len(prompt)].tolist() == prompt.tolist()
    assert encoded.trained[len(prompt)]
    assert not encoded.trained[len(prompt) - 1]


def test_a_batch_may_mix_conversations_with_and_without_tools(chatml_tools, talk):
    rows = [talk("a", "b"), TALK, "text", [user("?", [LOOK]), said("no")], talk("c", "d")]
    alone = [chatml_tools.encode_batch([row])[0] for row in rows]
    for one, other in zip(alone, chatml_tools.encode_batch(rows), strict=True):
        assert (one.ids.tolist(), one.trained.tolist()) == (other.ids.tolist(), other.trained.tolist())
    with pytest.raises(ConversationError) as error:
        chatml_tools.encode_batch([*rows, [user("?", [LOOK]), said("")]])
    assert error.value.index == 5


@pytest.mark.parametrize(
    "contents", [("a", "b"), ("x", " y\n", "z", ""), ("say <tool_call>", "<|im_end|>", "c", "d")]
)
def test_without_tools_both_ways_of_encoding_agree(
    contents, chatml, mistral_like, chatml_tools, talk, monkeypatch
):
    for encoder in (chatml, mistral_like, chatml_tools):
        row = talk(*contents)
        (plain,) = encoder.encode_batch([row])
        with monkeypatch.context() as patch:
            patch.setattr("jaxlora.data.chat.has_tools", lambda _: True)
            (traced,) = encoder.encode_batch([row])
        assert plain.ids.tolist() == traced.ids.tolist()
        assert plain.trained.tolist() == traced.trained.tolist()


# ---- text stays text


NASTY = '<|im_end|>\n<tool_call></tool_call>"\\</s>[CALLS]'


def test_special_tokens_in_schemas_calls_and_results_stay_text(chatml_tools, mistral_tools, spell):
    def conversation(text):
        function = {**LOOK["function"], "description": text, "name": text}
        return [
            user(text, [{"type": "function", "function": function}]),
            calling(call(name=text, where=text, more=[text, {"deep": text}], **{text: 1})),
            result(text),
            said(text),
        ]

    for encoder in (chatml_tools, mistral_tools):
        nasty, plain = encoder.encode_batch([conversation(NASTY), conversation("words")])
        assert spell(encoder, nasty.ids.tolist()) == spell(encoder, encoder.tokenizer.encode(
            whole(encoder, encoder._tools.with_ids(conversation(NASTY))), add_special_tokens=False
        ))  # fmt: skip
        tokens = [*encoder.tokenizer.all_special_tokens, "<tool_call>", "</tool_call>"]
        specials = set(encoder.tokenizer.convert_tokens_to_ids(tokens)) - {encoder.tokenizer.unk_token_id}
        assert [id for id in nasty.ids if id in specials] == [id for id in plain.ids if id in specials]


def test_a_tag_in_a_plain_message_is_text_where_the_template_calls_with_it(chatml_tools, talk):
    (encoded,) = chatml_tools.encode_batch([talk("say <tool_call>", "<tool_call>")])
    assert chatml_tools.tokenizer.convert_tokens_to_ids("<tool_call>") not in encoded.ids


def test_a_special_token_in_an_id_is_refused_or_text(mistral_tools, spell):
    messages = [
        user("?", [LOOK]),
        calling(call(id="abc[INST]", where="in")),
        result("x", tool_call_id="abc[INST]"),
    ]
    with pytest.raises(
        ConversationError, match="does not render"
    ):  # with marks in it, it is longer than nine
        mistral_tools.encode_batch([messages])


# ---- nothing is lost


def encoder_of(byte_level, template):
    tags = [AddedToken(tag, special=False, normalized=False) for tag in ("<tool_call>", "</tool_call>")]
    return ChatEncoder(byte_level(template, tuple(tags)))


def test_a_template_without_tools_refuses_them(chatml, mistral_like):
    for encoder in (chatml, mistral_like):
        with pytest.raises(
            ConversationError, match="it has tools, which the model's chat template does not show"
        ) as e:
            encoder.encode_batch([[user("a"), said("b")], [user("?", [LOOK]), said("no")]])
        assert e.value.index == 1
        assert "leaves out the description of the tools" in e.value.reason
        assert "use a model whose template does" in e.value.reason
        with pytest.raises(ConversationError, match="does not show"):
            encoder.encode_batch([[user("?"), calling(call(where="in")), result("x"), said("y")]])


@pytest.mark.parametrize(
    ("old", "new", "said_"),
    [
        ("tool | tojson", "tool.function.name", "leaves out the description of the tools"),
        ("call.function.name", "'look'", "leaves out the call of a tool in message 2"),
        ("call.function.arguments | tojson", "'{}'", "leaves out the call of a tool in message 2"),
        (
            "'\\n' + m.content",
            "'\\n' + ('' if m.tool_calls else m.content)",
            "leaves out the text of the assistant's message 2, which calls a tool as well",
        ),
        ("'<result>' + m.content", "'<result>'", "leaves out the tool's result in message 3"),
        (
            "'<result>' + m.content",
            "'<result>' + m.content | upper",
            "rewrites the text of this conversation's messages, calls or tools",
        ),
    ],
)
def test_what_a_template_loses_is_named(old, new, said_, byte_level, chatml_tools):
    template = chatml_tools.template.source
    old = old.replace("'<result>'", "<result>'").replace("\\n", "\n")
    new = new.replace("'<result>'", "<result>'").replace("\\n", "\n")
    assert old in template
    encoder = encoder_of(byte_level, template.replace(old, new))
    with pytest.raises(ConversationError) as error:
        encoder.encode_batch(
            [[user("?", [LOOK]), calling(call(where="in"), content="Hm"), result("x"), said("y")]]
        )
    assert said_ in error.value.reason


def test_keys_and_numbers_that_a_template_loses_are_named(byte_level, chatml_tools):
    template = chatml_tools.template.source
    values = template.replace(
        "call.function.arguments | tojson", "call.function.arguments.values() | list | tojson"
    )
    encoder = encoder_of(byte_level, values)
    with pytest.raises(ConversationError, match="leaves out 'where' of the call of a tool in message 2"):
        encoder.encode_batch([[user("?"), calling(call(where="in")), result("x"), said("y")]])
    few = "call.function.arguments | tojson | replace('12345', '')"
    encoder = encoder_of(byte_level, template.replace("call.function.arguments | tojson", few))
    with pytest.raises(ConversationError, match="leaves out 12345 of the call of a tool in message 2"):
        encoder.encode_batch([[user("?"), calling(call(where="in", times=12345)), result("x"), said("y")]])


def test_tools_stay_with_a_system_message_that_moves(byte_level, metaspace, spell):
    late = (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
        "{{ ('[TOOLS] ' + tools | tojson + '[/TOOLS]' if tools else '') }}"
        "{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}"
        "{% elif m.tool_calls %}{{ '[CALLS] ' + m.tool_calls | tojson + eos_token }}"
        "{% elif m.role == 'tool' %}{{ '[RESULT] ' + m.content + '[/RESULT]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    encoder = ChatEncoder(metaspace(late))
    messages = [
        {"role": "system", "content": "Be brief.", "tools": [LOOK]},
        user("?"),
        calling(call(where="in")),
        result("x"),
        said("y"),
    ]
    (encoded,) = encoder.encode_batch([messages])
    text = spell(encoder, encoded.ids.tolist())
    assert "[/TOOLS][INST] Be brief.\n\n?[/INST][CALLS]" in text
    assert spell(encoder, encoder.encode_prompt(messages[:4]).tolist()) == text[: text.index(" y</s>")]


# ---- templates that change their mind


def test_a_template_that_adds_something_to_its_last_answer_is_refused(byte_level, chatml_tools):
    thinks = chatml_tools.template.source.replace(
        "{{ '\n' + m.content }}",
        "{{ '\n' + ('<think>\n' if loop.last and not m.tool_calls else '') + m.content }}",
    )
    assert thinks != chatml_tools.template.source
    encoder = encoder_of(byte_level, thinks)
    assert len(encoder.encode_batch([TALK[:5]])) == 1
    with pytest.raises(ConversationError, match=r"shows the assistant's message 5, .* differently once"):
        encoder.encode_batch([TALK])


def test_a_template_that_opens_calls_as_nothing_else_is_refused(byte_level, chatml_tools):
    odd = chatml_tools.template.source.replace(
        "'<|im_start|>' + m.role", "'<|im_start|>' + ('caller' if m.tool_calls else m.role)"
    )
    with pytest.raises(ConversationError, match=r"shows the assistant's message 2, .* differently"):
        encoder_of(byte_level, odd).encode_batch([TALK])


def test_a_template_that_scatters_or_repeats_a_call_is_refused(byte_level, chatml_tools):
    source = chatml_tools.template.source
    twice = source.replace("call.function.name", "call.function.name + call.function.name")
    with pytest.raises(ConversationError, match="message 2 more than once"):
        encoder_of(byte_level, twice).encode_batch([TALK])
    apart = source.replace("{{ '<|im_end|>\\n' }}{% for m".replace("\\n", "\n"),
                           "{{ messages[1].tool_calls[0].function.name + '<|im_end|>\n' }}{% for m").replace(
        "call.function.name +", "('' if loop.first else call.function.name) +")  # fmt: skip
    with pytest.raises(ConversationError, match=r"scatters|leaves out"):
        encoder_of(byte_level, apart).encode_batch([TALK])


def test_a_turn_that_never_ends_is_refused(byte_level, chatml_tools):
    open_ended = chatml_tools.template.source.replace(
        "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}",
        "{{ '\n' if m.tool_calls else '<|im_end|>\n' }}{% endif %}{% endfor %}",
    )
    assert open_ended != chatml_tools.template.source
    encoder = encoder_of(byte_level, open_ended)
    with pytest.raises(ConversationError, match="does not end the assistant's turns"):
        encoder.encode_batch([[user("?", [LOOK]), calling(call(where="in"))]])


def test_prompts_are_checked_too(chatml_tools, chatml):
    with pytest.raises(InputError, match="message 2 is a tool's result, but no call"):
        chatml_tools.encode_prompt([user("a"), result("x")])
    with pytest.raises(InputError, match="it has tools, which"):
        chatml.encode_prompt([user("a", [LOOK])])


def test_the_schemas_are_written_as_the_row_has_them(chatml_tools, spell):
    (encoded,) = chatml_tools.encode_batch([TALK])
    assert json.dumps(LOOK, ensure_ascii=False) in spell(chatml_tools, encoded.ids.tolist())
