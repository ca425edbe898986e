"""The generated parts of the front page and its pictures, from made-up results in a folder of their own."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # plain `pytest` finds tests/ only
from benchmarks import front_page, memory_table, pages, picture, table, worst  # noqa: E402

H200 = {"gpu": "NVIDIA H200", "gpu_memory": 150 * 2**30, "cuda": "13.0", "driver": "580.1"}
XEON = {"cpu": "Intel(R) Xeon(R) Processor", "cores": 2, "threads": 2}


def step(folder: Path, speeds: dict[str, float | str], **facts: Any) -> None:
    """A result with these pairs a second, or a reason for none; fastdpo takes 10 GiB and others 20."""
    setting = {"device": "cuda", "model": "llama-3.1-8b", "profile": "hh-rlhf", "batch": 8, "lora_rank": 16, **facts}
    rows = {
        name: {"failed": speed}
        if isinstance(speed, str)
        else {
            "pairs_per_second": {"1": speed},
            "mfu": {"1": speed / 20},
            "peak_memory": (10 if name == "fastdpo" else 20) * 2**30,
        }
        for name, speed in speeds.items()
    }
    work = {"batch": setting["batch"], "lora_rank": setting["lora_rank"], "dtype": "bfloat16"}
    result = {
        **{name: setting[name] for name in ("device", "model", "profile")},
        **{"workload": work, "configurations": rows, "python": "3.12", "uncommitted_changes": False},
        "machine": XEON | (H200 if setting["device"] == "cuda" else {}),
        "versions": {"torch": "2.11", "unsloth": "not installed"},
        "date": facts.get("date", "2026-01-01"),
        "commit": facts.get("commit", "abcdef0123456789"),
    }
    named = [setting[name] for name in ("device", "model", "profile", "batch")]
    (folder / table.file_name("step", *named, full=not setting["lora_rank"])).write_text(json.dumps(result))


def rows_of(text: str) -> list[list[str]]:
    return [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("|")][2:]


def test_a_row_has_speed_ratio_and_memory_of_each_contender_and_says_who_failed(tmp_path: Path) -> None:
    speeds: dict[str, float | str] = {"fastdpo": 12.0, "TRL default": 4.0, "TRL tuned": "MemoryError: out of it"}
    step(tmp_path, {**speeds, "fastdpo leanest": 8.0, "TRL tuned, Liger": 6.0, "Unsloth": "not installed"})
    assert rows_of(front_page.speed(tmp_path)) == [
        [
            "Llama-3.1-8B's shape, LoRA r=16, pairs as long as HH-RLHF's; NVIDIA H200, bfloat16",
            "**12**, 10.0 GiB, MFU 60%",
            "4 (3.0x), 20.0 GiB",
            "failed",
            "fastdpo leanest: 8 (1.5x), 20.0 GiB<br>TRL tuned, Liger: 6 (2.0x), 20.0 GiB<br>Unsloth: not installed",
        ]
    ]


def test_gpus_stand_above_cpus_and_a_contender_that_nobody_ran_leaves_its_cell_empty(tmp_path: Path) -> None:
    step(tmp_path, {"fastdpo": 2.0, "TRL default": 1.0}, device="cpu", model="20m")
    step(tmp_path, {"fastdpo": 12.0, "TRL tuned": 4.0}, profile="ultrafeedback", model="mistral-7b-nf4")
    step(tmp_path, {"fastdpo": 12.0, "TRL tuned": 4.0}, profile="helpsteer")
    rows = rows_of(front_page.speed(tmp_path))
    assert [row[0].split(", ")[0] for row in rows] == [
        "Llama-3.1-8B's shape",
        "Mistral-7B-v0.3's shape in NF4",
        "A Llama of 20M parameters",
    ]
    assert [row[2] for row in rows] == ["", "", "1 (2.0x), 20.0 GiB"]


def test_a_machine_stands_once_with_all_dates_and_commits_of_its_results(tmp_path: Path) -> None:
    step(tmp_path, {"fastdpo": 2.0})
    step(tmp_path, {"fastdpo": 2.0}, profile="helpsteer", date="2026-02-02", commit="fedcba987654")
    text = front_page.speed(tmp_path)
    assert text.count("driver 580.1") == 1 and text.count("torch 2.11") == 1 and "unsloth" not in text
    assert "2026-01-01 to 2026-02-02, commits abcdef012345, fedcba987654." in text


def test_the_claim_is_a_gpus_where_there_is_one_and_names_the_closest_rival(tmp_path: Path) -> None:
    speeds: dict[str, float | str] = {"fastdpo": 12.0, "TRL default": 4.0, "TRL tuned": 6.0}
    step(tmp_path, {"fastdpo": 3.0, "TRL default": 2.0}, device="cpu", model="20m")
    assert "1.5 times as fast as TRL 1.16 as it comes" in front_page.claim(tmp_path)
    assert front_page.NO_GPU in front_page.claim(tmp_path)
    step(tmp_path, {**speeds, "Unsloth": 8.0})
    text = front_page.claim(tmp_path)
    assert "1.5 times as fast as Unsloth, 2.0 times as TRL tuned and 3.0 times as TRL 1.16 as it comes" in text
    assert "NVIDIA H200" in text and "0.50 of" in text and front_page.NO_GPU not in text


def test_the_claim_is_of_the_8b_model_on_hh_rlhf_where_others_were_measured_too(tmp_path: Path) -> None:
    for model, profile in (("llama-3.2-1b", "hh-rlhf"), ("llama-3.1-8b", "capybara"), ("llama-3.1-8b", "hh-rlhf")):
        step(tmp_path, {"fastdpo": 3.0, "TRL tuned": 2.0}, model=model, profile=profile)
    assert "of Llama-3.1-8B's shape, LoRA r=16, pairs as long as HH-RLHF's" in front_page.claim(tmp_path)


def test_a_case_of_little_gain_stands_in_its_own_table_and_not_among_the_others(tmp_path: Path) -> None:
    step(tmp_path, {"fastdpo": 3.0, "TRL tuned": 2.5}, profile="no-prompt", model="20m", device="cpu")
    step(tmp_path, {"fastdpo": 3.0, "TRL tuned": 2.0, "TRL": 1.0}, batch=1, model="20m", device="cpu")
    assert not rows_of(front_page.speed(tmp_path))
    text = front_page.gains_least(tmp_path)
    assert [row[1:] for row in rows_of(text)] == [["3", "1.20", ""], ["3", "1.50", "3.00"]]
    assert "It gains least here: nothing to share, nothing to pad, 1.20 times the speed of TRL tuned." in text
    step(tmp_path, {"fastdpo": 3.0, "TRL tuned": 4.0}, profile="short", lora_rank=None, model="20m", device="cpu")
    loses = f"It loses most here: {worst.CASES['short', 8, True, True]}, 0.75 times the speed of TRL tuned."
    assert loses in front_page.gains_least(tmp_path)


def test_another_batch_or_all_weights_are_said_where_they_are_no_case(tmp_path: Path) -> None:
    step(tmp_path, {"fastdpo": 3.0}, batch=4, lora_rank=None)
    assert rows_of(front_page.speed(tmp_path))[0][0].startswith(
        "Llama-3.1-8B's shape, all weights, pairs as long as HH-RLHF's, 4 a step; "
    )


def test_without_results_every_part_says_that_nothing_is_measured(tmp_path: Path) -> None:
    for name, draw in front_page.BLOCKS.items():
        assert "measured" in draw(tmp_path), name


def plan(folder: Path) -> dict[str, Any]:
    shutil.copy(table.RESULTS / memory_table.plan_file(memory_table.MODEL), folder)
    return json.loads((folder / memory_table.plan_file(memory_table.MODEL)).read_text())


def test_a_measured_picture_takes_the_place_of_the_predicted_one(tmp_path: Path) -> None:
    result = plan(tmp_path)
    text = front_page.longest_pair(tmp_path)
    assert "results/plan-llama-3.1-8b.svg" in text and "Predicted by `fastdpo plan`, not measured" in text
    cell = {"response": 5000, "too_long": 5100, "settled": True}
    found = {prompt: dict.fromkeys(map(str, result["gibs"]), cell) for prompt in result["prompts"]}
    result |= {"measured": True, "contenders": {"fastdpo": {"longest": found}, "TRL": {"longest": found}}}
    result |= {"machine": XEON | H200, "versions": {}, "python": "3.12", "date": "", "commit": "abc"}
    (tmp_path / "memory-cuda-llama-3.1-8b.json").write_text(json.dumps({**result, "uncommitted_changes": False}))
    text = front_page.longest_pair(tmp_path)
    assert "results/memory-cuda-llama-3.1-8b.svg" in text and "NVIDIA H200" in text and "redicted" not in text
    (drawn, *_) = [pages.picture.files(file, *drawing) for file, drawing in memory_table.pictures(tmp_path).items()]
    assert all("2 x 5,000" in svg and "redicted" not in svg for svg in drawn.values())


def test_a_bar_is_as_long_as_its_number_says_in_as_many_parts() -> None:
    groups = {"8 GiB": [picture.Bar("fastdpo", 300, "2 x 300", "ours", 2), picture.Bar("A & B", 150, "150", "quoted")]}
    for palette in picture.PALETTES.values():
        svg = picture.svg("title", "scale", groups, palette)
        bars = [tuple(map(int, found)) for found in re.findall(r'<rect x="(\d+)" y="\d+" width="(\d+)"', svg)]
        half = (picture.BARS_TO - picture.BARS_FROM) // 2
        assert bars[:2] == [(picture.BARS_FROM, half - 1), (picture.BARS_FROM + half, half - 1)]
        assert bars[2] == (picture.BARS_FROM, round(half / 2)) and "A &amp; B" in svg and palette.ours in svg


def test_a_page_or_a_picture_that_drifted_is_told_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    for page in ("README.md", "benchmarks/README.md"):
        shutil.copy(ROOT / page, tmp_path / page)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    results = tmp_path / "elsewhere"
    results.mkdir()
    plan(results)
    assert pages.main(check=False, folder=results) == 0 and pages.main(check=True, folder=results) == 0
    drawn = tmp_path / "benchmarks/results/plan-llama-3.1-8b-dark.svg"
    for spoil in (lambda: drawn.write_text(drawn.read_text().replace("2,227", "9,227")), drawn.unlink):
        spoil()
        assert pages.main(check=True, folder=results) == 1 and str(drawn) in capsys.readouterr().err
        assert pages.main(check=False, folder=results) == 0 and pages.main(check=True, folder=results) == 0
    for file in results.iterdir():
        file.unlink()
    assert pages.main(check=True, folder=results) == 1 and str(results) in capsys.readouterr().err


def test_a_page_without_its_markers_is_an_error() -> None:
    text = f"before\n{pages.begin('claim')}\nold\n{pages.END}\nafter\n"
    assert pages.filled(text, {"claim": "new\n"}) == text.replace("old", "new")
    with pytest.raises(ValueError, match="the page has no .*worst"):
        pages.filled(text, {"worst": "new\n"})


def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    (tmp_path / "step-cpu-20m-hh-rlhf.json").write_text('{"benchmark": "st')
    with pytest.raises(SystemExit, match=r"step-cpu-20m-hh-rlhf\.json holds no results .* measure again"):
        pages.files(tmp_path)


@pytest.mark.parametrize("reason", [None, "", "wrong: off by 1", "not run: the time for all of them was used up"])
def test_what_found_no_time_is_still_to_be_measured(tmp_path: Path, reason: str | None) -> None:
    tuned = tmp_path / "tune-cuda.json"
    assert not table.known(tuned)
    tuned.write_text(json.dumps({"rows": [{"reason": ""}, {"reason": reason}]}))
    assert table.known(tuned) == (not (reason or "").startswith("not run"))
