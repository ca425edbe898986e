"""Files from elsewhere run no code and write into output_dir alone: models, adapters, checkpoints, data, YAML."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from tokenizers_for_tests import CHAT, byte_level
from transformers import EarlyStoppingCallback, TrainerState

import fastdpo
from fastdpo import DPOConfig, checkpoint
from fastdpo.cli import main
from fastdpo.merge import merge
from fastdpo.resume import restore_callbacks

CODE = """
open({marker!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class TheirConfig(LlamaConfig):
    model_type = "theirs"
class TheirModel(LlamaForCausalLM):
    config_class = TheirConfig
class TheirTokenizer(PreTrainedTokenizerFast):
    pass
"""


class Opens:
    """What a hostile pickle does: whoever unpickles it makes the file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code was run"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model with its tokenizer."""
    path = tmp_path / "model"
    tiny_llama().save_pretrained(path)
    byte_level().save_pretrained(path)
    return path


@pytest.fixture
def train(directory: Path, quick: dict, rows: list) -> Any:
    def run(model: Any = None, train_dataset: Any = None, **options: Any) -> fastdpo.train:
        return fastdpo.train(model or str(directory), train_dataset or rows[:3], **{**quick, "max_steps": 1, **options})

    return run


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def pickled_beside(directory: Path, marker: Path, *names: str) -> None:
    for name in names:
        torch.save({"weight": Opens(marker)}, directory / name)


@pytest.fixture
def with_code(directory: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (directory / "theirs.py").write_text(CODE.format(marker=str(marker)))
    edit(
        directory / "config.json",
        auto_map={"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"},
    )
    edit(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "theirs.TheirTokenizer"]})


def test_code_beside_a_model_that_transformers_knows_is_not_run(with_code, train, marker) -> None:
    train()
    assert not marker.exists()


def test_a_model_that_is_its_own_code_is_refused_until_that_is_trusted(with_code, train, marker, directory) -> None:
    edit(directory / "config.json", model_type="theirs")
    with pytest.raises(ValueError, match="trust_remote_code"):
        train()
    assert not marker.exists()
    assert type(train(trust_remote_code=True).model).__name__ == "TheirModel"
    assert marker.exists()


@pytest.mark.parametrize("where", ["_attn_implementation", "attn_implementation"])
def test_attention_that_only_config_json_asks_of_the_hub_is_refused(where, directory, train) -> None:
    edit(directory / "config.json", **{where: "somebody/kernel"})
    with pytest.raises(ValueError, match="asks for attention from the Hub"):
        train()


def test_weights_that_are_a_program_are_refused(directory, train, marker) -> None:
    (directory / "model.safetensors").unlink()
    pickled_beside(directory, marker, "pytorch_model.bin")
    with pytest.raises(ValueError, match="the weights of .* cannot be loaded"):
        train()
    assert not marker.exists()


def test_an_adapter_that_is_a_program_is_not_run(directory, marker, tmp_path) -> None:
    adapter = tmp_path / "adapter"
    get_peft_model(tiny_llama(), LoraConfig(base_model_name_or_path=str(directory))).save_pretrained(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    pickled_beside(adapter, marker, "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        merge(str(adapter), str(tmp_path / "merged"), str(directory), DPOConfig())
    assert not marker.exists()


def test_pickles_that_other_trainers_leave_are_not_opened(directory, train, marker) -> None:
    names = (
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "pytorch_model.bin",
        "adapter_model.bin",
    )
    pickled_beside(directory, marker, *names)
    train()
    assert not marker.exists()


@pytest.fixture
def saved(train, quick) -> Path:
    """A checkpoint."""
    train(save_strategy="steps", save_steps=1)
    return Path(quick["output_dir"]) / "checkpoint-1"


def signed(directory: Path) -> None:
    """The list of files of a checkpoint, as whoever changed these would make it."""
    files = [path for path in directory.iterdir() if path.is_file() and path.name != checkpoint.FILES]
    listed = {path.name: [path.stat().st_size, checkpoint._checksum(path)] for path in files}
    (directory / checkpoint.FILES).write_text(json.dumps(listed))


def test_a_state_of_a_run_that_is_a_program_is_refused(saved, train, marker) -> None:
    pickled_beside(saved, marker, "run.pt")
    signed(saved)
    with pytest.raises(ValueError, match="run.pt cannot be read"):
        train(max_steps=2, resume_from_checkpoint=True)
    assert not marker.exists()


@pytest.mark.parametrize("state", [None, [], {"rows": {}}, {"x": torch.ones(3)}])
def test_a_state_of_no_run_is_refused(state, saved, train) -> None:
    torch.save(state, saved / "run.pt")
    signed(saved)
    with pytest.raises(ValueError, match="holds no state of a run"):
        train(max_steps=2, resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "changes",
    [{"global_step": "../../../elsewhere"}, {"best_global_step": "/etc"}, {"log_history": "text"}, {"unknown": 1}],
    ids=str,
)
def test_steps_of_a_checkpoint_that_would_name_other_folders_are_refused(changes, saved, train) -> None:
    edit(saved / "trainer_state.json", **changes)
    signed(saved)
    with pytest.raises(ValueError, match="trainer_state.json"):
        train(max_steps=2, resume_from_checkpoint=str(saved))


def test_a_checkpoint_replaces_no_method_of_a_callback() -> None:
    callback = EarlyStoppingCallback(3)
    theirs = {"early_stopping_patience_counter": 2, "on_save": "nothing", "__class__": "nothing"}
    restore_callbacks([callback], {"EarlyStoppingCallback": [{"attributes": theirs}]})
    assert vars(callback) == {**vars(EarlyStoppingCallback(3)), "early_stopping_patience_counter": 2}


LISTS: list[Any] = [[], 3, {"a": 1}, {"a": [1, 2, 3]}, {}, {"../model/config.json": [1, 2]}, {"/etc/passwd": [1, 2]}]


@pytest.mark.parametrize("listed", LISTS, ids=str)
def test_a_list_of_files_that_names_others_is_damage(listed, saved) -> None:
    if isinstance(listed, dict) and listed:
        listed = {**json.loads((saved / checkpoint.FILES).read_text()), **listed}
    (saved / checkpoint.FILES).write_text(json.dumps(listed))
    assert checkpoint.FILES in checkpoint.damage(saved)


def test_a_checkpoint_of_links_is_read_by_its_checksums_as_downloads_are_made_of_them(saved, tmp_path) -> None:
    blob = tmp_path / "blob"
    (saved / "config.json").rename(blob)
    (saved / "config.json").symlink_to(blob)
    assert not checkpoint.damage(saved)
    blob.write_bytes(blob.read_bytes()[::-1])
    assert "config.json is not what was written" in checkpoint.damage(saved)


def test_only_checkpoints_of_runs_are_removed_and_never_what_links_lead_to(saved, tmp_path) -> None:
    out, elsewhere = saved.parent, tmp_path / "elsewhere"
    shutil.copytree(saved, out / "checkpoint-2")
    shutil.copytree(saved, elsewhere)
    (out / "checkpoint-3").symlink_to(elsewhere)
    for foreign in ("checkpoint-4", "checkpoint-²", "checkpoint-best", "checkpoint-5x"):
        (out / foreign).mkdir()
        (out / foreign / "notes").touch()
    checkpoint.remove_old(out, saved, TrainerState(), 1)
    left = {path.name for path in out.glob("checkpoint-*")}
    assert left == {saved.name, "checkpoint-3", "checkpoint-4", "checkpoint-²", "checkpoint-best", "checkpoint-5x"}
    assert (elsewhere / "config.json").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(messages[0]) }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_chat_templates_stay_in_their_sandbox(template, train) -> None:
    with pytest.raises(ValueError, match="the chat template refuses the messages"):
        train(tiny_llama(), [CHAT], processing_class=byte_level(template=template))


def test_templates_and_adapters_whose_names_are_paths_are_refused_before_training(directory, train, tmp_path) -> None:
    (directory / "chat_template.jinja").unlink()
    named = [{"name": name, "template": "{{ messages }}"} for name in ("default", "../../elsewhere")]
    edit(directory / "tokenizer_config.json", chat_template=named)
    with pytest.raises(ValueError, match=r"chat template called '../../elsewhere'"):
        train()
    adapted = get_peft_model(tiny_llama(), LoraConfig(), adapter_name=str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match="an adapter is called"):
        train(adapted, processing_class=byte_level())


def test_a_run_writes_into_its_output_dir_alone_whatever_its_inputs_are_called(
    directory, train, rows, tmp_path
) -> None:
    edit(directory / "config.json", _name_or_path="../../elsewhere\n# A title")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    odd = [{**row, "../../elsewhere": "text", "id": "/etc/passwd"} for row in rows[:3]]
    train(None, odd, eval_dataset={"../../elsewhere": odd}, save_strategy="steps", save_steps=1)
    out = tmp_path / "out"
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if not path.is_relative_to(out)}
    assert after == {path: time for path, time in before.items() if not path.is_relative_to(out)}
    assert "A title" not in (out / "README.md").read_text()


def test_yaml_makes_no_objects(tmp_path, capsys, marker) -> None:
    (tmp_path / "run.yaml").write_text(f"beta: !!python/object/apply:builtins.open ['{marker}', 'w']\n")
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(tmp_path / "run.yaml")])
    assert ended.value.code == 2 and "could not determine a constructor" in capsys.readouterr().err
    assert not marker.exists()


def test_remembered_log_probs_that_are_a_program_are_refused(train, marker, tmp_path) -> None:
    pickled_beside(tmp_path, marker, "ref.safetensors")
    with pytest.raises(ValueError, match="is no file of reference log-probs"):
        train(ref_log_probs=str(tmp_path / "ref.safetensors"))
    assert not marker.exists()


def test_nothing_of_ours_unpickles_or_reads_yaml_that_makes_objects() -> None:
    """Whatever is loaded with torch.load is loaded as tensors; numpy and pickle load nothing."""
    sources = [path.read_text() for path in Path(fastdpo.__file__).parent.glob("*.py")]
    for word in ("pickle.load", "yaml.load(", "np.load(", "allow_pickle", "weights_only=False", "joblib"):
        assert not any(word in source for source in sources), word
    loads = [line for source in sources for line in source.splitlines() if "torch.load(" in line]
    assert loads and all("weights_only=True" in line for line in loads)
