"""docs/journal-rules.md tells of every threshold, with the value that it has, and of every source of advice."""

import re

from jaxlora.experiments import thresholds
from jaxlora.experiments.advice import RULES


def test_the_page_has_every_threshold_with_its_value_and_no_other(repository):
    page = (repository / "docs" / "journal-rules.md").read_text()
    listed = dict(re.findall(r"^\| `([A-Z_]+)` \| (.+) \|$", page, re.MULTILINE))
    real = {name: value for name, value in vars(thresholds).items() if name.isupper()}
    assert {name: tuple(float(part) for part in value.split(", ")) for name, value in listed.items()} == {
        name: value if isinstance(value, tuple) else (value,) for name, value in real.items()
    }
    rules = page.partition("## The numbers")[0]
    assert [name for name in real if f"`{name}`" not in rules] == []


def test_the_page_has_every_source(repository):
    page = (repository / "docs" / "journal-rules.md").read_text()
    for _, source in RULES:
        author = source.removeprefix("docs/").partition(",")[0]
        assert source == "this log" or author in page
