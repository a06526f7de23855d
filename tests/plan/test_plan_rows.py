"""Rows as the plan shows and writes them: whole, in the file's order, with what is trained in them."""

import json
import re
import shutil
import sys

import pytest

from jaxlora import plan
from jaxlora.config.build.dataplan import rows as planned_rows
from jaxlora.core.printing import printable
from jaxlora.data.batches import prepare
from jaxlora.data.chat import ChatEncoder, load_tokenizer
from jaxlora.data.sources import load_conversations
from jaxlora.data.visible import bracketed, tokens


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_whole_and_in_the_order_of_the_file(call, encoder, conversations, tmp_path):
    """Whatever is held out, cut, packed or shuffled for a run."""
    file = tmp_path / "rows.jsonl"
    code, out, _ = call(
        "--only", "data", "--rows", 7, "--rows-file", file, data__eval="", data__max_length=8, seed=3
    )
    assert code == 0
    assert "7 of 40 rows are in" in out
    expected = encoder.encode_batch([row["messages"] for row in conversations[:7]])
    for line, one in zip(read(file), expected, strict=True):
        assert line["ids"] == one.ids.tolist()
        assert line["trained"] == one.trained.astype(int).tolist()
        assert line["text"] == encoder.tokenizer.decode(one.ids)
        assert list(line) == ["ids", "trained", "text"]
    assert list(tmp_path.iterdir()) == [file]


def test_without_a_number_the_file_gets_all_rows_and_the_terminal_a_few(call, tmp_path):
    file = tmp_path / "rows.jsonl"
    code, out, _ = call("--rows-file", file)
    assert code == 0
    assert len(read(file)) == 40
    assert out.count("turns") == plan.DEFAULT_ROWS
    assert "40 of 40 rows are in" in out


def test_a_disk_that_fills_up_leaves_the_old_file(call, full_disk, tmp_path):
    file = tmp_path / "rows.jsonl"
    call("--rows", 1)  # what datasets keeps of the data is on the disk by now
    file.write_text("old")
    with full_disk(4000):
        code, _, said = call("--rows-file", file)
    assert code == 2
    assert f"--rows-file {file} could not be written (File too large); what was there before stays" in said
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert file.read_text() == "old"


def test_more_rows_than_there_are(call):
    code, out, _ = call("--rows", 100)
    assert code == 0
    assert out.count("turns") == 40
    assert "--rows 100: these are all 40 rows of data.train" in out


def test_several_files_are_named_where_their_rows_stand(call, folder):
    both = f"('{folder}/eval.jsonl','{folder}/train.jsonl')"
    code, out, _ = call("--rows", 12, data__train=both)
    assert code == 0
    assert f"{folder}/eval.jsonl, row 10: 4 turns" in out
    assert f"{folder}/train.jsonl, row 2: 4 turns" in out


def test_a_row_in_a_pipe(call, talk, write_rows, tmp_path):
    rows = [talk("hi", "yes\nno", system="be brief"), {"messages": talk("a", "b" * 60, "c", "d")["messages"]}]
    code, out, err = call("--rows", 2, data__train=write_rows(tmp_path / "a.jsonl", rows))
    assert code == 0
    assert "\x1b" not in out + err
    shown = (
        "row 1: 2 turns, 47 tokens, 7 trained (15%)\n"
        "  <|im_start|>system↵\n  be brief<|im_end|>↵\n"
        "  <|im_start|>user↵\n  hi<|im_end|>↵\n"
        "  <|im_start|>assistant↵\n  ⟦yes↵\n  no<|im_end|>⟧↵\n\n"
    )
    assert shown in out
    # 9 + 11 ids come before the 60 b's; of 63 trained ids, 65 - 20 are among the 65 of 64 positions and their targets
    assert (
        "row 2: 4 turns, 105 tokens, 63 trained (60%); cut at data.max_length 64: 18 trained tokens lost"
        in out
    )


def test_rows_that_lose_all_that_is_trained_are_called_dropped(call):
    code, out, _ = call(data__max_length=8)
    assert code == 0
    assert out.count("; dropped: nothing trained is left within data.max_length 8") == plan.DEFAULT_ROWS
    assert "training would refuse this: every conversation of" in out


@pytest.mark.parametrize("max_length", [25, 30, 40, 50])
def test_cut_and_dropped_are_those_that_training_counts(max_length, folder, encoder, tmp_path):
    source = load_conversations(str(folder / "train.jsonl"))
    examples = prepare(source, encoder, max_length, cache=tmp_path)
    told = [row.describe(max_length) for row in planned_rows(source, encoder)]
    assert sum("; cut at" in line for line in told) == examples.truncated
    assert sum("; dropped:" in line for line in told) == examples.dropped
    assert len(told) == 40


def test_plain_text(call, write_rows, tmp_path):
    file = write_rows(tmp_path / "texts.jsonl", [{"text": f"text {i}"} for i in range(30)])
    code, out, _ = call("--rows", 1, data__train=file)
    assert code == 0
    assert "row 1: plain text, 7 tokens, 7 trained (100%)\n  ⟦text 0<|im_end|>⟧\n" in out


# ---- what can be seen -----------------------------------------------------------------------------------------------


