"""Files and data sets as conversations, and what is said when they are none."""

import dataclasses
import json

import datasets
import numpy as np
import pytest
from datasets import Dataset

from jaxlora.core.errors import InputError
from jaxlora.data.sources import load_conversations, split_off_eval

HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]

ROWS = {
    "messages": ({"messages": HELLO}, HELLO),
    "messages with system": ({"messages": SYSTEM + HELLO}, SYSTEM + HELLO),
    "prompt_completion": ({"prompt": "Hello", "completion": "Hi there"}, HELLO),
    "prompt_completion as messages": ({"prompt": SYSTEM + HELLO[:1], "completion": HELLO[1:]}, SYSTEM + HELLO),
    "alpaca": ({"instruction": "Hello", "input": "", "output": "Hi there"}, HELLO),
    "alpaca without input": ({"instruction": "Hello", "output": "Hi there"}, HELLO),
    "alpaca with input": (
        {"instruction": "Sum", "input": "1 2", "output": "3"},
        [{"role": "user", "content": "Sum\n\n1 2"}, {"role": "assistant", "content": "3"}],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi there"}]},
        HELLO,
    ),
    "sharegpt with system": (
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "Hello"}, HELLO[1]]},
        SYSTEM + HELLO,
    ),
    "text": ({"text": "Once upon a time"}, "Once upon a time"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_every_kind_of_row_is_recognised_and_said(case, write):
    row, conversation = ROWS[case]
    source = load_conversations(write("data.jsonl", row, row), "train")
    assert source.kind == case.split()[0]
    assert f"data.jsonl: 2 rows of {source.kind}" in source.description
    assert source.conversations(0, 2) == [conversation, conversation]


@pytest.mark.parametrize("name", ["d.json", "d.csv", "d.parquet"])
def test_other_file_types_hold_the_same(name, write, tmp_path):
    row = {"prompt": "007, Hello", "completion": "NA"}
    path = str(tmp_path / name)
    if name == "d.json":
        write(name, json.dumps([row, row], indent=1))
    elif name == "d.csv":
        write(name, "prompt,completion\n", '"007, Hello",NA\n' * 2)
    else:
        Dataset.from_list([row, row]).to_parquet(path)
    source = load_conversations(path)
    assert [m["content"] for m in source[1]] == ["007, Hello", "NA"]


def test_csv_keeps_numbers_and_na_as_they_are_written(write):
    source = load_conversations(write("d.csv", "prompt,completion\n", "007,1.50\n", "null,NA\n"))
    assert [[m["content"] for m in c] for c in source.conversations(0, 2)] == [
        ["007", "1.50"],
        ["null", "NA"],
    ]


def test_a_csv_cell_may_hold_messages_as_json(write):
    cell = '"' + json.dumps(HELLO).replace('"', '""') + '"\n'
    assert load_conversations(write("d.csv", "messages\n", cell))[0] == HELLO


def test_a_tuple_mixes_kinds_one_after_the_other(write):
    first = write("a.jsonl", {"text": "one"}, {"text": "two"})
    second = write("b.jsonl", {"prompt": "Hello", "completion": "Hi there"})
    source = load_conversations((first, second))
    assert source.conversations(0, 3) == ["one", "two", HELLO]
    assert (source.where(1), source.where(2)) == (f"{first}, row 2", f"{second}, row 1")
    assert source.kind == "text+prompt_completion"


def test_what_is_not_used_is_said(write):
    assert "(not used: id)" in load_conversations(write("d.jsonl", {"id": 1, "text": "one"})).description


def test_a_slice_of_a_file_is_a_split(write):
    rows = [{"text": str(i)} for i in range(9)]
    path = write("d.jsonl", *rows)
    assert load_conversations(path, "train[:3]").conversations(0, 3) == ["0", "1", "2"]
    assert load_conversations(path, "train[:3]").fingerprint != load_conversations(path).fingerprint


def test_the_fingerprint_is_of_the_content_not_of_the_file(write):
    same = (
        load_conversations(write("a.jsonl", {"text": "one"})),
        load_conversations(write("b.jsonl", {"text": "one"})),
    )
    assert same[0].fingerprint == same[1].fingerprint
    assert load_conversations(write("c.jsonl", {"text": "two"})).fingerprint != same[0].fingerprint


def test_rows_of_several_files_keep_their_own_numbers_after_a_selection(write):
    a = write("a.jsonl", *[{"text": f"a{i}"} for i in range(3)])
    b = write("b.jsonl", *[{"text": f"b{i}"} for i in range(3)])
    chosen = load_conversations((a, b)).select([5, 0, 3])
    assert chosen.conversations(0, 3) == ["b2", "a0", "b0"]
    assert [chosen.where(i) for i in range(3)] == [f"{b}, row 3", f"{a}, row 1", f"{b}, row 1"]
    assert "3 of 6 used here" in chosen.description


# ---- the split for evaluation


def test_parts_have_short_names_all_different(write):
    row = {"text": "words"}
    files = [write(name, *[row] * n) for n, name in enumerate(("a.jsonl", "b.v2.jsonl"), 1)]
    source = load_conversations((*map(str, files), str(files[0])))
    assert source.part_names[1] == "b.v2"
    assert source.part_names[0].endswith("-a")
    assert source.part_names[2] == f"{source.part_names[0]}-3"
    assert source.part_of(np.arange(4)).tolist() == [0, 1, 1, 2]
    assert source.select([3, 1]).part_of(np.arange(2)).tolist() == [2, 1]
    hub = [
        dataclasses.replace(source.parts[0], name=name)
        for name in ("x/gsm8k:main", "y/gsm8k:main", "z/other", "!")
    ]
    named = dataclasses.replace(source, parts=tuple(hub)).part_names
    assert named == ["x-gsm8k-main", "y-gsm8k-main", "other", "source"]


def test_split_off_eval_parts_all_rows_and_repeats_itself(write):
    source = load_conversations(write("d.jsonl", *[{"text": str(i)} for i in range(100)]))
    train, held_out = split_off_eval(source, 0.1, seed=3)
    assert (len(train), len(held_out)) == (90, 10)
    texts = [*train.conversations(0, 90), *held_out.conversations(0, 10)]
    assert sorted(map(int, texts)) == list(range(100))
    again = split_off_eval(source, 0.1, seed=3)
    assert (again[0].fingerprint, again[1].fingerprint) == (train.fingerprint, held_out.fingerprint)
    assert not np.array_equal(split_off_eval(source, 0.1, seed=4)[1].index, held_out.index)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 0.9])
