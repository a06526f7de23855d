"""The golden ids and masks of real tokenizers, and real conversations there and back."""

import json
import shutil
import time

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from jaxlora.core.errors import InputError
from jaxlora.data.batches import Batches, prepare
from jaxlora.data.chat import ChatEncoder, load_tokenizer
from jaxlora.data.sources import load_conversations

TOKENIZERS = ("qwen2.5", "mistral-v0.1", "mistral-v0.3")


@pytest.fixture(scope="module")
def encoders(real):
    return {name: ChatEncoder(load_tokenizer(str(real / "tokenizers" / name))) for name in TOKENIZERS}


def test_qwen_ids_and_masks(real, encoders):
    cases = json.loads((real / "fixtures/qwen2.5_ids_and_masks.json").read_text())
    encoder = encoders["qwen2.5"]
    literal = 0
    for case, encoded in zip(cases, encoder.encode_batch([case["messages"] for case in cases]), strict=True):
        expected_ids, expected_mask = case["ids"], case["content_plus_im_end_mask"]
        if any("<|im_end|>" in message["content"] for message in case["messages"]):
            # These ids were made from rendered text, in which the literal token of the message became a real one
            # that ended the answer early. Here it is text, and the answer goes on to its true end.
            literal += 1
            text = '```python\nprint("<|im_end|>")\n```\n\n'
            start = expected_mask.index(1)
            body = encoder.tokenizer.encode(text, split_special_tokens=True)
            expected_ids = [*expected_ids[:start], *body, *expected_ids[-2:]]
            expected_mask = [0] * start + [1] * (len(body) + 1) + [0]
        assert encoded.ids.tolist() == expected_ids
        assert encoded.trained.astype(int).tolist() == expected_mask
    assert literal == 1
    assert len(cases) == 5


def test_qwen_texts(real, encoders):
    cases = json.loads((real / "fixtures/qwen2_tokenizer_cases.json").read_text())
    encoder = encoders["qwen2.5"]
    for case, encoded in zip(cases, encoder.encode_batch([case["text"] for case in cases]), strict=True):
        assert encoded.ids.tolist() == [*case["ids"], encoder.tokenizer.eos_token_id]


@pytest.mark.parametrize(("version", "name"), [("v1", "mistral-v0.1"), ("v3", "mistral-v0.3")])
def test_mistral_ids_and_masks(version, name, real, encoders):
    lines = (real / "fixtures/mistral_ids_and_masks.jsonl").read_text().splitlines()
    cases = [json.loads(line) for line in lines]
    assert sum(case["messages"][0]["role"] == "system" for case in cases) == 50
    encoded = encoders[name].encode_batch([case["messages"] for case in cases])
    for case, one in zip(cases, encoded, strict=True):
        assert one.ids.tolist() == case[version]["ids"]
        assert one.trained.astype(int).tolist() == case[version]["assistant_mask"]


def test_mistrals_first_template_with_the_tokenizer_of_its_time(real):
    (case,) = json.loads((real / "fixtures/mistral_v0.1_2023_template_case.json").read_text())
    folder = real / "tokenizers/mistral-v0.1"
    state = json.loads((folder / "tokenizer.json").read_text())
    # In 2023 the tokenizer put a space before every piece between two special tokens, not before the first word only.
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    state["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    state["pre_tokenizer"] = None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=(folder / "chat_template_2023_original.jinja").read_text(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    (encoded,) = ChatEncoder(tokenizer).encode_batch([case["messages"]])
    assert encoded.ids.tolist() == case["ids"]


def spoken(encoder, encoded):
    """What each stretch of trained tokens says, without the token that ends it."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.trained.astype(np.int8), [0]])))
    stretches = [encoded.ids[a:b].tolist() for a, b in edges.reshape(-1, 2)]
    assert all(stretch[-1] in encoder.end_of_turn_ids for stretch in stretches)
    return encoder.tokenizer.batch_decode(
        [stretch[:-1] for stretch in stretches], clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_trained_spans_of_real_talks_are_the_assistants_turns(name, real, encoders):
    source = load_conversations(str(real / "data/taskmaster4_multiturn.jsonl"))
    assert len(source) == 3710
    rows = source.conversations(0, len(source))
    turns = 0
    for row, encoded in zip(rows, encoders[name].encode_batch(rows), strict=True):
        answers = [message["content"] for message in row if message["role"] == "assistant"]
        if name == "mistral-v0.3":  # its template trims them
            answers = [answer.strip() for answer in answers]
        turns += len(answers)
        assert spoken(encoders[name], encoded) == answers
    assert turns > 3710


def test_mistral_v02_is_encoded_as_v01(real, encoders, tmp_path):
    """Mistral-7B-Instruct-v0.2 came with the tokenizer and the template of v0.1: only its model's config differs."""
    v01, v02 = (real / f"configs/Mistral-7B-Instruct-v0.{n}.config.json" for n in (1, 2))
    assert v01.read_text() != v02.read_text()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        shutil.copy(real / "tokenizers/mistral-v0.1" / name, tmp_path)
    shutil.copy(v02, tmp_path / "config.json")
    encoder = ChatEncoder(load_tokenizer(str(tmp_path)))
    assert encoder.fingerprint == encoders["mistral-v0.1"].fingerprint
    lines = (real / "fixtures/mistral_ids_and_masks.jsonl").read_text().splitlines()
    cases = [json.loads(line) for line in lines]
    for case, one in zip(cases, encoder.encode_batch([case["messages"] for case in cases]), strict=True):
        assert one.ids.tolist() == case["v1"]["ids"]
        assert one.trained.astype(int).tolist() == case["v1"]["assistant_mask"]


def test_smollm2_adds_a_system_message_of_its_own(smollm2, talk, trained_texts):
    encoder = ChatEncoder(load_tokenizer(str(smollm2)))
    for system in (None, "Be brief."):
        messages = talk("one", "two", "three", "<|im_end|>", system=system)
        (encoded,) = encoder.encode_batch([messages])
        rendered = encoder.tokenizer.apply_chat_template(messages, tokenize=False)
        assert encoder.tokenizer.decode(encoded.ids.tolist()) == rendered
        assert rendered.startswith(
            f"<|im_start|>system\n{system or 'You are a helpful AI assistant named SmolLM'}"
        )
        assert trained_texts(encoder, encoded) == ["two<|im_end|>", "<|im_end|><|im_end|>"]
        assert encoded.ids.tolist().count(encoder.tokenizer.eos_token_id) == len(messages) + (system is None)


# ---- tools

LOOK = {"name": "look", "description": "Looks", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": LOOK}]
TOOL_TALK = [
    {"role": "user", "content": "Sunny?", "tools": TOOLS},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "out", "n": 2}}}]
        * 2,
    },
    {"role": "tool", "content": "yes"},
    {"role": "tool", "content": "no"},
    {"role": "assistant", "content": "Partly."},
]
CALLED = '{"name": "look", "arguments": {"at": "out", "n": 2}'
SPOKEN = {
    "qwen2.5": "\n".join([f"<tool_call>\n{CALLED}}}\n</tool_call>"] * 2) + "<|im_end|>",
    "mistral-v0.3": f'[TOOL_CALLS] [{CALLED}, "id": "call00001"}}, {CALLED}, "id": "call00002"}}]</s>',
}


