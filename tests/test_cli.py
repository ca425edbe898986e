"""The command line: every form of every option, one clear line for what is wrong, and a help that lists what works."""

import dataclasses
import json
import re
import types
from unittest import mock

import pytest
from transformers import BloomConfig

import fastdpo
from fastdpo import cli
from fastdpo.config import DPOConfig
from fastdpo.verdicts import VERDICTS

BASE = ["--model", "tiny", "--train_dataset", "pairs.jsonl"]


def parse(*words: str, base: list[str] = BASE) -> tuple:
    return cli.parse_training(cli.training_parser(), [*base, *words])


def fails(capsys, *words: str, base: list[str] = BASE) -> str:
    """The message of a command line that is refused with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        parse(*words, base=base)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def trained(monkeypatch) -> dict:
    """What fastdpo.train was called with, instead of training."""
    calls: dict = {}

    def train(model, train_dataset, **rest):
        calls.update(model=model, train_dataset=train_dataset, **rest)
        trainer = types.SimpleNamespace(is_world_process_zero=lambda: True, accelerator=mock.MagicMock())
        return types.SimpleNamespace(metrics={"train_loss": 0.5, "steps": 3}, trainer=trainer)

    monkeypatch.setattr(fastdpo, "train", train)
    return calls


@pytest.mark.parametrize(
    "words, name, value",
    [
        (["--use_peft"], "use_peft", True),
        (["--use_peft", "true"], "use_peft", True),
        (["--use_peft=False"], "use_peft", False),
        (["--no_use_peft"], "use_peft", False),
        (["--no-disable-dropout"], "disable_dropout", False),
        (["--bf16"], "bf16", True),
        (["--no_bf16"], "bf16", False),
        (["--learning-rate", "1e-6"], "learning_rate", 1e-6),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--max_length", "none"], "max_length", None),
        (["--logging_steps", "0.1"], "logging_steps", 0.1),
        (["--loss_type", "sigmoid", "ipo"], "loss_type", ["sigmoid", "ipo"]),
        (["--loss_weights", "1", "0.5"], "loss_weights", [1.0, 0.5]),
        (["--lora_target_modules", "q_proj", "v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--report_to", "wandb", "tensorboard"], "report_to", ["wandb", "tensorboard"]),
        (["--rope_scaling", '{"factor": 2.0}'], "rope_scaling", '{"factor": 2.0}'),
        (["--evaluation_strategy", "epoch"], "evaluation_strategy", "epoch"),
        (["--no_cuda"], "no_cuda", True),
        (["--per_gpu_train_batch_size", "4"], "per_gpu_train_batch_size", 4),
        (["--beta", "0.1", "--beta", "0.2"], "beta", 0.2),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_an_option_takes_the_forms_of_the_ecosystem(words, name, value):
    assert parse(*words)[1] == {name: value}


def test_only_given_options_reach_the_config_so_that_its_defaults_hold():
    inputs, options = parse()
    assert options == {} and inputs.model == "tiny" and inputs.train_dataset == "pairs.jsonl"


def test_trl_script_names_mean_the_same():
    words = [
        "--dataset_config",
        "clean",
        "--dataset_train_split",
        "first",
        "--dataset_test_split",
        "last",
        "--lora_r",
        "8",
    ]
    base = ["--model_name_or_path", "tiny", "--dataset_name", "someone/pairs"]
    inputs, options = parse(*words, "--attn_implementation", "eager", base=base)
    assert (inputs.model, inputs.train_dataset, inputs.dataset_config) == ("tiny", "someone/pairs", "clean")
    given = {"dataset_train_split": "first", "dataset_test_split": "last", "lora_r": 8, "attn_implementation": "eager"}
    assert options == given


def test_a_mistyped_option_is_refused_with_the_nearest_name(capsys):
    assert "unknown option 'lerning_rate'; did you mean 'learning_rate'" in fails(capsys, "--lerning_rate", "1e-6")
    assert "unknown option 'train_datset'; did you mean 'train_dataset'" in fails(capsys, "--train_datset", "x")
    assert "unexpected argument 'stray'" in fails(capsys, "--beta", "0.2", "stray")


def test_a_value_of_the_wrong_kind_is_refused_with_the_option_name(capsys):
    assert "--beta: invalid number value: 'much'" in fails(capsys, "--beta", "much")
    assert "--lora_r: invalid whole number value: '1.5'" in fails(capsys, "--lora_r", "1.5")
    assert "--use_peft: expected true or false, got 'maybe'" in fails(capsys, "--use_peft", "maybe")


def test_a_missing_model_or_dataset_is_named(capsys):
    assert "--model is missing" in fails(capsys, base=["--train_dataset", "x"])
    assert "--train_dataset is missing" in fails(capsys, base=["--model", "x"])


def test_trl_options_without_a_meaning_here_say_what_to_do(capsys):
    assert "ignore_bias_buffers is not supported" in fails(capsys, "--ignore_bias_buffers")


def test_a_yaml_file_gives_options_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model_name_or_path: tiny\ntrain_dataset: pairs.jsonl\nbeta: 0.3\nlearning_rate: 1e-6\nuse_peft: true\n"
        "disable_dropout: false\nloss_type: [sigmoid, ipo]\nmodel_init_kwargs: {low_cpu_mem_usage: true}\n"
        "eval_strategy: no\nmax_length: null\nrun_name: null\nlora_target_modules: all-linear\nmax_steps: -1\n"
    )
    inputs, options = parse("--config", str(path), "--beta", "0.2", "--no_use_peft", base=[])
    assert (inputs.model, inputs.train_dataset) == ("tiny", "pairs.jsonl")
    assert json.loads(options.pop("model_init_kwargs")) == {"low_cpu_mem_usage": True}
    assert options == {
        **{"beta": 0.2, "learning_rate": 1e-6, "use_peft": False, "disable_dropout": False, "max_steps": -1},
        **{
            "loss_type": ["sigmoid", "ipo"],
            "eval_strategy": "no",
            "max_length": None,
            "lora_target_modules": ["all-linear"],
        },
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("bta: 0.1", "run.yaml: unknown option 'bta'; did you mean 'beta'"),
        ("env: {A: b}", "run.yaml: env is not supported"),
        ("- beta", "must hold a mapping of options to values, got list"),
        ("beta: [", "cannot be read"),
        ("beta: much", "--beta: invalid number value"),
    ],
)
def test_a_faulty_yaml_file_is_refused_with_what_is_wrong(text, message, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert message in fails(capsys, "--config", str(path))
    assert "cannot be read" in fails(capsys, "--config", str(tmp_path / "absent.yaml"))


def test_help_lists_each_option_that_works_with_its_default_under_a_topic():
    text = cli.training_parser().format_help()
    listed = set(re.findall(r"^  --(\w+)", text, re.MULTILINE)) | {"model_name_or_path", "dataset_name"}
    fields = {field.name for field in dataclasses.fields(DPOConfig)}
    works = {name for name, verdict in VERDICTS.items() if verdict.topic and name in fields}
    assert works - listed == set() and "past_index" not in listed
    entries = re.split(r"^  --", text.split("preference loss:")[0].split("\nmodel:")[1], flags=re.MULTILINE)[1:]
    assert all("(default:" in " ".join(entry.split()) for entry in entries)
    for topic in {verdict.topic for verdict in VERDICTS.values()} - {""}:
        assert f"\n{topic}:\n" in text
    assert "(default: 0.1)" in text and "(default: sigmoid)" in text and "%%" not in text


def test_training_hands_the_config_over_and_prints_where_the_model_is(trained, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["train", *BASE, "--output_dir", out, "--beta", "0.2", "--ref_model", "other"]) == 0
    assert (trained["model"], trained["train_dataset"], trained["ref_model"]) == ("tiny", "pairs.jsonl", "other")
    assert trained["args"].beta == 0.2 and trained["eval_dataset"] is None
    printed = capsys.readouterr().out
    assert f"model saved to {out}" in printed and re.search(r"train_loss +0.5\n", printed)


def test_a_dataset_with_splits_serves_for_evaluation_and_a_file_does_not(trained, tmp_path, capsys):
    out, rows = ["--output_dir", str(tmp_path), "--eval_strategy", "epoch"], tmp_path / "pairs.jsonl"
    assert cli.main(["train", "--model", "tiny", "--dataset_name", "someone/pairs", *out]) == 0
    assert trained["eval_dataset"] == "someone/pairs"
    rows.write_text("{}")
    assert cli.main(["train", "--model", "tiny", "--train_dataset", str(rows), *out]) == 1
    assert "has no split for them: give --eval_dataset" in capsys.readouterr().err
    assert cli.main(["train", "--model", "tiny", "--train_dataset", str(rows), *out, "--dataset_streaming"]) == 1
    assert cli.main(["train", "--model", "tiny", "--train_dataset", str(rows), *out, "--eval_dataset", str(rows)]) == 0
    assert trained["eval_dataset"] == str(rows)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--beta", "0"], "fastdpo: error: beta must be above 0, got 0.0."),
        (["--loss_type", "hnge"], "fastdpo: error: unknown loss 'hnge', there are sigmoid, "),
        (["--deepspeed", "zero3.json"], "fastdpo: error: deepspeed='zero3.json' is not supported: FSDP2 shards"),
        (["--past_index", "2"], "fastdpo: error: past_index=2 is not supported"),
        (["--do_predict"], "fastdpo: error: do_predict has no meaning here"),
        (["--do_eval"], "fastdpo: error: do_eval needs a time to evaluate"),
        (["--model_init_kwargs", "{"], "fastdpo: error: model_init_kwargs must be a dict or its JSON"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_1(words, message, trained, tmp_path, capsys):
    assert cli.main(["train", *BASE, "--output_dir", str(tmp_path), *words]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not trained


def test_a_traceback_is_shown_on_request(trained, tmp_path):
    with pytest.raises(ValueError, match="beta must be above 0"):
        cli.main(["train", *BASE, "--output_dir", str(tmp_path), "--beta", "0", "--traceback"])


def test_doctor_names_versions_devices_and_the_path_of_each_kernel(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("python", "torch", "transformers", "flash-attn", "CPU", "packed attention", "linear_logps"):
        assert re.search(rf"^  {name} +\S", text, re.MULTILINE)
    assert "fastdpo can train here" in text


def test_doctor_says_why_training_cannot_run(monkeypatch, capsys):
    version = cli._version
    monkeypatch.setattr(cli, "_version", lambda package: "not installed" if package == "peft" else version(package))
    assert cli.main(["doctor"]) == 1
    assert "fastdpo cannot train here: peft is not installed: pip install peft" in capsys.readouterr().out


def test_the_version_is_printed_and_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and re.match(r"\d+\.\d+", capsys.readouterr().out)
    with pytest.raises(SystemExit) as caught:
        cli.main(["trian"])
    assert caught.value.code == 2 and "invalid choice: 'trian'" in capsys.readouterr().err


def test_demo_is_handed_its_arguments(monkeypatch):
    import fastdpo.demo

    monkeypatch.setattr(fastdpo.demo, "main", lambda argv: len(argv))
    assert cli.main(["demo", "--seed", "3"]) == 2


# ---- fastdpo plan


@pytest.fixture
def config_of_8b(tmp_path) -> str:
    from transformers import LlamaConfig

    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8}
    LlamaConfig(vocab_size=128256, num_attention_heads=32, **shape).save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


@pytest.mark.parametrize("size, words, code", [("8GiB", [], 1), ("24GiB", ["--gradient_checkpointing"], 0)])
def test_a_plan_is_printed_from_a_config_alone_and_its_exit_code_says_whether_it_fits(
    size, words, code, config_of_8b, capsys
):
    options = ["--gpu-memory", size, "--use_peft", "--bf16", "--report_to", "none", *words]
    assert cli.main(["plan", "--model", config_of_8b, *options]) == code
    printed = capsys.readouterr().out
    assert "weights              14.96 GiB" in printed and f"of {size[:-3]}.00" in printed
    assert ("it does not fit" in printed and "gradient_checkpointing=True" in printed) == bool(code)


def test_a_plan_needs_a_size_where_there_is_no_gpu(config_of_8b, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["plan", "--model", config_of_8b]) == 1
    error = capsys.readouterr().err
    assert "give --gpu_memory" in error and "--gpu with a name out of T4, A100, " in error


SIZES = {
    **{"8": 8 * 2**30, "0.5GiB": 2**29, "8 GB": 8 * 10**9, "512mib": 2**29, "8g": 8 * 2**30, "8gib": 8 * 2**30},
    **{"1TB": 10**12, "1T": 2**40, "1tib": 2**40, "512M": 2**29, "4096": 2**42},
}


@pytest.mark.parametrize("text", SIZES)
def test_a_size_has_a_unit_or_is_of_gibibytes(text):
    assert cli._bytes(text) == SIZES[text]


@pytest.mark.parametrize("text", ["much", "0", "-8GiB", "8B", "8iB", "8KB", "0.0000001MB", "9" * 400, "5TiB"])
def test_a_size_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", "--model", "tiny", f"--gpu-memory={text}"])
    assert caught.value.code == 2 and "24GiB" in capsys.readouterr().err


def test_bytes_are_not_taken_for_gibibytes(capsys):
    """8589934592 once planned for a card of 8 exbibytes, where everything fits."""
    with pytest.raises(SystemExit):
        cli.main(["plan", "--model", "tiny", "--gpu-memory", "8589934592"])
    assert "got '8589934592'; a number alone is of GiB" in capsys.readouterr().err


def planned_for(capsys, *words: str) -> str:
    assert cli.main(["plan", "--report_to", "none", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def small_model(tmp_path, tokenizer) -> str:
    from conftest import tiny_llama

    tiny_llama().config.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    "words, head, products",
    [
        (["--gpu", "t4"], "a card like the T4, with 16 GiB", "float32"),
        (["--gpu", "T4", "--fp16"], "a card like the T4, with 16 GiB", "float16"),
        (["--gpu=rtx-3090", "--gpu-memory", "20G"], "a card like the RTX 3090, with 20 GiB", "bfloat16"),
        (["--gpu", "RTX 3070"], "a card like the RTX 3070, with 8 GiB", "bfloat16"),
        (["--gpu", "MI300X"], "a card like the MI300X, with 192 GiB", "bfloat16"),
        (["--gpu-memory", "24GiB", "--fp16"], "chip is taken for the RTX 4090's (--gpu), with 24 GiB", "float16"),
        (["--gpu", "H200", "--no_bf16"], "a card like the H200, with 141 GiB", "float32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_plan_is_for_a_card_that_is_not_here(words, head, products, small_model, no_gpu, capsys):
    printed = planned_for(capsys, "--model", small_model, *words)
    assert head in printed and f"products in {products}," in printed


def test_a_card_or_precision_that_there_is_none_of_is_refused(small_model, no_gpu, capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--model", small_model, "--gpu", "H100X"])
    assert "expected one of T4, A100, " in capsys.readouterr().err
    assert cli.main(["plan", "--model", small_model, "--gpu", "T4", "--fp16", "--bf16"]) == 1


def test_a_plan_sees_the_pairs_of_an_evaluation(small_model, no_gpu, tmp_path, rows, capsys):
    """A run's micro-batches take them too, and a plan that left them out said that pairs fit which did not."""
    longer = [{**row, "chosen": row["chosen"] + " thank you" * 50} for row in rows[:3]]
    files = {"train": rows, "eval": longer}
    for name, part in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    base = ["--model", small_model, "--gpu", "T4"]
    train = ["--train_dataset", str(tmp_path / "train.jsonl")]
    longest = [
        int(re.search(r"the longest has (\d+)", planned_for(capsys, *base, *train, *more))[1])  # type: ignore[index]
        for more in ([], ["--eval_dataset", str(tmp_path / "eval.jsonl")])
    ]
    assert longest[1] > longest[0] + 50
    assert cli.main(["plan", *base, "--eval_dataset", str(tmp_path / "eval.jsonl")]) == 1
    assert "give --train_dataset too" in capsys.readouterr().err


