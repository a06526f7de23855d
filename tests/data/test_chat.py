"""Ids and masks: the template's own rendering, the trained spans, and text that stays text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from jaxlora.core.errors import InputError
from jaxlora.data.chat import ChatEncoder, load_tokenizer
from jaxlora.data.template import ConversationError


def whole(encoder, messages):
    """The ids of the rendered text, as the tokenizer itself gives them."""
    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False)
    return encoder.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


TALKS = [
    ("What is two plus two?", "It is four."),
    ("a", "b", "c", "d", "e", "f"),
    ("x", "", "y", "  padded  "),
    ("ends with the user", "yes", "and again"),
    ("ünïcödé", "很高兴认识你！🙂"),
    ("new\nlines\n\n", "\n\nhere\n"),
]


# ---- the trained tokens


@pytest.mark.parametrize("contents", TALKS)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_exactly_the_answers_and_their_ends_are_trained(contents, system, chatml, talk, trained_texts):
    messages = talk(*contents, system=system)
    (encoded,) = chatml.encode_batch([messages])
    assert encoded.ids.tolist() == whole(chatml, messages)
    assert trained_texts(chatml, encoded) == [text + "<|im_end|>" for text in contents[1::2]]


@pytest.mark.parametrize("contents", TALKS[:4])
def test_tokens_that_hold_the_first_character_of_an_answer_are_trained(
    contents, mistral_like, talk, trained_texts
):
    messages = talk(*contents)
    (encoded,) = mistral_like.encode_batch([messages])
    assert encoded.ids.tolist() == whole(mistral_like, messages)
    # The template trims an answer, writes one space before it, and closes it; an empty one is only closed.
    spoken = [trained.removeprefix(" ") for trained in trained_texts(mistral_like, encoded)]
    assert spoken == [text.strip() + "</s>" for text in contents[1::2]]


def test_the_space_before_an_answer_is_its_first_piece_even_where_it_stands_alone(mistral_like, talk):
    (encoded,) = mistral_like.encode_batch([talk("What?", "{x}")])
    pieces = mistral_like.tokenizer.convert_ids_to_tokens(encoded.ids.tolist())
    assert pieces[pieces.index("[/INST]") + 1] == "▁"
    assert encoded.trained[pieces.index("[/INST]") + 1]


def test_all_trains_every_token(byte_level, talk):
    encoder = ChatEncoder(byte_level(), train_on="all")
    (encoded,) = encoder.encode_batch([talk("Hello", "Hi")])
    assert encoded.trained.all()


def test_a_text_is_trained_in_full_and_closed(metaspace, chatml):
    encoder = ChatEncoder(metaspace(template=None))
    (encoded,) = encoder.encode_batch(["hello world"])
    assert encoded.trained.all()
    assert encoded.ids[0] == encoder.tokenizer.bos_token_id
    assert encoded.ids[-1] == encoder.tokenizer.eos_token_id
    (encoded,) = chatml.encode_batch(["Paris <|im_end|> is"])
    assert encoded.ids.tolist().count(chatml.tokenizer.eos_token_id) == 1


def test_a_batch_is_its_conversations_one_by_one(chatml, talk):
    rows = [talk(*contents) for contents in TALKS] + ["plain text"]
    alone = [chatml.encode_batch([row])[0] for row in rows]
    for one, other in zip(alone, chatml.encode_batch(rows), strict=True):
        assert (one.ids.tolist(), one.trained.tolist()) == (other.ids.tolist(), other.trained.tolist())


# ---- text stays text


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_a_special_token_written_in_a_message_stays_text(token, chatml, talk, trained_texts):
    contents = (f"Say {token} please", f'print("{token}")')
    (encoded,) = chatml.encode_batch([talk(*contents)])
    ids = encoded.ids.tolist()
    assert chatml.tokenizer.decode(ids) == chatml.tokenizer.apply_chat_template(
        talk(*contents), tokenize=False
    )
    special = {
        name: ids.count(chatml.tokenizer.convert_tokens_to_ids(name))
        for name in chatml.tokenizer.all_special_tokens
    }
    assert special == {"<|im_end|>": 2, "<|endoftext|>": 0} | {n: 2 for n in special if n == "<|im_start|>"}
    assert trained_texts(chatml, encoded) == [contents[1] + "<|im_end|>"]


TRICKY = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "user", "\n", " ", "🙂", "a"])
)


@given(st.lists(TRICKY.map("".join), min_size=2, max_size=4))
def test_no_text_makes_a_special_token_or_moves_the_mask(chatml, trained_texts, contents):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    if not any(text.strip() for text in contents[1::2]):
        return
    (encoded,) = chatml.encode_batch([messages])
    assert trained_texts(chatml, encoded) == [text + "<|im_end|>" for text in contents[1::2]]
    ends = encoded.ids.tolist().count(chatml.tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert ends == len(messages)


def test_tokens_the_template_writes_are_special_even_if_the_tokenizer_does_not_say_so(byte_level, talk):
    template = "{% for m in messages %}{{ '<turn>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    added = (
        AddedToken("<turn>", special=False, normalized=False),
        AddedToken("<tool>", special=False, normalized=False),
    )
    encoder = ChatEncoder(byte_level(template, added))
    turn, tool = encoder.tokenizer.convert_tokens_to_ids(["<turn>", "<tool>"])
    (encoded,) = encoder.encode_batch([talk("<turn>", "<tool>")])
    assert encoded.ids.tolist().count(turn) == 2
    # A token that is an ordinary word of the vocabulary stays one.
    assert encoded.ids.tolist().count(tool) == 1


# ---- templates


def test_a_system_message_that_the_template_would_drop_goes_to_the_last_user_message(mistral_like, talk):
    (encoded,) = mistral_like.encode_batch([talk("one", "two", "three", "four", system="Be brief.")])
    text = mistral_like.tokenizer.decode(encoded.ids.tolist())
    assert text.replace(" ", "") == "<s>[INST]one[/INST]two</s>[INST]Bebrief.\n\nthree[/INST]four</s>"
    prompt = mistral_like.encode_prompt(talk("one", "two", "three", system="Be brief."))
    assert encoded.ids[: len(prompt)].tolist() == prompt.tolist()


def test_and_it_goes_to_one_that_is_answered(mistral_like, talk, spell):
    """What comes after the last answer is not trained on, and cut off."""
    (encoded,) = mistral_like.encode_batch([talk("one", "two", "three", system="Be brief.")])
    text = spell(mistral_like, encoded.ids.tolist())
    assert text == "<s>[INST] Be brief.\n\none[/INST] two</s>[INST] three[/INST]"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "{% if m.role != 'system' %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endif %}",
            "leaves out the system",
        ),
        ("{{ '<|im_start|>' + m.content + m.content + '<|im_end|>' }}", "more than once"),
        ("{{ '<|im_start|>' + m.content }}", "does not end the assistant's turns with a special token"),
        ("{{ '<|im_start|>' + m.content | upper + '<|im_end|>' }}", "leaves out the system message"),
        ("{{ raise_exception('Only cats may speak') }}", "Only cats may speak"),
    ],
)
def test_a_template_that_cannot_be_followed_is_refused(body, said, byte_level, talk):
    encoder = ChatEncoder(byte_level("{% for m in messages %}" + body + "{% endfor %}"))
    with pytest.raises(ConversationError) as error:
        encoder.encode_batch([talk("Hello", "Hi", system="Be brief.")])
    assert said in error.value.reason


def test_a_template_that_rewrites_one_conversation_is_refused_there(byte_level, talk):
    body = "{{ '<|im_start|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
    encoder = ChatEncoder(byte_level("{% for m in messages %}" + body + "{% endfor %}"))
    rows = [talk("Hello", "Hi"), talk("Hello", "Hm </think> Hi")]
    with pytest.raises(
        ConversationError, match=r"rewrites the text of message 2 \(the assistant's\)"
    ) as error:
        encoder.encode_batch(rows)
    assert error.value.index == 1
    with pytest.raises(ConversationError, match=r"of message 3 \(the user's\) or drops a part of it"):
        encoder.encode_batch([talk("Hello", "Hi", "a </think> b", "Hm")])


# Templates whose rendering of a conversation does not begin as that of its beginning.
THINK = "<think>\n\n</think>\n\n"
UNSTEADY = {
    # What stands before an answer changes once it is no longer the last (as Qwen3's empty thoughts).
    "last_answer": (
        "{{ '<|im_start|>' + m.role + '\n' + ('"
        + THINK.replace("\n", "\\n")
        + "' if loop.last and m.role == 'assistant' else '') + m.content + '<|im_end|>\n' }}"
    ),
    # Every answer is shown as it is, but asked for after something else.
    "prompt": "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    # The whole conversation is counted in front.
    "count": "{% if loop.first %}{{ messages | length }}{% endif %}{{ m.role + m.content + '<|im_end|>' }}",
}


@pytest.mark.parametrize(("name", "from_turn"), [("last_answer", 2), ("prompt", 1), ("count", 1)])
def test_a_template_that_changes_what_it_has_shown_is_refused(name, from_turn, byte_level, talk):
    encoder = ChatEncoder(byte_level("{% for m in messages %}" + UNSTEADY[name] + "{% endfor %}"))
    if from_turn == 2:
        assert len(encoder.encode_batch([talk("a", "b")])) == 1
    with pytest.raises(ConversationError) as error:
        encoder.encode_batch([talk("a", "b"), talk("a", "b", "c", "d")][2 - from_turn :])
    assert (
        "shows the assistant's message 2, or what comes before it, differently once the conv"
        in error.value.reason
    )
    assert "put a chat_template.jinja" in error.value.reason
    # Whoever trains every token has said that it does not matter.
    everything = ChatEncoder(encoder.tokenizer, train_on="all")
    assert len(everything.encode_batch([talk("a", "b", "c", "d")])) == 1


def test_a_template_that_shows_the_system_message_only_sometimes_is_refused(byte_level, talk):
    body = "{% if m.role != 'system' or messages | length < 4 %}{{ m.role + m.content + '<|im_end|>' }}{% endif %}"
    encoder = ChatEncoder(byte_level("{% for m in messages %}" + body + "{% endfor %}"))
    assert len(encoder.encode_batch([talk("a", "b", system="s")])) == 1
    with pytest.raises(ConversationError, match="leaves out the system message"):
        encoder.encode_batch([talk("a", "b", "c", "d", system="s")])


def test_what_is_no_template_is_said_to_be_none(byte_level, talk):
    encoder = ChatEncoder(byte_level("{% for m in messages %}\n{{ m.content }{% endfor %}"))
    with pytest.raises(
        InputError, match=r"template is not valid jinja \(line 2: .*\); mend the chat_template"
    ) as error:
        encoder.encode_batch([talk("a", "b")])
    assert not isinstance(error.value, ConversationError)  # no row is to blame


def test_the_row_at_which_a_template_fails_is_found(byte_level, talk):
    body = "{% if 'bad' in m.content %}{{ raise_exception('no') }}{% endif %}{{ m.content + '<|im_end|>' }}"
    encoder = ChatEncoder(byte_level("{% for m in messages %}" + body + "{% endfor %}"))
    with pytest.raises(ConversationError) as error:
        encoder.encode_batch(["text", talk("a", "b"), talk("bad", "c")])
    assert (error.value.index, error.value.reason) == (
        2,
        "the chat template does not render this conversation: no; change the conversation, or leave it out",
    )


def test_a_tokenizer_that_looks_across_its_special_tokens_is_refused(byte_level, talk):
    greedy = AddedToken("<|bot|>", special=True, normalized=False, rstrip=True)
    template = "{% for m in messages %}{{ '<|bot|>\n' + m.content + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(InputError, match="rstrip"):
        ChatEncoder(byte_level(template, (greedy,))).encode_batch([talk("a", "b")])


def test_without_a_template_conversations_are_refused_with_the_remedy(byte_level, talk):
    encoder = ChatEncoder(byte_level(None))
    with pytest.raises(InputError, match=r"no chat template; .*chat_template\.jinja"):
        encoder.encode_batch([talk("a", "b")])


# ---- prompts, ends, fingerprints


def test_a_prompt_is_the_beginning_of_the_conversation_it_asks_for(chatml, talk):
    (encoded,) = chatml.encode_batch([talk("one", "two", "three", "four")])
    prompt = chatml.encode_prompt(talk("one", "two", "three"))
    assert encoded.ids[: len(prompt)].tolist() == prompt.tolist()
    assert encoded.trained[len(prompt)]
    with pytest.raises(InputError, match="two user turns"):
        chatml.encode_prompt([{"role": "user", "content": "a"}] * 2)


def test_an_answer_ends_at_the_templates_end_of_turn_and_at_eos(byte_level, chatml):
    assert chatml.end_of_turn_ids == (chatml.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    tokenizer = byte_level()
    tokenizer.eos_token = "<|endoftext|>"
    ids = tuple(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert ChatEncoder(tokenizer).end_of_turn_ids == ids
    assert ChatEncoder(byte_level(None)).end_of_turn_ids == ids[:1]


def test_the_fingerprint_tells_everything_the_ids_depend_on(byte_level, chatml, metaspace):
    prints = [
        ChatEncoder(byte_level()).fingerprint,
        ChatEncoder(byte_level(), train_on="all").fingerprint,
        ChatEncoder(byte_level(None)).fingerprint,
        ChatEncoder(metaspace()).fingerprint,
    ]
    assert prints[0] == chatml.fingerprint
    assert len(set(prints)) == 4


@pytest.mark.parametrize("contents", [("Hello",), ("Hello", ""), ("Hello", " \n")])
def test_a_conversation_with_nothing_to_train_is_refused(contents, chatml, talk):
    with pytest.raises(ConversationError, match="conversation 2: no assistant turn in it has any text"):
        chatml.encode_batch([talk("a", "b"), talk(*contents)])


def test_an_empty_text_is_refused(chatml):
    with pytest.raises(ConversationError, match="text is empty"):
        chatml.encode_batch([""])


# ---- loading


def test_a_saved_tokenizer_gives_the_same_ids(byte_level, chatml, talk, tmp_path):
    byte_level().save_pretrained(tmp_path)
    # transformers would force Qwen2's own class on a folder that says qwen2.
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    loaded = ChatEncoder(load_tokenizer(str(tmp_path)))
    row = talk("What is two plus two?", "It is 4, or ４.")
    assert loaded.encode_batch([row])[0].ids.tolist() == chatml.encode_batch([row])[0].ids.tolist()


def test_a_missing_tokenizer_is_explained(tmp_path):
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(InputError, match="is no folder"):
        load_tokenizer(str(tmp_path / "nothing"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(InputError, match="nobody/nothing cannot be loaded"):
        load_tokenizer("nobody/nothing")
