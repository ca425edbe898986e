"""Scripts in the ways that TRL's documentation shows, with `fastdpo` for `trl` in the import and nothing else.

A script is a function of the library. Those of TRL 1.16 run with both, and give the same numbers at every step; those
of 0.11 use arguments that 1.16 has no more, so what they must do is said beside them. All rows are one batch, as the
two libraries draw rows in orders of their own.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import draw_no_picture, praise_and_scolding, tiny_llama
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers_for_tests import byte_level
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import fastdpo

trl = pytest.importorskip("trl", "1.16", reason="scripts run beside TRL 1.16, from the test extra (trl==1.16.0)")

PAIRS, STEPS = 6, 4
ROWS = praise_and_scolding()[:PAIRS]
COMPARED = ("loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins")
COMPARED += ("rewards/accuracies", "logps/chosen", "logps/rejected", "num_tokens", "epoch")
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")

Script = Callable[[ModuleType, Path, dict[str, Any]], Any]


def chat_rows() -> list[dict[str, Any]]:
    """As UltraFeedback's: whole conversations, the prompt inside, and scores that no trainer looks at."""
    return [
        {
            side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            for side in answers
        }
        | {"score_chosen": 8.0, "score_rejected": 3.0}
        for row in ROWS
        for answers in [("chosen", "rejected")]
    ]


def ln_2(row: dict[str, float]) -> bool:
    return row["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model in model/ and an adapter that does something in sft/."""
    folder = tmp_path_factory.mktemp("place")
    tokenizer: Any = byte_level(adds_bos=True)
    model: Any = tiny_llama(len(tokenizer), hidden_size=64, intermediate_size=128)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    config = copy.deepcopy(LORA)
    config.init_lora_weights = False
    torch.manual_seed(1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), config)
    adapted.save_pretrained(str(folder / "sft"))
    return folder


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What makes a script's run small, on a CPU, and silent."""
    draw_no_picture(monkeypatch)
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    run = {"output_dir": str(tmp_path / "out"), "max_steps": STEPS, "per_device_train_batch_size": PAIRS}
    run |= {"learning_rate": 1e-3, "adam_epsilon": 1e-6, "logging_steps": 1, "report_to": "none"}
    return run | {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}


def steps_of(trainer: Any) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "grad_norm" in row]


# Scripts of TRL 1.16


def quick_start(lib: ModuleType, place: Path, tiny: dict[str, Any]) -> Any:
    trainer = lib.DPOTrainer(
        model=str(place / "model"), args=lib.DPOConfig(**tiny), train_dataset=Dataset.from_list(ROWS)
    )
    trainer.train()
    trainer.save_model(trainer.args.output_dir)
    return trainer


def loaded_objects(lib: ModuleType, place: Path, tiny: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    training_args = lib.DPOConfig(**tiny, beta=0.3, loss_type="ipo", max_length=64)
    trainer = lib.DPOTrainer(
        model=model,
        args=training_args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS),
    )
    trainer.train()
    trainer.evaluate()
    return trainer


def conversations(lib: ModuleType, place: Path, tiny: dict[str, Any]) -> Any:
    trainer = lib.DPOTrainer(
        model=str(place / "model"), args=lib.DPOConfig(**tiny), train_dataset=Dataset.from_list(chat_rows())
    )
    trainer.train()
    return trainer


def precomputed(lib: ModuleType, place: Path, tiny: dict[str, Any]) -> Any:
    training_args = lib.DPOConfig(**tiny, precompute_ref_log_probs=True, precompute_ref_batch_size=3)
    trainer = lib.DPOTrainer(model=str(place / "model"), args=training_args, train_dataset=Dataset.from_list(ROWS))
    trainer.train()
    return trainer


def mixed_preference_optimisation(lib: ModuleType, place: Path, tiny: dict[str, Any]) -> Any:
    training_args = lib.DPOConfig(**tiny, loss_type=["sigmoid", "apo_zero", "sft"], loss_weights=[0.8, 0.2, 1.0])
    trainer = lib.DPOTrainer(model=str(place / "model"), args=training_args, train_dataset=Dataset.from_list(ROWS))
    trainer.train()
    return trainer