def test_a_plan_of_a_padded_model_takes_the_pair_that_is_longest_padded(small_model, no_gpu, tmp_path, capsys):
    """Two answers of 60 cost 120 packed; beside an answer of 1, one of 100 costs 101 packed and 200 padded."""
    lengths = [(60, 60), (100, 1)]
    rows = [{"prompt_ids": [5], "chosen_ids": [6] * one, "rejected_ids": [7] * other} for one, other in lengths]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--model", small_model, "--gpu", "T4", "--train_dataset", str(tmp_path / "rows.jsonl")]
    assert "(the longest has 121)" in planned_for(capsys, *words)
    BloomConfig(vocab_size=500, hidden_size=32, n_layer=2, n_head=4).save_pretrained(small_model)
    printed = planned_for(capsys, *words)
    assert "padded batches" in printed and "(the longest has 202)" in printed


# ---- errors


def test_advice_that_was_noted_on_an_error_is_printed(monkeypatch, tmp_path, capsys):
    """An error of a full GPU carries what to change, which a command line never showed."""
    import torch

    def train(*_, **__):
        error = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        error.add_note("fastdpo: set gradient_checkpointing=True\nor lower max_length")
        raise error

    monkeypatch.setattr(fastdpo, "train", train)
    assert cli.main(["train", *BASE, "--output_dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "fastdpo: error: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB (--traceback shows where)",
        "fastdpo: set gradient_checkpointing=True or lower max_length",
    ]
