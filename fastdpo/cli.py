"""The command line: `fastdpo train`, `plan`, `reference`, `merge`, `doctor` and `demo`.

Every field of DPOConfig is an option of `fastdpo train`, written as `--flag`, `--flag true` or `--no_flag`, as a list
of words, or as JSON for a dict. A YAML file given with `--config` holds the same options: its lines become arguments
before those of the command line, so one parser reads both and the command line wins. torch and transformers load only
when a command needs them.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from fastdpo.config import DPOConfig
    from fastdpo_kernels.launch import Device

# Names of TRL's scripts that are no options here: what to do instead.
_REFUSED_INPUTS = {
    "datasets": "give several to --train_dataset, and --train_dataset_weights if they are to be drawn by weight",
    "streaming": "it belongs to a mixture of datasets; for one dataset use --dataset_streaming",
    "test_split_size": "split the file beforehand and give --eval_dataset",
    "ignore_bias_buffers": "it works around a fault of several-process training with old models; leave it out",
    "env": "set environment variables in the shell",
}

_MOST_BYTES = 2**42  # 4 TiB: more than any card has, and less than bytes that are taken for GiB


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = {"train": train, "plan": plan, "reference": reference, "merge": merge, "doctor": doctor, "demo": demo}
    parser = argparse.ArgumentParser(
        prog="fastdpo",
        description="Train language models from preference pairs.",
        epilog="train: a model and a file of pairs; plan: where its memory would go; reference: its reference "
        "log-probs alone; merge: an adapter into its base; doctor: what this machine can do; demo: the whole way in a "
        "few minutes, without GPU or network. `fastdpo train --help` lists the options.",
    )
    parser.add_argument("--version", action="version", version=_version("fastdpo"))
    parser.add_argument("command", choices=commands)
    return commands[parser.parse_args(argv[:1]).command](argv[1:])


def demo(argv: list[str]) -> int:
    """The main job on a tiny model that is made on the spot."""
    from fastdpo.demo import main as run_demo

    return run_demo(argv)


def train(argv: list[str]) -> int:
    """Trains from the options in `argv`; bad input gives one line and exit code 1, a misspelt option 2."""
    return _run(_train, *parse_training(training_parser(), argv))


def plan(argv: list[str]) -> int:
    """Prints where the memory of a run would go, from the model's config alone; 0 if it fits, 1 if it does not."""
    return _run(_plan, *parse_training(training_parser("plan"), argv))


def reference(argv: list[str]) -> int:
    """Computes reference log-probs alone and writes, or adds to, a file that `ref_log_probs` reads."""
    return _run(_reference, *parse_training(training_parser("reference"), argv))