def test_a_split_that_leaves_nothing_is_refused(fraction, write):
    source = load_conversations(write("d.jsonl", {"text": "a"}, {"text": "b"}))
    with pytest.raises(InputError, match="eval_fraction"):
        split_off_eval(source, fraction, seed=0)


# ---- wrong input

GOOD = json.dumps({"messages": HELLO}) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.jsonl", GOOD * 2 + "{oops\n" + GOOD, "line 3 is not valid JSON"),
        ("d.jsonl", GOOD + "\n\n" + GOOD[:-9], "line 4 is not valid JSON"),
        ("d.jsonl", "hello\n", "line 1 is not valid JSON"),
        ("d.json", '[{"text": "a"},\n{"text": }]', "line 2 is not valid JSON"),
        ("d.jsonl", "", "is empty"),
        ("d.jsonl", "\n \n", "is empty"),
        ("d.json", "[]", "d.json"),
        ("d.csv", "", "is empty"),
        ("d.csv", "prompt,completion\n", "no rows"),
        ("d.csv", "prompt,completion\na,b\nc,d,e,f\n", "line 3"),
        ("d.csv", "prompt,prompt\na,b\n", "different column names"),
        ("d.parquet", "not parquet", "d.parquet cannot be read"),
        ("d.txt", "hello", "ends in .txt; files are read as .jsonl, .json, .csv, .parquet"),
        ("d.jsonl", '{"question": "a", "answer": "b"}\n', "has the columns question, answer"),
        (
            "d.jsonl",
            '{"question": "a", "answer": "b"}\n',
            "accepted are: messages (tools); conversations (system, tools); ",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_explained(name, content, said, write):
    path = write(name, content)
    with pytest.raises(InputError) as error:
        load_conversations(path)
    assert said in str(error.value)
    assert path in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_bytes_that_are_no_text_are_found(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD.encode() + b'{"text": "\xff"}\n')
    with pytest.raises(InputError, match="line 2 is not UTF-8"):
        load_conversations(str(path))


@pytest.mark.parametrize("path", ["missing.jsonl", "/no/such/file", "./folder/x.parquet"])
def test_a_missing_file_is_named(path):
    with pytest.raises(InputError, match=rf"{path} does not exist"):
        load_conversations(path)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        load_conversations(str(tmp_path))


def test_no_name_at_all():
    with pytest.raises(InputError, match=r"data\.train"):
        load_conversations(("",))


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [turn("robot", "x")]}, 'unknown role "robot"; allowed: system, user, assistant'),
        ({"messages": [{"content": "x"}]}, "unknown role missing"),
        ({"messages": [turn("user", None)]}, "the content of message 1 is missing"),
        ({"messages": [turn("user", 5)]}, "the content of message 1 is 5; expected text"),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": "hello"}, "expected a list of messages"),
        ({"messages": [turn("assistant", "x"), turn("user", "y")]}, "starts with the assistant; user and"),
        ({"messages": [turn("user", "x"), turn("user", "y")]}, "message 2 makes two user turns in a row"),
        ({"messages": [turn("user", "x"), turn("assistant", "y", thinking="z")]}, "carries thinking"),
        ({"messages": [turn("user", "x"), turn("tool", "y")]}, "message 2 is a tool's result, but no call"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, 'unknown role "bing"'),
        ({"prompt": "x", "completion": None}, "expected a list of messages"),
        ({"instruction": None, "output": "x"}, "instruction is missing"),
        ({"text": 5}, "text is 5; expected text"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(row, said, write):
    filler = ROWS["messages"][0] if "messages" in row else row
    path = write("d.jsonl", *[{**dict.fromkeys(row), **filler}] * (filler is not row), row)
    source = load_conversations(path)
    with pytest.raises(InputError) as error:
        source.conversations(0, len(source))
    assert said in str(error.value)
    assert f"{path}, row {len(source)}:" in str(error.value)


# ---- the hub


def test_an_id_that_is_not_cached_without_network():
    with pytest.raises(InputError, match=r"nobody/nothing .*(cache|local file)"):
        load_conversations("nobody/nothing")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach it"), "is not in the cache and the hub cannot be reached"),
        (ValueError('Unknown split "dev". Should be one of [\'train\', \'test\'].'), "Unknown split \"dev\""),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']"),
            "add one, as owner/set:main",
        ),
    ],
)  # fmt: skip
def test_what_the_hub_says_becomes_one_line(error, said, monkeypatch):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError) as raised:
        load_conversations("owner/set")
    assert said in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_a_configuration_of_a_hub_set_is_named_after_a_colon(monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return Dataset.from_list([{"text": "one"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_conversations("owner/set:main", "test")[0] == "one"
    assert asked == [(("owner/set", "main"), {"split": "test"})]