def adapter_goes_on(lib: ModuleType, place: Path, tiny: dict[str, Any]) -> Any:
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    model = PeftModel.from_pretrained(base, str(place / "sft"), is_trainable=True)
    trainer = lib.DPOTrainer(
        model=model,
        args=lib.DPOConfig(**tiny),
        processing_class=AutoTokenizer.from_pretrained(place / "model"),
        train_dataset=Dataset.from_list(ROWS),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "script",
    [
        quick_start,
        loaded_objects,
        conversations,
        precomputed,
        mixed_preference_optimisation,
        adapter_goes_on,
    ],
    ids=lambda script: script.__name__,
)
def test_a_script_of_trl_1_16_logs_the_same_numbers_with_the_import_changed(script: Script, place, tiny) -> None:
    theirs, ours = (script(lib, place, copy.deepcopy(tiny)) for lib in (trl, fastdpo))
    expected, got = steps_of(theirs), steps_of(ours)
    assert len(got) == STEPS and abs(got[-1]["loss"] - got[0]["loss"]) > 1e-2
    for one, other in zip(expected, got, strict=True):
        for key in COMPARED:
            # a reward is a small difference of log-probs of about 100, in float32
            floor = 1e-5 if key.startswith("rewards") else 0
            assert other[key] == pytest.approx(one[key], rel=1e-4, abs=floor), (one["step"], key)


def test_an_evaluation_logs_the_same_rewards(place: Path, tiny: dict[str, Any]) -> None:
    theirs, ours = (loaded_objects(lib, place, copy.deepcopy(tiny)) for lib in (trl, fastdpo))
    one, other = (next(row for row in reversed(run.state.log_history) if "eval_loss" in row) for run in (theirs, ours))
    for key in ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"):
        assert other[f"eval_{key}"] == pytest.approx(one[f"eval_{key}"], rel=1e-4, abs=1e-5), key


# New adapters are drawn from each library's own random state: the first step has to agree, the later ones to learn.


def new_adapters(lib: ModuleType, place: Path, tiny: dict[str, Any]) -> Any:
    trainer = lib.DPOTrainer(
        model=str(place / "model"),
        args=lib.DPOConfig(**tiny),
        train_dataset=Dataset.from_list(ROWS),
        peft_config=copy.deepcopy(LORA),
    )
    trainer.train()
    return trainer


def merged_first(lib: ModuleType, place: Path, tiny: dict[str, Any]) -> Any:
    """The second of the three PEFT options."""
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    model = PeftModel.from_pretrained(base, str(place / "sft")).merge_and_unload()
    trainer = lib.DPOTrainer(
        model=model,
        args=lib.DPOConfig(**tiny),
        processing_class=AutoTokenizer.from_pretrained(place / "model"),
        train_dataset=Dataset.from_list(ROWS),
        peft_config=copy.deepcopy(LORA),
    )
    trainer.train()
    return trainer


def model_config(lib: ModuleType, place: Path, tiny: dict[str, Any]) -> Any:
    """TRL's own dataclass of model options, and what it makes of them."""
    model_args = trl.ModelConfig(str(place / "model"), use_peft=True, lora_r=4, lora_target_modules="all-linear")
    training_args = lib.DPOConfig(**tiny)
    training_args.model_init_kwargs = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    trainer = lib.DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=Dataset.from_list(ROWS),
        quantization_config=trl.get_quantization_config(model_args),
        peft_config=trl.get_peft_config(model_args),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("script", [new_adapters, merged_first, model_config], ids=lambda script: script.__name__)
def test_a_script_with_new_adapters_starts_as_with_trl_and_learns(script: Script, place, tiny) -> None:
    tiny |= {"learning_rate": 1e-2}
    theirs, ours = (script(lib, place, copy.deepcopy(tiny)) for lib in (trl, fastdpo))
    expected, got = steps_of(theirs), steps_of(ours)
    assert ln_2(got[0]) and got[0]["rewards/margins"] == 0.0
    for key in ("logps/chosen", "logps/rejected", "num_tokens"):
        assert got[0][key] == pytest.approx(expected[0][key], rel=1e-5)
    assert got[-1]["loss"] < math.log(2) - 0.05
    assert got[-1]["loss"] == pytest.approx(expected[-1]["loss"], abs=0.05)
    trained = [sum(p.numel() for p in run.model.parameters() if p.requires_grad) for run in (theirs, ours)]
    assert trained[0] == trained[1]


