"""Rows with tools, from the file to the conversation: exactly what the file says, or a reason."""

import json

import pytest
from datasets import Dataset

from jaxlora.core.errors import InputError
from jaxlora.data.batches import prepare
from jaxlora.data.sources import load_conversations


def schema(name, properties, **more):
    """A tool's schema, with its keys in an order of its own."""
    parameters = {"properties": properties, "type": "object", **more}
    return {
        "function": {"description": f"Does {name}", "name": name, "parameters": parameters},
        "type": "function",
    }


def call(name, arguments, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


TOOLS = {
    "look": schema("look", {"where": {"type": "string", "enum": ["in", "out"]}}, required=["where"]),
    "sum": schema("sum", {"of": {"type": "array", "items": {"type": "number"}}, "start": {"default": None}}),
    "wait": {"type": "function", "function": {"name": "wait", "description": "Waits"}},
    "set": schema("set", {"to": {"type": ["string", "null"], "default": 0.30000000000000004}}, strict=True),
}
CALLS = {
    "look": call("look", {"where": "in"}),
    "sum": call("sum", {"of": [1, 2.5, 48.85884430000123], "start": None}),
    "wait": call("wait", {}),
    "set": call("set", {"to": None, "by": {"name": "x", "big": 12345678901234567890}}),
}


def row(name, *described):
    """A row in which one tool of those described is called."""
    messages = [
        {"role": "user", "content": name},
        {"role": "assistant", "content": None, "tool_calls": [CALLS[name]]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "Done."},
    ]
    return {"messages": messages, "tools": [TOOLS[tool] for tool in described]}


ROWS = [
    row("look", "look", "sum"),
    row("sum", "wait", "sum"),
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": None},
    row("wait", "wait"),
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    row("set", "set", "look"),
]


def expected(row):
    """The conversation of such a row."""
    first, *rest = [{**message, "content": message["content"] or ""} for message in row["messages"]]
    return [first | ({"tools": row["tools"]} if row.get("tools") else {}), *rest]


def same(found, wanted):
    """Equal, and with every key in the same place: templates write them in their order."""
    return json.dumps(found) == json.dumps(wanted)


# ---- files


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_different_tools_come_out_of_a_file_as_they_went_in(name, write, chatml_tools, spell, tmp_path):
    path = write("d.jsonl", *ROWS) if name == "d.jsonl" else write(name, json.dumps(ROWS, indent=1))
    source = load_conversations(path)
    assert same(source.conversations(0, 6), [expected(row) for row in ROWS])
    assert source.description == f"{path}: 6 rows of messages"
    examples = prepare(source, chatml_tools, 2000, cache=tmp_path)
    for e, row in enumerate(ROWS):
        text = spell(chatml_tools, examples[e].ids.tolist())
        assert all("\n" + json.dumps(tool) in text for tool in row.get("tools") or ())
        calls = [call["function"] for message in row["messages"] for call in message.get("tool_calls", ())]
        assert all(json.dumps(call) in text for call in calls)


@pytest.mark.parametrize("split", ["train[2:4]", "train[50%:]", "train[:1]+train[5:]"])
def test_a_slice_of_such_a_file_is_the_slice_of_any_other(split, write):
    tooled = load_conversations(write("a.jsonl", *ROWS), split)
    plain = load_conversations(write("b.jsonl", *[{"text": str(i)} for i in range(6)]), split)
    wanted = [expected(ROWS[int(i)]) for i in plain.conversations(0, len(plain))]
    assert same(tooled.conversations(0, len(tooled)), wanted)


def test_a_changed_file_is_read_anew(write):
    first = load_conversations(write("d.jsonl", ROWS[0]))
    again = load_conversations(write("d.jsonl", ROWS[1]))
    assert (same(first[0], expected(ROWS[0])), same(again[0], expected(ROWS[1]))) == (True, True)


def test_tools_and_calls_may_be_json_text(write):
    texts = {"messages": json.dumps(ROWS[1]["messages"]), "tools": json.dumps(ROWS[1]["tools"])}
    assert same(load_conversations(write("d.jsonl", texts))[0], expected(ROWS[1]))
    cells = ",".join('"' + text.replace('"', '""') + '"' for text in texts.values())
    assert same(load_conversations(write("d.csv", "messages,tools\n", cells + "\n"))[0], expected(ROWS[1]))
    messages = [dict(message) for message in ROWS[1]["messages"]]
    messages[1]["tool_calls"] = [call("sum", json.dumps(CALLS["sum"]["function"]["arguments"]))]
    source = load_conversations(write("e.jsonl", {"messages": messages, "tools": texts["tools"]}))
    assert same(source[0], expected(ROWS[1]))


def test_a_table_gives_no_tool_the_keys_of_another(write, tmp_path):
    """Arrow has one type for all rows: what has no value there was, as far as anyone can tell, never in the row."""
    rows = [row("look", "look", "set"), row("wait", "wait")]
    rows[0]["tools"][1] = schema("set", {"to": {"type": "string"}})
    Dataset.from_list(rows).to_parquet(path := str(tmp_path / "d.parquet"))
    source = load_conversations(path)
    assert source.parts[0].rows[1]["tools"][0]["function"]["parameters"] is None
    found = source.conversations(0, 2)
    assert found == [expected(row) for row in rows]


def test_other_kinds_of_rows_may_have_tools(write):
    tools = [TOOLS["look"]]
    sharegpt = {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "system": "s",
        "tools": tools,
    }
    assert load_conversations(write("a.jsonl", sharegpt))[0][0] == {
        "role": "system",
        "content": "s",
        "tools": tools,
    }
    for row in (
        {"prompt": "a", "completion": "b", "tools": tools},
        {"instruction": "a", "output": "b", "tools": tools},
    ):
        assert load_conversations(write("b.jsonl", row))[0][0] == {
            "role": "user",
            "content": "a",
            "tools": tools,
        }


def test_calls_are_read_in_other_shapes_too(write):
    shapes = [
        {"name": "look", "arguments": {"where": "in"}, "id": "1", "index": 0},
        {"type": "function", "id": "1", "function": {"arguments": '{"where": "in"}', "name": "look"}},
    ]
    for shape in shapes:
        messages = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [shape]},
        ]
        found = load_conversations(write("d.jsonl", {"messages": messages}))[0][1]["tool_calls"]
        assert same(found, [{**CALLS["look"], "id": "1"}])
    result = {"role": "tool", "content": "x", "tool_call_id": "1", "name": "look"}
    source = load_conversations(write("d.jsonl", {"messages": [*messages, result]}))
    assert source[0][2] == result


