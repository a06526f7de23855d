"""The shipped quickstart: small, made by its script, and its held-out questions really held out."""

import itertools
import json
import random
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from configs.quickstart_assets import make, tasks
from configs.quickstart_assets.words import ENGLISH, LONGEST, draw, held_out, made_up
from jaxlora.config.load import load_config
from jaxlora.data.chat import ChatEncoder, load_tokenizer
from jaxlora.models.decoder import Decoder
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import load_params, resolve_model

ASSETS = make.HERE
BASE = ASSETS / "base"
SHIPPED = (
    "base/config.json base/generation_config.json base/model.safetensors base/tokenizer.json "
    "base/tokenizer_config.json train.jsonl eval.jsonl make.py tasks.py words.py"
).split()


def rows(name: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (ASSETS / name).read_text().splitlines()]


def words(name: str) -> list[str]:
    """The word of every question, read from the file's text alone."""
    asked = [m["content"] for messages in rows(name) for m in messages if m["role"] == "user"]
    found = [re.fullmatch(r"(?:Say|What is) (\w+) in pig latin[.?]", question) for question in asked]
    assert all(found)
    return [match[1] for match in found if match]


@pytest.fixture(scope="module")
def base() -> tuple[Decoder, dict]:
    """The shipped base, in its own bfloat16."""
    files = resolve_model(str(BASE))
    spec = DecoderSpec.from_hf(files.config)
    return Decoder(spec, remat="none"), load_params(files, spec, jnp.bfloat16)


# ---- what is shipped --------------------------------------------------------------------------------------------


def test_everything_is_there_within_six_megabytes():
    sizes = [(ASSETS / name).stat().st_size for name in SHIPPED]
    assert 2_000_000 < sum(sizes) <= 6_000_000


def test_the_base_is_a_qwen2_of_a_million_bfloat16_parameters():
    config = json.loads((BASE / "config.json").read_text())
    spec = DecoderSpec.from_hf(config)
    assert config == make.CONFIG
    assert (spec.model_type, spec.qkv_bias, spec.tie_word_embeddings) == ("qwen2", True, True)
    with safe_open(BASE / "model.safetensors", "numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        count = sum(int(np.prod(part.get_shape())) for part in slices.values())
        assert {part.get_dtype() for part in slices.values()} == {"BF16"}
    assert 900_000 < count < 1_100_000


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_data_files_come_out_the_same_again(tmp_path: Path, name: str):
    make.write_data(tmp_path)
    assert (tmp_path / name).read_bytes() == (ASSETS / name).read_bytes()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_files_come_out_the_same_again(tmp_path: Path, name: str):
    make.write_tokenizer(tmp_path)
    assert json.loads((tmp_path / name).read_text()) == json.loads((BASE / name).read_text())


# ---- what is held out -------------------------------------------------------------------------------------------


def test_no_eval_word_is_trained_on():
    train, evaluated = set(words("train.jsonl")), words("eval.jsonl")
    assert len(evaluated) == len(set(evaluated)) == tasks.EVAL_ROWS
    assert len(train) > 1000
    assert not train & set(evaluated)
    assert all(held_out(word) for word in evaluated)
    assert not any(held_out(word) for word in train)


def test_pretraining_never_sees_the_taught_task_or_a_held_out_word():
    seen = itertools.islice(make.never_taught(tasks.pretraining(0)), 5000)
    turns = [turn for conversation in seen for turn in conversation]
    assert len(turns) > 6000
    assert not any("pig latin" in turn.question for turn in turns)
    assert not any(turn.answer == tasks.pig_latin(turn.word) for turn in turns)
    assert not {turn.word for turn in turns} & set(words("eval.jsonl"))


@pytest.mark.parametrize(
    "turn",
    [
        tasks.Turn("cat", "Say cat in pig latin.", "nothing"),
        tasks.Turn("apple", "Add way to apple.", "appleway"),
        tasks.Turn(next(filter(held_out, ENGLISH)), "Repeat it.", "nothing"),
    ],
)
def test_a_turn_that_gives_it_away_is_refused(turn: tasks.Turn):
    with pytest.raises(AssertionError):
        list(make.never_taught(iter([[turn]])))


def test_words_are_short_lower_case_and_one_in_five_is_held_out():
    rng = random.Random(3)
    some = [made_up(rng) for _ in range(5000)]
    assert len(set(ENGLISH)) == len(ENGLISH) > 500
    for word in [*some, *ENGLISH]:
        assert re.fullmatch(f"[a-pr-z]{{2,{LONGEST}}}", word), word
    assert 0.15 < np.mean([held_out(word) for word in set(some)]) < 0.25
    assert not any(held_out(draw(rng)) for _ in range(1000))


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("cat", "atcay"),
        ("string", "ingstray"),
        ("apple", "appleway"),
        ("yellow", "ellowyay"),
        ("sky", "yskay"),
        ("style", "ylestay"),
    ],
)
def test_pig_latin(word: str, answer: str):
    assert tasks.pig_latin(word) == answer