def test_a_script_that_parses_its_options_with_trl_s_parser_changes_the_trainer_alone(place, tiny, tmp_path) -> None:
    """fastdpo's DPOConfig has ModelConfig's options, and one parser cannot take both: TRL's DPOConfig stays."""
    pytest.importorskip("bitsandbytes")
    given = {"model_name_or_path": place / "model", "use_peft": True, "lora_r": 4, "load_in_4bit": True, **tiny}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    parser = trl.TrlParser((trl.ScriptArguments, trl.DPOConfig, trl.ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config([*words, "--beta", "0.3"])
    training_args.model_init_kwargs = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    trainer = fastdpo.DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=Dataset.from_list(ROWS),
        quantization_config=trl.get_quantization_config(model_args),
        peft_config=trl.get_peft_config(model_args),
    )
    trainer.train()
    assert script_args.dataset_train_split == "train" and trainer.args.beta == 0.3
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.quant_state.quant_type == "nf4" and layer.r == {"default": 4}
    assert ln_2(steps_of(trainer)[0]) and steps_of(trainer)[-1]["loss"] < math.log(2)


def test_trl_s_own_script_runs_with_the_trainer_in_the_place_of_its_own(place, tmp_path, monkeypatch) -> None:
    """`trl dpo`, from its options to the last call."""
    draw_no_picture(monkeypatch)
    from trl.scripts import dpo

    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    given: dict[str, Any] = {
        "model_name_or_path": place / "model",
        "dataset_name": tmp_path,
        "use_peft": True,
        "lora_r": 4,
    }
    given |= {"output_dir": tmp_path / "out", "max_steps": 2, "eval_strategy": "epoch", "logging_steps": 1}
    given |= {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    made: list[fastdpo.DPOTrainer] = []

    def trainer_of(*args: Any, **options: Any) -> fastdpo.DPOTrainer:
        made.append(fastdpo.DPOTrainer(*args, **options))
        return made[0]

    monkeypatch.setattr(trl, "DPOTrainer", trainer_of)
    dpo.main(*dpo.make_parser().parse_args_and_config(words))
    first, *_ = [row for row in made[0].state.log_history if "eval_loss" in row]
    assert ln_2(steps_of(made[0])[0]) and first["eval_rewards/margins"] > 0
    adapters = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "model"), str(tmp_path / "out"))
    trained = dict(made[0].model.named_parameters())
    assert all(torch.equal(value, trained[name]) for name, value in adapters.named_parameters() if "lora_" in name)


# Scripts of TRL 0.11


def test_a_script_of_0_11_gives_options_to_the_trainer(place: Path, tiny: dict[str, Any]) -> None:
    model, model_ref = (AutoModelForCausalLM.from_pretrained(place / "model") for _ in range(2))
    training_args = TrainingArguments(**tiny)
    trainer = fastdpo.DPOTrainer(
        model,
        model_ref,
        args=training_args,
        beta=0.2,
        loss_type="hinge",
        train_dataset=Dataset.from_list(ROWS),
        tokenizer=AutoTokenizer.from_pretrained(place / "model"),
        max_length=60,
        max_prompt_length=30,
    )
    trainer.train()
    assert steps_of(trainer)[0]["loss"] == 1.0  # the hinge at a margin of 0
    assert (trainer.args.beta, trainer.args.max_length) == (0.2, 60)
    lengths = [len(row["prompt_ids"]) for row in trainer.train_dataset]  # type: ignore[union-attr, index]
    assert max(lengths) == 30


def test_a_script_of_0_11_smooths_labels_in_its_config(place: Path, tiny: dict[str, Any]) -> None:
    tiny |= {"evaluation_strategy": "epoch"}
    training_args = fastdpo.DPOConfig(**tiny, beta=0.1, label_smoothing=0.1, rpo_alpha=0.5)
    rows = Dataset.from_list(ROWS)
    trainer = fastdpo.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(place / "model"),
        args=training_args,
        train_dataset=rows,
        eval_dataset=rows,
        tokenizer=AutoTokenizer.from_pretrained(place / "model"),
    )
    trainer.train()
    # rewards are read from the log, under the names of 0.11
    history = trainer.state.log_history
    for name in ("chosen", "rejected", "accuracies", "margins"):
        assert all(f"rewards/{name}" in row for row in steps_of(trainer))
        assert any(f"eval_rewards/{name}" in row for row in history)
    for row in steps_of(trainer):
        assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-6)
    first, last = steps_of(trainer)[0], steps_of(trainer)[-1]
    assert first["rewards/margins"] == 0.0 < last["rewards/margins"]
    assert last["logps/chosen"] > first["logps/chosen"]