def merge(argv: list[str]) -> int:
    """Merges an adapter into its base, dequantised where it is quantised, and writes the model."""
    parser = _Parser(prog="fastdpo merge", description="Merge an adapter into its base and write the model.")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="what training with adapters wrote")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="where the merged model goes")
    parser.add_argument("--model", help="the base (default: the one that the adapter names)")
    parser.add_argument("--model_revision", default="main", help="of the base (default: main)")
    parser.add_argument("--dtype", default="bfloat16", help="of what is written (default: bfloat16)")
    parser.add_argument("--load_in_4bit", action="store_true", help="the adapter was trained over 4-bit weights")
    parser.add_argument("--load_in_8bit", action="store_true", help="the adapter was trained over 8-bit weights")
    parser.add_argument("--bnb_4bit_quant_type", default="nf4", help="of the 4-bit weights (default: nf4)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "--use_cpu", action="store_true", help="merge on the CPU (default: the GPU, where there is one)"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    inputs = parser.parse_args(argv)
    taken = ("adapter", "output_dir", "model", "traceback")
    return _run(_merge, inputs, {name: value for name, value in vars(inputs).items() if name not in taken})


def _merge(inputs: argparse.Namespace, options: dict[str, Any]) -> None:
    from fastdpo.config import DPOConfig
    from fastdpo.merge import merge as write_merged
    from fastdpo.messages import show_messages

    show_messages()
    if not options["load_in_4bit"]:
        del options["bnb_4bit_quant_type"]  # DPOConfig refuses it where nothing is quantised to 4 bits
    config = DPOConfig(output_dir=inputs.output_dir, report_to="none", **options)
    write_merged(inputs.adapter, inputs.output_dir, inputs.model, config)


def _run(command: Callable[..., int | None], inputs: argparse.Namespace, options: dict[str, Any]) -> int:
    try:
        return command(inputs, options) or 0
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if inputs.traceback:
            raise
        return _told(error, str(error))
    except Exception as error:  # the outermost edge: an error of a library, which may not say what it is
        if inputs.traceback:
            raise
        return _told(error, f"{type(error).__name__}: {error} (--traceback shows where)")


def _told(error: Exception, text: str) -> int:
    """One line for the error, and one for each advice that was noted on it."""
    print(f"fastdpo: error: {' '.join(text.split())}", file=sys.stderr)
    for note in getattr(error, "__notes__", []):
        print(" ".join(note.split()), file=sys.stderr)
    return 1


def _train(inputs: argparse.Namespace, options: dict[str, Any]) -> None:
    from fastdpo.config import DPOConfig
    from fastdpo.messages import show_messages

    show_messages()

    config = DPOConfig(**options)
    if config.do_predict:
        raise ValueError("do_predict has no meaning here: fastdpo train trains, and evaluates with eval_strategy.")
    if config.do_eval and config.eval_strategy == "no":
        raise ValueError("do_eval needs a time to evaluate: set eval_strategy to epoch or steps.")
    train_dataset, eval_dataset = _datasets(inputs, config)
    import fastdpo

    result = fastdpo.train(
        inputs.model, train_dataset, eval_dataset=eval_dataset, ref_model=inputs.ref_model, args=config
    )
    if result.trainer.is_world_process_zero():
        print(f"model saved to {config.output_dir}")
        for name, value in result.metrics.items():
            print(f"{name:28} {value:.6g}" if isinstance(value, float) else f"{name:28} {value}")
    result.trainer.accelerator.end_training()  # leaves the other processes


def _plan(inputs: argparse.Namespace, options: dict[str, Any]) -> int:
    import torch

    from fastdpo import build, memory
    from fastdpo.config import DPOConfig
    from fastdpo.loading import check_model, load_model_config
    from fastdpo.messages import show_messages
    from fastdpo_kernels import launch

    show_messages()
    here = torch.cuda.is_available() and inputs.gpu is None
    if not here and inputs.gpu is None and inputs.gpu_memory is None:
        raise ValueError(
            "there is no GPU here to plan for: give --gpu_memory, such as --gpu_memory 24GiB, or --gpu with a name out "
            f"of {', '.join(launch.CARDS)}."
        )
    name = inputs.gpu or "RTX 4090"
    device = launch.device_of(torch.device("cuda")) if here else launch.CARDS[name]
    device = dataclasses.replace(device, memory_bytes=inputs.gpu_memory or device.memory_bytes)
    config = DPOConfig(**options) if here else _config_for(device, options)
    check_model(inputs.model, "model", config)
    tables = []
    if inputs.train_dataset is None and inputs.eval_dataset is not None:
        raise ValueError("--eval_dataset alone does not say how long pairs are: give --train_dataset too.")
    if inputs.train_dataset is not None:
        folder = Path(inputs.model).parent if Path(inputs.model).is_file() else inputs.model
        if Path(folder).is_dir() and not any(Path(folder).glob("tokenizer*")):
            raise ValueError(f"{folder} has no tokenizer to count tokens with: leave --train_dataset out, or add one.")
        tokenizer = build.find_tokenizer(None, str(folder), config)
        rows, held_out = _datasets(inputs, config)
        tables = [build.build_train_table(rows, tokenizer, config)]
        tables += build.build_eval_tables(held_out, tokenizer, config).values()

    made = memory.plan_memory(
        load_model_config(inputs.model, config),
        config,
        memory=device.memory_bytes,
        device=device,
        ref_config=None if inputs.ref_model is None else load_model_config(inputs.ref_model, config, True),
        tables=tables,
    )
    if not here:
        chip = f"a card like the {name}" if inputs.gpu else f"a card whose chip is taken for the {name}'s (--gpu)"
        print(f"{chip}, with {device.memory_bytes / 2**30:.4g} GiB:")
    print("\n".join(made.lines()))
    return 0 if made.fits else 1


def _config_for(device: "Device", options: dict[str, Any]) -> "DPOConfig":
    """The config of a run on a card that is not here: bf16 where that has it, and what only a GPU takes is taken."""
    from fastdpo.config import DPOConfig

    options = dict(options)
    of_gpu = [name for name in ("fp16", "activation_offloading", "memory") if options.get(name)]
    if options.get("bf16") and "fp16" in of_gpu:
        of_gpu.remove("fp16")  # refused, as anywhere
    taken = {name: options.pop(name) for name in of_gpu}
    has_bf16 = isinstance(device.arch, str) or device.arch >= 80
    options.setdefault("bf16", has_bf16 and "fp16" not in of_gpu)
    config = DPOConfig(**options)
    for name, value in taken.items():
        setattr(config, name, value)
    config.gradient_checkpointing |= config.activation_offloading
    config.check_checkpointing()
    return config


def _reference(inputs: argparse.Namespace, options: dict[str, Any]) -> None:
    from fastdpo.config import DPOConfig
    from fastdpo.messages import show_messages

    show_messages()
    if "ref_log_probs" in options:
        raise ValueError("ref_log_probs is a file to train with: fastdpo reference writes to --output.")
    ours: dict[str, Any] = {"precompute_ref_log_probs": True, "ref_log_probs": inputs.output, "report_to": "none"}
    with tempfile.TemporaryDirectory() as nothing:  # goes into it
        config = DPOConfig(**{**options, **ours, "output_dir": nothing})
        train_dataset, eval_dataset = _datasets(inputs, config)
        from fastdpo.build import compute_reference

        known = compute_reference(inputs.model, inputs.ref_model, train_dataset, eval_dataset, config)
    print(f"reference log-probs of {known} rows are in {inputs.output}")


def _datasets(inputs: argparse.Namespace, config: "DPOConfig") -> tuple[Any, Any]:
    """Training and evaluation rows; a dataset with splits serves for both, as in TRL's script."""
    rows, held_out = inputs.train_dataset, inputs.eval_dataset
    if held_out is None and config.eval_strategy != "no":
        if isinstance(rows, list) or Path(rows).expanduser().is_file():
            raise ValueError(
                f"eval_strategy needs rows to evaluate on, and {rows} has no split for them: give --eval_dataset."
            )
        held_out = rows
    if inputs.dataset_config is None and not inputs.dataset_streaming:
        return rows, held_out
    return _from_hub(rows, config.dataset_train_split, inputs), _from_hub(held_out, config.dataset_test_split, inputs)


def _one_or_named(parser: "_Parser", words: list[str] | None) -> str | dict[str, str] | None:
    """ROWS, or several sets as NAME=ROWS, a file's name being one."""
    if not words or len(words) == 1 and "=" not in words[0]:
        return words[0] if words else None
    named = {}
    for word in words:
        name, equals, rows = word.partition("=")
        name, rows = (name, rows) if equals else (Path(word).stem, word)
        if name in named:
            parser.error(f"--eval_dataset has two sets called {name!r}: give names, as in other={rows}")
        named[name] = rows
    return named


def _from_hub(name: Any, split: str, inputs: argparse.Namespace) -> Any:
    """A dataset by its name, or a list or a dict of such."""
    import datasets

    if isinstance(name, list):
        return [_from_hub(one, split, inputs) for one in name]
    if isinstance(name, dict):
        return {key: _from_hub(one, split, inputs) for key, one in name.items()}
    if name is None:
        return None
    if Path(name).expanduser().exists():
        raise ValueError(
            f"dataset_config and dataset_streaming are for datasets of the Hub, and {name} is here: drop them."
        )
    return datasets.load_dataset(name, inputs.dataset_config, split=split, streaming=inputs.dataset_streaming)


class _Parser(argparse.ArgumentParser):
    """Knows every option's name, so that it can say which one a misspelt one is like."""

    names: list[str]

    def unknown(self, name: str, where: str = "") -> NoReturn:
        from fastdpo.verdicts import nearest

        if name in _REFUSED_INPUTS:
            self.error(f"{where}{name} is not supported: {_REFUSED_INPUTS[name]}")
        self.error(f"{where}unknown option {name!r}{nearest(name, self.names)}")


# Command -> what it writes, and what it does, for its help.
_COMMANDS = {
    "train": ("--output_dir OUT", "Train a causal language model from preference pairs."),
    "plan": ("--gpu_memory SIZE", "Print where a run's memory would go; exit code 0 if it fits, 1 if it does not."),
    "reference": ("--output FILE", "Compute reference log-probs alone, for --ref_log_probs FILE of many runs."),
}


def training_parser(command: str = "train") -> _Parser:
    """The options of a command: inputs, then DPOConfig's by topic; those that do not work are hidden."""
    from fastdpo.config import DPOConfig
    from fastdpo.verdicts import VERDICTS

    parser = _Parser(
        prog=f"fastdpo {command}",
        usage=f"fastdpo {command} --model MODEL --train_dataset ROWS {_COMMANDS[command][0]} [options]",
        epilog="A true-or-false option takes --name, --name true, --name false or --no_name.",
        description=_COMMANDS[command][1],
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
        allow_abbrev=False,
    )
    inputs = parser.add_argument_group("inputs")
    _add_inputs(inputs)
    if command == "plan":
        inputs.add_argument(
            "--gpu_memory", type=_bytes, metavar="SIZE", help="memory of the card, as 24GiB (default: the GPU's)"
        )
        inputs.add_argument("--gpu", type=_gpu, metavar="NAME", help="such as T4 or H200 (default: the GPU here)")
    if command == "reference":
        inputs.add_argument("--output", metavar="FILE", help="the file to write, or to add rows to")
    fields = {field.name: field for field in dataclasses.fields(DPOConfig)}
    hints = get_type_hints(DPOConfig)
    topics = {verdict.topic: parser.add_argument_group(verdict.topic) for verdict in VERDICTS.values() if verdict.topic}
    for name, verdict in VERDICTS.items():
        if verdict.topic and name in fields:
            _add_field(topics[verdict.topic], fields[name], hints[name])
        else:  # DPOConfig says what to do instead
            parser.add_argument(
                f"--{name}", nargs="?", const=True, default=argparse.SUPPRESS, type=_loose, help=argparse.SUPPRESS
            )
    parser.names = [action.dest for action in parser._actions if action.dest != "help"]
    return parser


def _add_inputs(group: Any) -> None:
    group.add_argument("--config", metavar="FILE", help="YAML file of options; the command line wins over it")
    group.add_argument("--model", "--model_name_or_path", help="directory or Hub name of the model to train")
    group.add_argument(
        "--train_dataset",
        "--dataset_name",
        nargs="+",
        metavar="ROWS",
        help="jsonl, json, parquet or csv file, or Hub name; several are mixed, see train_dataset_weights",
    )
    group.add_argument(
        "--eval_dataset",
        nargs="+",
        metavar="ROWS",
        help="rows to evaluate on, several sets as NAME=ROWS (default: dataset_test_split of a dataset with splits)",
    )
    group.add_argument("--ref_model", metavar="MODEL", help="the reference (default: the model before training)")
    group.add_argument("--dataset_config", metavar="NAME", help="configuration of a Hub dataset (default: none)")
    group.add_argument(
        "--dataset_streaming",
        type=_truth,
        nargs="?",
        const=True,
        default=False,
        metavar="true|false",
        help="stream a Hub dataset (default: false)",
    )
    group.add_argument("--traceback", action="store_true", help="show where an error came from (default: false)")


def _add_field(group: Any, field: dataclasses.Field, hint: Any) -> None:
    from fastdpo.verdicts import CHOICES

    name, kinds = field.name, get_args(hint) or (hint,)
    if field.default is not dataclasses.MISSING:
        default = field.default
    else:
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    about = str(field.metadata.get("help", "")).split(". ")[0].rstrip(".").replace("%%", "%").replace("%", "%%")
    about += f": {', '.join(CHOICES[name])}" if name in CHOICES else ""
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"{about} (default: {_shown(default)})"}
    lists = [kind for kind in (*kinds, hint) if get_origin(kind) is list]
    if bool in kinds:
        group.add_argument(f"--{name}", type=_truth, nargs="?", const=True, metavar="true|false", **options)
        options["help"] = argparse.SUPPRESS
        group.add_argument(f"--no_{name}", dest=name, action="store_false", **options)
    elif lists:
        group.add_argument(f"--{name}", type=get_args(lists[0])[0], nargs="+", metavar="X", **options)
    else:
        metavar = "JSON" if dict in kinds else "X"
        group.add_argument(f"--{name}", type=_converter(kinds), metavar=metavar, **options)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(getattr(value, "value", value))


