"""The demo's data teaches manner and nothing else, and the demo learns it."""

import re
import subprocess
import sys
from statistics import mean

import pytest

from fastdpo import demo

SPLITS = ("train", "text", "test")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[demo.Row]]:
    return {name: demo.load_pairs(name) for name in SPLITS}


@pytest.fixture(scope="module")
def tokenizer(splits):
    seen = splits["train"] + splits["text"]
    return demo.build_tokenizer([row["prompt"] + row[side] for row in seen for side in ("chosen", "rejected")])


def answer_lengths(tokenizer, rows, side):
    return [
        len(demo.encode(tokenizer, row["prompt"], row[side])) - len(tokenizer(row["prompt"])["input_ids"])
        for row in rows
    ]


def test_every_row_belongs_to_a_known_split_and_has_the_same_fields(splits):
    rows = [row for name in SPLITS for row in splits[name]]
    assert len(rows) == len(demo.PAIRS_FILE.read_text(encoding="utf-8").splitlines())
    assert 160 <= len(rows) <= 320
    assert {tuple(row) for row in rows} == {("split", "subject", "prompt", "chosen", "rejected")}


def test_no_held_out_prompt_is_ever_trained_on(splits):
    seen = {row["prompt"].casefold() for name in ("train", "text") for row in splits[name]}
    held_out = [row["prompt"].casefold() for row in splits["test"]]
    assert not seen & set(held_out)
    assert len(set(held_out)) == len(held_out)


def test_half_of_the_held_out_pairs_are_about_subjects_that_dpo_never_sees(splits):
    trained = {row["subject"] for row in splits["train"]}
    assert sum(row["subject"] not in trained for row in splits["test"]) == len(splits["test"]) // 2


def test_rows_are_unique_and_chosen_differs_from_rejected(splits):
    rows = [(row["prompt"], row["chosen"], row["rejected"]) for name in SPLITS for row in splits[name]]
    assert len(set(rows)) == len(rows)
    assert all(chosen != rejected for _, chosen, rejected in rows)


@pytest.mark.parametrize("name", ["train", "test"])
def test_chosen_and_rejected_are_alike_in_length(splits, tokenizer, name):
    chosen, rejected = (answer_lengths(tokenizer, splits[name], side) for side in ("chosen", "rejected"))
    assert mean(chosen) == pytest.approx(mean(rejected), rel=0.05)
    longer = sum(c > r for c, r in zip(chosen, rejected, strict=True))
    shorter = sum(c < r for c, r in zip(chosen, rejected, strict=True))
    assert abs(longer - shorter) <= 0.2 * len(chosen)  # guessing by length is right in 40 to 60% of the pairs


def test_no_first_word_and_no_single_word_gives_the_chosen_answer_away(splits):
    rows = splits["train"] + splits["test"]
    first = [row["chosen"].split()[0] for row in rows]
    assert max(first.count(word) for word in set(first)) < 0.15 * len(rows)
    chosen, rejected = ([set(re.findall(r"\w+", row[side].lower())) for row in rows] for side in ("chosen", "rejected"))
    for word in set().union(*chosen, *rejected):
        told_apart = abs(sum(word in words for words in chosen) - sum(word in words for words in rejected))
        assert told_apart < 0.3 * len(rows), word


def test_tokenizer_gives_back_what_it_read_and_splits_at_the_end_of_the_prompt(splits, tokenizer):
    for row in splits["test"]:
        for side in ("chosen", "rejected"):
            whole, prompt = demo.encode(tokenizer, row["prompt"], row[side]), tokenizer(row["prompt"])["input_ids"]
            assert whole[: len(prompt)] == prompt
            assert whole.count(tokenizer.bos_token_id) == whole.count(tokenizer.eos_token_id) == 1
            assert tokenizer.decode(whole, skip_special_tokens=True) == row["prompt"] + row[side]


def test_conclusion_fails_the_run_when_the_model_did_not_learn(tmp_path, capsys):
    assert demo.conclude(0.89, tmp_path, 1.0) == 1
    assert "did not learn" in capsys.readouterr().out
    assert demo.conclude(0.9, tmp_path, 1.0) == 0
    assert capsys.readouterr().out.strip().endswith("at least 0.9: learned (1 s in all)")


@pytest.mark.parametrize("arguments", [["--pairs", "0"], ["--warm_up_passes", "0"]], ids=["no_pairs", "no_warm_up"])
def test_a_run_with_nothing_to_learn_from_is_refused_at_once(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.main(arguments)
    assert "from 1 up" in capsys.readouterr().err


def test_demo_learns_manners_it_did_not_have_and_leaves_its_curves(tmp_path):
    command = [sys.executable, "-m", "fastdpo.cli", "demo", "--output_dir", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
    before, after = map(float, re.search(r"\(ranking\)\s+([\d.]+)\s+([\d.]+)", run.stdout).groups())
    assert 0.3 <= before <= 0.7 and after >= before + 0.25
    assert re.search(r"Held-out reward accuracy (0\.9\d|1\.00), at least 0\.9: learned", run.stdout)
    assert run.stdout.count("before DPO:") == run.stdout.count("after DPO:") == 2
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert str(tmp_path / "report.html") in run.stdout and (tmp_path / "report.html").stat().st_size > 20_000
    assert (tmp_path / "adapter_model.safetensors").exists()