def two_instances(place: Path, tiny: dict[str, Any]) -> Any:
    """The first of the three PEFT options, which TRL 1.16 fails at: it asks a PeftModel for a backbone's output."""
    model, ref_model = (
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(place / "model"), str(place / "sft"), is_trainable=trains
        )
        for trains in (True, False)
    )
    trainer = fastdpo.DPOTrainer(
        model=model,
        ref_model=ref_model,
        args=fastdpo.DPOConfig(**tiny),
        processing_class=AutoTokenizer.from_pretrained(place / "model"),
        train_dataset=Dataset.from_list(ROWS),
    )
    trainer.train()
    return trainer


def adapter_twice(place: Path, tiny: dict[str, Any]) -> Any:
    """The third of the three PEFT options."""
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    model = PeftModel.from_pretrained(base, str(place / "sft"), is_trainable=True, adapter_name="policy")
    model.load_adapter(str(place / "sft"), adapter_name="reference")
    trainer = fastdpo.DPOTrainer(
        model,
        args=fastdpo.DPOConfig(**tiny, model_adapter_name="policy", ref_adapter_name="reference"),
        train_dataset=Dataset.from_list(ROWS),
        tokenizer=AutoTokenizer.from_pretrained(place / "model"),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("script", [two_instances, adapter_twice], ids=lambda script: script.__name__)
def test_a_peft_option_of_0_11_is_the_run_that_trl_1_16_makes_of_one_trained_adapter(script, place, tiny) -> None:
    expected = steps_of(adapter_goes_on(trl, place, copy.deepcopy(tiny)))
    got = steps_of(script(place, copy.deepcopy(tiny)))
    for key in ("loss", "grad_norm", "logps/chosen"):
        assert [row[key] for row in got] == pytest.approx([row[key] for row in expected], rel=1e-4)


def test_a_script_of_0_11_names_its_models_and_how_they_load(place: Path, tiny: dict[str, Any]) -> None:
    training_args = fastdpo.DPOConfig(
        **tiny, model_init_kwargs={"torch_dtype": "float32"}, ref_model_init_kwargs={"torch_dtype": "float64"}
    )
    trainer = fastdpo.DPOTrainer(
        str(place / "model"),
        str(place / "model"),
        args=training_args,
        train_dataset=Dataset.from_list(ROWS),
        tokenizer=AutoTokenizer.from_pretrained(place / "model"),
    )
    trainer.train()
    assert trainer.model.dtype == torch.float32 and trainer.ref_model.dtype == torch.float64
    assert ln_2(steps_of(trainer)[0]) and steps_of(trainer)[-1]["loss"] < math.log(2) - 0.05


def test_what_model_init_kwargs_say_of_loading_holds_for_the_options_of_that_name(tmp_path: Path) -> None:
    """dtype would hide torch_dtype from from_pretrained, and a revision belongs to the tokenizer, too."""
    given = {"torch_dtype": "bfloat16", "revision": "v1", "attn_implementation": None, "low_cpu_mem_usage": True}
    config = fastdpo.DPOConfig(str(tmp_path), use_cpu=True, model_init_kwargs=given)
    assert config.model_init_kwargs == {"dtype": "bfloat16", "low_cpu_mem_usage": True}
    assert config.model_revision == "v1" and config.attn_implementation is None
    assert given["revision"] == "v1", "the script's own dict stays as it is"


def test_fields_of_a_config_among_model_init_kwargs_are_set_on_it(place: Path, tiny: dict[str, Any]) -> None:
    """TRL's scripts pass use_cache, and a model of its own config file reads it from there, reference or not."""
    tiny_llama(tie_word_embeddings=True).save_pretrained(place / "model" / "other")
    training_args = fastdpo.DPOConfig(
        **tiny,
        model_init_kwargs={"use_cache": False, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ref_model_init_kwargs={"rms_norm_eps": 0.01, "subfolder": "other"},
    )
    trainer = fastdpo.DPOTrainer(str(place / "model"), str(place / "model"), args=training_args, train_dataset=ROWS)
    assert trainer.model.config.use_cache is False and trainer.model.config.rope_parameters["factor"] == 2.0
    reference = trainer.ref_model
    assert reference.config.tie_word_embeddings and reference.model.norm.variance_epsilon == 0.01


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"model_init_kwargs": {"torch_dtype": "float32", "dtype": "bfloat16"}},
            "torch_dtype is the old name of dtype",
        ),
        ({"model_init_kwargs": {"revision": "v1"}, "model_revision": "v2"}, "model_revision='v2', and model_init_kwa"),
    ],
    ids=["dtype", "revision"],
)
def test_model_init_kwargs_that_contradict_an_option_are_refused(options, words, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        fastdpo.DPOConfig(str(tmp_path), use_cpu=True, **options)