def _converter(kinds: Iterable[Any]) -> Callable[[str], Any]:
    number = int if int in kinds else float if float in kinds else None
    if number is None:
        return str  # DPOConfig reads JSON

    def convert(text: str) -> Any:
        if type(None) in kinds and text.lower() in ("none", "null"):
            return None
        return number(text)

    convert.__name__ = "whole number" if number is int else "number"  # argparse puts it into its message
    return convert


def _truth(text: str) -> bool | None:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "none": None, "null": None}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return words[text.lower()]


def _bytes(text: str) -> int:
    """24GiB, 24G, 24GB, 24000MiB or 1TB; a number alone is of GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([TGM]?)(i?)(B?)", text.strip(), re.IGNORECASE)
    if found is None or (found[3] or found[4]) and not (found[2] and found[4]):
        raise argparse.ArgumentTypeError(f"expected a size such as 24GiB, got {text!r}")
    power = {"m": 2, "": 3, "g": 3, "t": 4}[found[2].lower()]
    size = float(found[1]) * (1000 if found[4] and not found[3] else 1024) ** power  # 24G is 24GiB, 24GB is not
    if not 1 <= size <= _MOST_BYTES:
        alone = "" if found[2] else "; a number alone is of GiB"
        raise argparse.ArgumentTypeError(f"expected the memory of a card, such as 24GiB, got {text!r}{alone}")
    return int(size)


def _gpu(text: str) -> str:
    """A card whose numbers are known, by its name in whatever case, with or without spaces."""
    from fastdpo_kernels.launch import CARDS

    plain = {re.sub(r"[\s_-]", "", name).lower(): name for name in CARDS}
    name = plain.get(re.sub(r"[\s_-]", "", text).lower())
    if name is None:
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(CARDS)}, got {text!r}: for another card give --gpu_memory and the one that "
            "is most like it"
        )
    return name


def _loose(text: str) -> Any:
    """A value of an option without a declared type: JSON where it is JSON, else the text."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except json.JSONDecodeError:
        return text