def test_tokens_are_the_text_with_controls_made_visible(encoder, talk):
    text = "é\x1b[31m\x9b\x07 日本\u202e\u2028\t\r\x7f�"
    (encoded,) = encoder.encode_batch([talk("<|im_end|>", text)["messages"]])
    shown = tokens(encoder.tokenizer, encoded)
    assert len(shown) == len(encoded.ids)
    assert "".join(token.text for token in shown) == printable(encoder.tokenizer.decode(encoded.ids))
    assert f"⟦{printable(text)}<|im_end|>⟧" in bracketed(shown)
    assert printable(text) == "é␛[31m\\u009b␇ 日本\\u202e\\u2028⇥\t␍␡�"
    assert [token.text for token in shown if token.special] == ["<|im_start|>", "<|im_end|>"] * 2
    assert sum(token.trained for token in shown) == len(text.encode()) + 1


def test_no_control_character_of_the_data_reaches_the_output(call, talk, write_rows, conversations, tmp_path):
    rows = [talk("\x1b]0;title\x07 \x9b31m", "\x1b[2J\x7f\u202e"), *conversations]
    file = tmp_path / "rows.jsonl"
    name = write_rows(tmp_path / "train.jsonl", [{**row, "a\x1bb": 1} for row in rows])
    code, out, err = call("--rows", 1, "--rows-file", file, data__train=name)
    assert code == 0
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028]", out + err)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", file.read_text())
    assert "\x1b[2J\x7f" in read(file)[0]["text"]


def pretend_a_terminal(monkeypatch):
    """Standard output passes for a terminal of 60 columns (not in a fixture: pytest changes it after those)."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_on_a_terminal_trained_tokens_are_coloured(call, talk, write_rows, tmp_path, monkeypatch):
    pretend_a_terminal(monkeypatch)
    rows = [talk("hi", "some words " * 20), *[talk("a", "b")] * 9]
    code, out, _ = call("--rows", 1, data__train=write_rows(tmp_path / "a.jsonl", rows))
    assert code == 0
    shown = out[out.rindex("\n", 0, out.index("<|im_start|>")) : out.index("data.train: ")]
    green = re.findall(r"\x1b\[(?:1;)?(?:32|92)m([^\x1b]*)", shown)
    assert re.sub(r"\s+", " ", "".join(green)) == "some words " * 20 + "<|im_end|>"
    assert "⟦" not in out
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert max(map(len, lines)) <= 60
    assert all(line.startswith("  ") for line in lines if line)


def test_without_colour_a_terminal_gets_brackets(call, monkeypatch):
    pretend_a_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    code, out, _ = call("--rows", 1)
    assert code == 0
    assert "⟦n<|im_end|>⟧" in out
    assert "\x1b[1mthe data" in out  # a terminal all the same
    assert not re.search(r"\x1b\[[0-9;]*[39][0-7]m", out)


# ---- real tokenizers ------------------------------------------------------------------------------------------------


def golden_qwen(real, tokenizer):
    cases = json.loads((real / "fixtures/qwen2.5_ids_and_masks.json").read_text())
    for case in cases:
        ids, mask = case["ids"], case["content_plus_im_end_mask"]
        if any("<|im_end|>" in message["content"] for message in case["messages"]):
            # The golden ids were made from rendered text, where the literal became a real token; here it is text.
            body = tokenizer.encode('```python\nprint("<|im_end|>")\n```\n\n', split_special_tokens=True)
            start = mask.index(1)
            ids = [*ids[:start], *body, *ids[-2:]]
            mask = [0] * start + [1] * (len(body) + 1) + [0]
        yield case["messages"], ids, mask


def golden_mistral(version):
    def cases(real, _):
        for line in (real / "fixtures/mistral_ids_and_masks.jsonl").read_text().splitlines():
            case = json.loads(line)
            yield case["messages"], case[version]["ids"], case[version]["assistant_mask"]

    return cases


@pytest.mark.parametrize("configured", [True, False], ids=["with config.json", "without"])
@pytest.mark.parametrize(
    ("name", "golden", "count"),
    [
        ("qwen2.5", golden_qwen, 5),
        ("mistral-v0.1", golden_mistral("v1"), 200),
        ("mistral-v0.3", golden_mistral("v3"), 200),
    ],
)
def test_golden_rows(name, golden, count, configured, real, call, write_rows, tmp_path):
    """A model's folder without weights, and without its config: the same ids and masks, whole."""
    model = shutil.copytree(real / "tokenizers" / name, tmp_path / "model")
    if not configured:
        (model / "config.json").unlink()
    tokenizer = load_tokenizer(str(model))
    cases = list(golden(real, tokenizer))
    data = write_rows(tmp_path / "data.jsonl", [{"messages": messages} for messages, *_ in cases])
    code, _, err = call(
        "--only", "data", "--rows-file", tmp_path / "rows.jsonl",
        model__path=model, data__train=data, data__eval="",
    )  # fmt: skip
    assert code == 0, err
    rows = read(tmp_path / "rows.jsonl")
    assert len(rows) == count
    for row, (_, ids, mask) in zip(rows, cases, strict=True):
        assert row["ids"] == ids
        assert row["trained"] == mask
        assert row["text"] == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["qwen2.5", "mistral-v0.1", "mistral-v0.3"])
def test_shown_tokens_are_the_text_of_real_talks(name, real):
    encoder = ChatEncoder(load_tokenizer(str(real / "tokenizers" / name)))
    rows = load_conversations(str(real / "data/taskmaster4_multiturn.jsonl")).conversations(0, 100)
    for encoded in encoder.encode_batch(rows):
        shown = "".join(token.text for token in tokens(encoder.tokenizer, encoded))
        assert shown == printable(encoder.tokenizer.decode(encoded.ids))
