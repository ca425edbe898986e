"""The configs of examples/accelerate: accelerate takes every key of them, and fastdpo what accelerate makes of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from accelerate.utils.other import get_free_port
from conftest import draw_no_picture, praise_and_scolding, tiny_llama
from safetensors.torch import load_file
from test_ranks import assert_same
from tokenizers_for_tests import byte_level

import fastdpo
from fastdpo.cli import parse_training, training_parser
from fastdpo.sharding import asked_plugin

ROOT = Path(__file__).parent.parent
FILES = {path.stem: path for path in (ROOT / "examples/accelerate").glob("*.yaml")}
SHARDED = ("fsdp2", "fsdp2_nodes")
COMPARED = ("auto_wrap_policy", "transformer_cls_names_to_wrap", "reshard_after_forward", "cpu_ram_efficient_loading")


def launched(name: str) -> Any:
    """What `accelerate launch` makes of a file and of what is left to its command line."""
    words = ["--config_file", str(FILES[name]), "--main_process_port", "0", "-m", "fastdpo.cli", "train"]
    if name.endswith("nodes"):
        words = ["--main_process_ip", "10.0.0.1", "--machine_rank", "1", *words]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


@pytest.fixture
def plugin_of(quick: dict, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a run sees of a file, None where it asks for no sharding."""

    def of(name: str) -> FullyShardedDataParallelPlugin | None:
        for key, value in prepare_multi_gpu_env(launched(name)).items():
            if os.environ.get(key) != value:
                monkeypatch.setenv(key, value)
        return asked_plugin(fastdpo.DPOConfig(**quick).fsdp_plugin_args)

    return of


def test_the_files_are_the_three_that_the_docs_name() -> None:
    named = re.findall(r"examples/accelerate/(\w+)\.yaml", (ROOT / "docs/several_gpus.md").read_text())
    assert set(FILES) == set(named) == {"ddp", *SHARDED}


@pytest.mark.parametrize("name", FILES)
def test_accelerate_takes_every_key(name: str) -> None:
    given, arguments = yaml.safe_load(FILES[name].read_text()), launched(name)
    assert load_config_from_file(str(FILES[name])).distributed_type == given.pop("distributed_type")
    given.pop("main_process_port", None)  # another is free where tests run
    sharding = given.pop("fsdp_config", {})
    assert set(sharding) <= set(vars(launch_command_parser().parse_args(["script"])))
    for key, value in {**given, **sharding}.items():
        assert getattr(arguments, key) == value, key


def test_with_ddp_every_process_holds_the_whole_model(plugin_of: Any) -> None:
    assert plugin_of("ddp") is None


@pytest.mark.parametrize("name", SHARDED)
def test_a_run_shards_by_block_and_one_process_reads_the_weights(name: str, plugin_of: Any) -> None:
    plugin = plugin_of(name)
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is True
    assert plugin.transformer_cls_names_to_wrap is None and "transformer" in plugin.auto_wrap_policy.__name__


def test_the_second_machine_of_eight_has_its_eight_processes_and_meets_the_first() -> None:
    arguments = launched("fsdp2_nodes")
    prepare_multi_gpu_env(arguments)
    found = arguments.nnodes, arguments.nproc_per_node, arguments.node_rank
    assert found == ("8", "8", 1) and arguments.rdzv_endpoint.startswith("10.0.0.1:")


@pytest.mark.parametrize("fsdp", ["true", "full_shard"])
def test_options_of_torchrun_ask_for_what_the_files_do(fsdp: str, plugin_of: Any, quick: dict) -> None:
    settings = json.dumps({"cpu_ram_efficient_loading": True})
    words = ["--model", "M", "--train_dataset", "D", "--fsdp", fsdp, "--fsdp_config", settings]
    expected = plugin_of("fsdp2")
    config = fastdpo.DPOConfig(**parse_training(training_parser(), words)[1] | quick)
    plugin: Any = asked_plugin(config.fsdp_plugin_args)
    assert plugin.fsdp_version == 2
    for name in COMPARED:
        assert getattr(plugin, name) == getattr(expected, name), name


def test_the_command_for_two_machines_trains_as_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are this one, and each has its own command, as in the file."""
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_level().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, praise_and_scolding())))
    options = {"learning_rate": 1e-3, "adam_epsilon": 1e-6, "max_steps": 2, "logging_steps": 1}
    options |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    words = ["--model", str(tmp_path / "model"), "--train_dataset", str(tmp_path / "pairs.jsonl")]
    words += ["--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "4"]
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    where = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    where += ["--main_process_port", str(get_free_port())]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FILES["fsdp2_nodes"]), *where]
    machines = [
        subprocess.Popen(
            [*launcher, "--machine_rank", rank, "-m", "fastdpo.cli", "train", *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in "01"
    ]
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert all("FSDP2: 2 blocks" in text for text in said)
    assert ["model saved to" in text for text in said] == [True, False]
    draw_no_picture(monkeypatch)
    rows, place = str(tmp_path / "pairs.jsonl"), str(tmp_path / "model")
    options |= {"output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 8}
    out = fastdpo.train(place, rows, **options)
    assert_same(
        found_in(tmp_path / "two"), {**found_in(tmp_path / "one"), "weights": dict(out.model.named_parameters())}
    )


def found_in(directory: Path) -> dict[str, Any]:
    """The log, without times, and the weights that a run left."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    log = [{key: row[key] for key in ("step", "loss", "grad_norm", "logps/chosen") if key in row} for row in lines]
    return {"log": log, "weights": load_file(directory / "model.safetensors")}