def parse_training(parser: _Parser, argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """-> the inputs, and the options that were given, for DPOConfig."""
    argv = [_underscored(word) for word in argv]
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    given, rest = parser.parse_known_args((_words_of_yaml(parser, path) if path else []) + argv)
    for word in rest:
        if word.startswith("--"):
            parser.unknown(word[2:].split("=")[0])
    if rest:
        parser.error(f"unexpected argument {rest[0]!r}: every option has a name, as in --beta 0.2")
    options = vars(given)
    names = (
        "config",
        "model",
        "train_dataset",
        "eval_dataset",
        "ref_model",
        "dataset_config",
        "dataset_streaming",
        "traceback",
    )
    inputs = argparse.Namespace(**{name: options.pop(name) for name in names})
    needed = {"model", "output"} if "gpu_memory" in options else {"model", "train_dataset", "output"}
    for name in {"output", "gpu_memory", "gpu"} & set(options):
        setattr(inputs, name, options.pop(name))
    for name, value in vars(inputs).items():
        if name in needed and value is None:
            parser.error(f"--{name} is missing: {(parser.usage or '').removesuffix(' [options]')}")
    inputs.eval_dataset = _one_or_named(parser, inputs.eval_dataset)
    if inputs.train_dataset and len(inputs.train_dataset) == 1:
        (inputs.train_dataset,) = inputs.train_dataset
    return inputs, options


def _underscored(word: str) -> str:
    """--learning-rate=1e-6 -> --learning_rate=1e-6"""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _words_of_yaml(parser: _Parser, path: str) -> list[str]:
    """The options of a YAML file as the arguments that they would be on the command line."""
    import yaml

    try:
        options = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {path} cannot be read: {' '.join(str(error).split())}")
    if not isinstance(options, dict):
        parser.error(f"--config {path} must hold a mapping of options to values, got {type(options).__name__}")
    words = []
    for name, value in options.items():
        known = [*parser.names, "model_name_or_path", "dataset_name"]
        if name not in known or name == "config":
            parser.unknown(str(name), where=f"{path}: ")
        words += _words_of_option(name, value)
    return words


def _words_of_option(name: str, value: Any) -> list[str]:
    from fastdpo.verdicts import CHOICES, VERDICTS

    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if name == "eval_dataset" and isinstance(value, dict):
        return [f"--{name}", *(f"{key}={rows}" for key, rows in value.items())]
    present = VERDICTS[name].instead if name in VERDICTS and VERDICTS[name].kind == "renamed" else name
    if value is False and "no" in CHOICES.get(present, ()):
        value = "no"  # as YAML reads an unquoted no
    if value is None and not _is_optional(present):
        return []
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value, default=str)}"]


