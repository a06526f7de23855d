"""Every pain on the list has a test here that bears its name and quotes what must hold."""

import ast
import os
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent

PAINS = {
    # the words of the one who has it -> the tests that fail when it comes back; the first bears its name
    "Evaluating with metrics runs out of memory": (
        "test_evaluating_with_metrics_runs_out_of_memory",
        "test_evaluating_with_metrics_runs_out_of_memory_however_many_rows",
    ),
    "Switching the memory-saving loss on silently changes or breaks metrics": (
        "test_switching_the_memory_saving_loss_on_silently_changes_or_breaks_metrics",
    ),
    "Label smoothing crashes, or takes three vocabulary-sized tensors, or ignores masks": (
        "test_label_smoothing_crashes_or_takes_three_vocabulary_sized_tensors",
        "test_label_smoothing_crashes_or_ignores_masks",
    ),
    "Loss is N times too large under gradient accumulation, or differs from the large batch": (
        "test_loss_is_n_times_too_large_under_gradient_accumulation",
    ),
    "Eval loss depends on eval batch size": ("test_eval_loss_depends_on_eval_batch_size",),
    "Runs with label smoothing look worse and can't be compared": (
        "test_runs_with_label_smoothing_look_worse_and_cant_be_compared",
    ),
    "Early stopping fires although the loss falls steadily": (
        "test_early_stopping_fires_although_the_loss_falls_steadily",
    ),
    "The best checkpoint is gone, or overwritten after a resume": (
        "test_the_best_checkpoint_is_gone_or_overwritten_after_a_resume",
    ),
    "NaN is shown as loss 0.0 and the run goes on to its end": (
        "test_nan_is_shown_as_loss_0_0_and_the_run_goes_on_to_its_end",
        "test_nan_is_shown_as_loss_0_0",
    ),
    "A conversation trains on nothing, or on the prompt": (
        "test_a_conversation_trains_on_nothing_or_on_the_prompt",
        "test_a_conversation_trains_on_the_golden_masks",
    ),
    "Mistral v0.3's template drops the system message of a conversation that ends with the assistant": (
        "test_mistral_v0_3s_template_drops_the_system_message",
        "test_mistral_v0_3s_template_drops_the_system_message_of_the_real_one",
    ),
    "A literal `<|im_end|>` inside a message becomes the real special token": (
        "test_a_literal_im_end_inside_a_message_becomes_the_real_special_token",
        "test_a_literal_im_end_in_a_prompt_becomes_the_real_special_token",
    ),
    "Packed examples see each other": ("test_packed_examples_see_each_other",),
    "Truncation cuts the answer and nobody notices": ("test_truncation_cuts_the_answer_and_nobody_notices",),
    "LoRA + scan copies the base": ("test_lora_scan_copies_the_base",),
    "Weight decay seems to do nothing": ("test_weight_decay_seems_to_do_nothing",),
    "Two runs that differ only in rank also differ in step size": (
        "test_two_runs_that_differ_only_in_rank_also_differ_in_step_size",
    ),
    "A resumed run sees other data": ("test_a_resumed_run_sees_other_data",),
    "Merged or exported adapters give other answers": (
        "test_merged_or_exported_adapters_give_other_answers",
        "test_merged_or_exported_adapters_give_other_answers_in_peft",
    ),
    "Saving stops the run for seconds; a full disk kills it and spoils the last good checkpoint": (
        "test_saving_stops_the_run_for_seconds",
        "test_saving_stops_the_run_a_full_disk_kills_it_and_spoils_the_last_good_checkpoint",
    ),
}


def quotes() -> dict[str, str]:
    """The tests of the other files here -> their docstrings, with white space made even."""
    functions = (
        node
        for file in HERE.glob("test_*.py")
        if file != Path(__file__)
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )
    return {function.name: " ".join((ast.get_docstring(function) or "").split()) for function in functions}


def test_every_pain_has_tests_and_every_test_a_pain():
    assert sorted(name for names in PAINS.values() for name in names) == sorted(quotes())
    for pain, (first, *_) in PAINS.items():
        words = re.sub(r"[^a-z0-9]+", "_", pain.lower().replace("'", ""))
        assert f"test_{words}".startswith(first), pain


def test_every_row_of_the_list_is_here_with_what_must_hold(repository):
    path = Path(os.environ.get("JAXLORA_PAINS", repository.parent / "shared" / "PAINS.md"))
    if not path.is_file():
        pytest.skip(f"no list of pains at {path} (set JAXLORA_PAINS)")
    table = [line for line in path.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)] for line in table[2:]]
    assert [pain for _, pain, *_ in rows] == list(PAINS)
    quoted = quotes()
    for _, pain, _, must_hold, _ in rows:
        assert {quoted[name] for name in PAINS[pain]} == {must_hold}