# ---- wrong input

USER, CALLING, RESULT, SAID = ROWS[0]["messages"]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (
            [USER, CALLING, USER],
            "message 3 is the user's, but the call of a tool before it has no result; put",
        ),
        (
            [USER, CALLING, SAID],
            "message 3 is the assistant's, but the call of a tool before it has no result; put",
        ),
        (
            [USER, CALLING, CALLING],
            "message 3 is the assistant's, but the call of a tool before it has no result; put",
        ),
        ([USER, RESULT, SAID], "message 2 is a tool's result, but no call of a tool stands before it; put"),
        ([RESULT, USER, SAID], "message 1 is a tool's result, but no call of a tool stands before it; put"),
        (
            [CALLING, RESULT, SAID],
            "the conversation starts with the assistant; user and assistant must take turns",
        ),
        (
            [USER, CALLING, RESULT, USER],
            "message 4 is the user's, but the assistant has not answered the tool",
        ),
        (
            [USER, SAID, SAID],
            "message 3 makes two assistant turns in a row; user and assistant must take turns: join",
        ),
        (
            [{**USER, "tool_calls": [CALLS["look"]]}, SAID],
            "message 1 is the user's and carries tool_calls; only the",
        ),
        (
            [USER, {**CALLING, "tool_calls": "look"}],
            'the tool_calls of message 2 are "look"; expected a list of',
        ),
        (
            [USER, {**CALLING, "tool_calls": [call(None, {})]}],
            "tool call 1 of message 2 has the name missing; expected",
        ),
        (
            [USER, {**CALLING, "tool_calls": [CALLS["look"], call("f", "{oops")]}],
            'tool call 2 of message 2 has the arguments "{oops"; expected an object, or one as JSON text',
        ),
        (
            [USER, {**CALLING, "tool_calls": [call("f", [1])]}],
            "tool call 1 of message 2 has the arguments [1]; expected an object",
        ),
        (
            [USER, {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": {}, "why": "x"}}]}],
            "tool call 1 of message 2 carries why, which is not supported: it would be lost",
        ),
        (
            [USER, CALLING, {**RESULT, "content": {"a": 1}}],
            'the content of message 3 is {"a": 1}; expected text',
        ),
        ([USER, CALLING, {**RESULT, "content": None}], "the content of message 3 is missing; expected text"),
    ],
)
def test_a_row_in_which_tools_make_no_sense_is_named(messages, said, write):
    path = write("d.jsonl", ROWS[0], {"messages": messages})
    with pytest.raises(InputError) as error:
        load_conversations(path).conversations(0, 2)
    assert str(error.value).startswith(f"{path}, row 2: {said}")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {**ROWS[0], "tools": "look"},
            'tools is "look"; expected a list of JSON schemas, or the same as JSON text',
        ),
        ({**ROWS[0], "tools": ["look"]}, 'tools is ["look"]; expected a list of JSON schemas'),
        ({"text": "a", "tools": ROWS[0]["tools"]}, "it has tools, but its text is no conversation"),
    ],
)
def test_tools_that_are_none_are_refused(row, said, write):
    source = load_conversations(write("d.jsonl", row))
    with pytest.raises(InputError) as error:
        source.conversations(0, 1)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.jsonl", json.dumps(ROWS[0]) + "\n{oops\n", "line 2 is not valid JSON"),
        ("d.jsonl", json.dumps(ROWS[0]) + "\n[1]\n", "line 2 is not a JSON object"),
        ("d.json", json.dumps([ROWS[0], 3]), "something other than JSON objects"),
        ("d.jsonl", json.dumps({**ROWS[0], "more": "\ud83d"}) + "\n", "surrogates not allowed"),
    ],
)
def test_a_file_with_tools_that_cannot_be_read_is_explained(name, content, said, write):
    path = write(name, content)
    with pytest.raises(InputError) as error:
        load_conversations(path)
    assert said in str(error.value)
    assert path in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_the_row_that_cannot_be_encoded_is_named(write, chatml, tmp_path):
    path = write("d.jsonl", ROWS[2], ROWS[2], ROWS[0])
    with pytest.raises(InputError) as error:
        prepare(load_conversations(path), chatml, 2000, cache=tmp_path)
    assert str(error.value).startswith(
        f"{path}, row 3: it has tools, which the model's chat template does not show"
    )