def _is_optional(name: str) -> bool:
    """Whether an empty value means something else than leaving the option out."""
    from fastdpo.config import DPOConfig

    return any(field.name == name and field.default is not None for field in dataclasses.fields(DPOConfig))


def doctor(argv: list[str]) -> int:
    """Prints versions, devices and the way each kernel takes; returns 1 with the reason where training cannot run."""
    argparse.ArgumentParser(prog="fastdpo doctor", description=doctor.__doc__).parse_args(argv)
    problems = []
    _print_rows("versions", [("python", platform.python_version()), ("fastdpo", _version("fastdpo"))])
    needed = _needed_versions()
    for package in ("torch", "transformers", "datasets", "peft", "accelerate", "triton", "bitsandbytes", "flash-attn"):
        version = _version(package)
        print(f"  {package:22} {version}")
        if version == "not installed" and package in ("torch", "transformers", "datasets", "peft", "accelerate"):
            problems.append(f"{package} is not installed: pip install {package}")
        elif (
            version != "not installed" and package in needed and not needed[package].contains(version, prereleases=True)
        ):
            problems.append(f"{package} {version} does not fit {needed[package]}: pip install -U {package}")
    if not problems:
        problems += _devices()
        _paths()
    for problem in problems:
        print(f"fastdpo cannot train here: {problem}")
    if not problems:
        print("fastdpo can train here.")
    return int(bool(problems))


