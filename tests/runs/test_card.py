"""The model card's table of evaluations, and what it says where little is known."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from jaxlora.config.schema import Config, to_dict
from jaxlora.lora.spec import LoraSpec
from jaxlora.runs.card import MOST_ROWS, Export, model_card, thinned, vllm_command
from jaxlora.runs.directory import RunDirectory

LORA = LoraSpec(rank=4, alpha=8.0, targets=("q_proj",))
CONFIG = to_dict(Config.from_dict({"model": {"path": "o/n"}, "data": {"train": ["a|b.jsonl", "o/data"]}}))


@given(st.sets(st.integers(0, 10**6), min_size=1, max_size=60), st.data())
def test_a_long_curve_is_thinned_evenly_and_keeps_what_matters(steps, data):
    ordered = sorted(steps)
    kept = {data.draw(st.sampled_from(ordered)), data.draw(st.sampled_from(ordered)), None}
    found = thinned(ordered, kept)
    assert found == sorted(set(found) & steps)
    assert {ordered[0], ordered[-1], *kept} - {None} <= set(found)
    assert len(found) == min(len(steps), MOST_ROWS)
    positions = [ordered.index(step) for step in found]
    gaps = [after - before for before, after in itertools.pairwise(positions)]
    assert max(gaps, default=1) <= 2 * -(-len(ordered) // (MOST_ROWS - 4))


def test_the_curve_marks_the_best_and_writes_what_is_not_finite(tmp_path):
    with RunDirectory.open(tmp_path / "run", CONFIG) as run:
        for step in range(0, 5000, 100):
            run.append_metrics(
                step, {"eval/nll": float("nan") if step == 4900 else 2 - step / 5000, "eval/perplexity": 3.0}
            )
            run.append_metrics(step, {"train/nll": 1.0})
        run.update_record(status="stopped_early", best={"step": 4800, "eval/nll": 1.04})
        card = model_card(Export(True, "o/n", "abc", LORA, run, 1300), "out")
    table = card[card.index("| step |") : card.index("## How")].strip().splitlines()
    assert table[0] == "| step | eval/nll | eval/perplexity |  |"
    assert len(table) == 2 + MOST_ROWS
    assert "| 4,800 | 1.0400 | 3.0000 | best |" in table
    assert "| 1,300 | 1.7400 | 3.0000 | exported |" in table
    assert table[-1] == "| 4,900 | nan | 3.0000 |  |"
    assert "The run: stopped early." in card
    assert 'base_model: "o/n"\nlibrary_name: transformers\n' in card
    assert "| train | `a\\|b.jsonl`, `o/data` |  |  |  |" in card
    assert "| eval | held out of the training data |" in card


def test_a_run_that_has_hardly_begun_and_an_adapter_of_unknown_origin(tmp_path):
    with RunDirectory.open(tmp_path / "run", CONFIG) as run:
        card = model_card(Export(False, "o/n", "abc", LORA, run), "out")
    assert "The run: not begun." in card
    assert "## Evaluation" not in card
    assert "## Versions" not in card
    card = model_card(Export(False, "o/n", "abc", LORA, source="some/adapter"), "out")
    assert "It was exported from `some/adapter`." in card
    assert 'from_pretrained("o/n", revision="abc", dtype="auto")' in card
    assert "## Settings" not in card


def test_vllm_is_given_a_rank_that_it_takes():
    def command(**spec):
        return vllm_command(Export(False, "o/n", "", LoraSpec(**spec)), "out")

    ranks = {1: 1, 4: 8, 8: 8, 9: 16, 48: 64, 300: 320, 512: 512}
    for rank, taken in ranks.items():
        assert f"--max-lora-rank {taken} " in (command(rank=rank) or "")
    assert command(rank=513) is None
    assert command(use_dora=True) is None
    assert vllm_command(Export(True, "o/n", "", LoraSpec(use_dora=True)), "out") == "vllm serve out"
