"""Templates and conversations that cannot be used: one line with the row and the remedy, exit code 2, nothing left."""

import json
import shutil

import pytest

SOMETIMES = "{% if m.role == 'system' and messages | length > 3 %}{% continue %}{% endif %}"


def talk(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


LONG = talk(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
CALLING = {
    **talk(("user", "a"), ("assistant", "b")),
    "tools": [{"type": "function", "function": {"name": "f"}}],
}


@pytest.mark.parametrize(
    ("old", "new", "row", "said"),
    [
        (
            "",
            "",
            talk(("assistant", "a"), ("user", "b")),
            "row 3: the conversation starts with the assistant; ",
        ),
        ("", "", talk(("user", "a"), ("user", "b")), "row 3: message 2 makes two user turns in a row; "),
        ("", "", CALLING, "row 3: it has tools, which the model's chat template does not show "),
        ("m.content", "m.content['x']", LONG, "row 1: the chat template does not render this conversation: "),
        (
            "{% for m in messages %}",
            "{% for m in messages %}" + SOMETIMES,
            LONG,
            "row 3: the chat template leaves out",
        ),
        (
            "m.content",
            "('!' if loop.last and m.role != 'user' else '') + m.content",
            LONG,
            "row 3: the chat template shows the assistant's",
        ),
        ("}}", "}", LONG, "the model's chat template is not valid jinja (line 3: "),
        (None, None, LONG, "has no chat template; use a chat model, or put a chat_template.jinja into "),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(old, new, row, said, project, call, tmp_path):
    model, rows = tmp_path / "model", tmp_path / "train.jsonl"
    shutil.copytree(project.model, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    template = config.pop("chat_template")
    if old is not None:
        config["chat_template"] = template.replace(old, new)
        assert old == "" or config["chat_template"] != template
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    good = talk(("user", "a"), ("assistant", "b"))
    rows.write_text("".join(json.dumps(row) + "\n" for row in (good, good, row)))
    run = tmp_path / "run"
    ended = call(project.arguments(run, model__path=model, data__train=rows, data__eval=rows))
    assert ended.code == 2
    assert said in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not run.exists()