def _print_rows(title: str, rows: Iterable[tuple[str, str]]) -> None:
    print(title)
    for name, value in rows:
        print(f"  {name:22} {value}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _needed_versions() -> dict[str, Any]:
    """What the installed fastdpo asks for; nothing where it runs from a bare checkout."""
    from packaging.requirements import Requirement

    if _version("fastdpo") == "not installed":
        return {}
    requirements = [Requirement(line) for line in importlib.metadata.requires("fastdpo") or []]
    return {one.name: one.specifier for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})}


def _devices() -> list[str]:
    """Prints what can compute; -> what is wrong with it."""
    import torch

    rows = [("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")]
    problems = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        memory = f"{card.total_memory / 2**30:.1f} GiB"
        rows.append((f"cuda:{index}", f"{card.name}, capability {card.major}.{card.minor}, {memory}, {bf16}"))
        try:
            torch.ones(1, device=f"cuda:{index}").add(1).item()
        except RuntimeError as error:
            problems.append(f"cuda:{index} cannot compute with torch {torch.__version__}: {str(error).splitlines()[0]}")
    if len(rows) == 1:
        rows.append(("GPU", "none that torch can use: training runs on the CPU"))
    _print_rows("devices", rows)
    return problems


def _paths() -> None:
    from fastdpo import attention
    from fastdpo_kernels import glu, linear_logps, lora, nf4, pair_loss, rms_norm, rope

    kernels = (linear_logps, pair_loss, lora, nf4, rms_norm, rope, glu)
    reports = attention.backend_report(), *(kernel.method_report() for kernel in kernels)
    _print_rows("paths", [row for report in reports for row in report])


if __name__ == "__main__":
    sys.exit(main())