@pytest.mark.parametrize("name", SPOKEN)
def test_calls_are_trained_and_tools_and_results_are_not(name, encoders, spell):
    encoder = encoders[name]
    (encoded,) = encoder.encode_batch([TOOL_TALK])
    bare = [{key: m[key] for key in m if key != "tools"} for m in encoder._tools.with_ids(TOOL_TALK)]
    rendered = encoder.tokenizer.apply_chat_template(bare, tools=TOOLS, tokenize=False)
    assert encoded.ids.tolist() == encoder.tokenizer.encode(rendered, add_special_tokens=False)
    trained = spell(encoder, encoded.ids[encoded.trained].tolist())
    answer = "Partly.<|im_end|>" if name == "qwen2.5" else " Partly.</s>"
    assert trained == SPOKEN[name] + answer
    assert "Looks" in rendered


def test_the_text_of_a_turn_that_calls_is_not_lost(encoders, spell):
    messages = [TOOL_TALK[0], {**TOOL_TALK[1], "content": "Let me look."}, *TOOL_TALK[2:]]
    (encoded,) = encoders["qwen2.5"].encode_batch([messages])
    trained = spell(encoders["qwen2.5"], encoded.ids[encoded.trained].tolist())
    assert trained.startswith("Let me look.\n" + SPOKEN["qwen2.5"])
    with pytest.raises(
        InputError, match="leaves out the text of the assistant's message 2, which calls a tool as w"
    ):
        encoders["mistral-v0.3"].encode_batch([messages])


def test_tools_are_kept_beside_a_system_message(encoders, spell):
    """Mistral v0.3's template shows both with the last user message."""
    first = {"role": "system", "content": "Be brief.", "tools": TOOLS}
    messages = [first, {"role": "user", "content": "Sunny?"}, *TOOL_TALK[1:]]
    for name in SPOKEN:
        (encoded,) = encoders[name].encode_batch([messages])
        text = spell(encoders[name], encoded.ids.tolist())
        assert "Be brief.\n\nSunny?" in text if name == "mistral-v0.3" else "Be brief.\n\n# Tools" in text
        assert '"name": "look", "description": "Looks"' in text


def test_mistral_v01_has_no_tools(encoders):
    for messages in (TOOL_TALK, [TOOL_TALK[0], TOOL_TALK[4]]):
        with pytest.raises(InputError, match="it has tools, which the model's chat template does not show"):
            encoders["mistral-v0.1"].encode_batch([messages])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_those_of_the_whole_rendered_text(name, real, encoders):
    source = load_conversations(str(real / "data/taskmaster4_multiturn.jsonl"))
    rows = source.conversations(0, 300)
    tokenizer = encoders[name].tokenizer
    rendered = tokenizer.apply_chat_template(rows, tokenize=False)
    whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert [one.ids.tolist() for one in encoders[name].encode_batch(rows)] == whole


@pytest.mark.parametrize("name", ["stories260k-mistral", "stories260k-qwen2"])
def test_the_tokenizer_of_a_folder_is_used_as_it_is_written(name, real):
    encoder = ChatEncoder(load_tokenizer(str(real / "models" / name)))
    texts = load_conversations(str(real / "data/tinystories_sample.jsonl")).conversations(0, 16)
    written = Tokenizer.from_file(str(real / "models" / name / "tokenizer.json"))
    for text, encoded in zip(texts, encoder.encode_batch(texts), strict=True):
        assert encoded.ids.tolist() == [*written.encode(text).ids, encoder.tokenizer.eos_token_id]


def test_gsm8k_packs_tightly_and_comes_from_the_cache_at_once(real, encoders, tmp_path):
    source = load_conversations(str(real / "data/gsm8k/test.jsonl"))
    examples = prepare(source, encoders["qwen2.5"], 1024, cache=tmp_path)
    assert (len(examples), examples.truncated, examples.dropped) == (1319, 0, 0)
    assert Batches(examples, 128, 1024).efficiency > 0.97
    start = time.process_time()
    assert prepare(source, encoders["qwen2.5"], 1024, cache=tmp_path).tokens == examples.tokens
    assert time.process_time() - start < 1