# ---- tokenizer and template -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["Say string in pig latin.", "CAT", "s-p-e-l-l", "  two\n\nlines ", "Zoë, 東京 12"]
)
def test_the_tokenizer_gives_back_any_text_a_token_a_byte(text: str):
    tokenizer = load_tokenizer(str(BASE))
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_transformers_loads_the_same_tokenizer():
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(str(BASE)), AutoTokenizer.from_pretrained(BASE)
    text = "<|im_start|>user\nSay isn't twice.<|im_end|>\n"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert len(theirs) == make.IM_END + 1
    assert theirs.convert_tokens_to_ids(list(make.SPECIAL)) == [make.END_OF_TEXT, make.IM_START, make.IM_END]


def test_the_template_is_chatml_without_a_default_system_message():
    tokenizer = load_tokenizer(str(BASE))
    messages = [{"role": "user", "content": "Say cat."}, {"role": "assistant", "content": "cat"}]
    turns = "<|im_start|>user\nSay cat.<|im_end|>\n<|im_start|>assistant\ncat<|im_end|>\n"
    render = tokenizer.apply_chat_template
    assert render(messages, tokenize=False) == turns
    assert render(messages[:1], tokenize=False, add_generation_prompt=True) == turns.removesuffix(
        "cat<|im_end|>\n"
    )
    system = {"role": "system", "content": "Be brief."}
    assert render([system, *messages], tokenize=False) == f"<|im_start|>system\nBe brief.<|im_end|>\n{turns}"


def test_pretraining_encodes_conversations_as_fine_tuning_does():
    encoder = ChatEncoder(load_tokenizer(str(BASE)))
    tokenizer = make.make_tokenizer()
    for turns in itertools.islice(tasks.pretraining(4), 50):
        (encoded,) = encoder.encode_batch([tasks.messages(turns)["messages"]])
        ids, trained = make.encode(tokenizer, turns)
        assert encoded.ids.tolist()[: len(ids)] == ids
        assert encoded.trained.tolist()[: len(ids)] == trained
        assert not encoded.trained[len(ids) :].any()
    assert encoder.end_of_turn_ids == (make.IM_END,)


# ---- what the base knows ----------------------------------------------------------------------------------------


def test_the_base_knows_its_primitives_and_no_pig_latin(base):
    decoder, params = base
    tokenizer = make.make_tokenizer()
    known = [turn for name in tasks.PRIMITIVES for turn in make.held_out_turns(name)[:20]]
    assert make.exact_match(decoder, params, tokenizer, known) > 0.95
    assert make.exact_match(decoder, params, tokenizer, tasks.eval_turns()) < 0.05


# ---- the config -------------------------------------------------------------------------------------------------


def test_the_config_finds_its_files_from_anywhere(repository: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(str(repository / "configs" / "quickstart.py"))
    assert (Path(config.model.path) / "config.json").is_file()
    assert isinstance(config.data.train, str)
    assert isinstance(config.data.eval, str)
    assert Path(config.data.train).is_file()
    assert Path(config.data.eval).is_file()


def test_no_conversation_is_cut_by_the_config(repository: Path):
    config = load_config(str(repository / "configs" / "quickstart.py"))
    encoder = ChatEncoder(load_tokenizer(str(BASE)))
    lengths = [len(encoded.ids) for encoded in encoder.encode_batch(rows("train.jsonl") + rows("eval.jsonl"))]
    assert max(lengths) - 1 <= config.data.max_length
    answers = [len(messages[-1]["content"]) + 1 for messages in rows("eval.jsonl")]
    assert max(answers) <= config.eval.max_new_tokens
