"""A preference loss of your own, beside one that is there: a function in `loss_type`.

Take it to try an idea: the formula is written once, its derivatives and its kernel are made from it, so it costs what
the built-in losses cost. This one asks for a margin between the answers and adds a little likelihood of the chosen ones
(sft), which keeps their log-probs from sinking. docs/losses.md has what a formula may contain.

    python examples/own_loss.py --model Qwen/Qwen2.5-0.5B-Instruct --train_dataset pairs.jsonl --use_peft
"""

from dataclasses import dataclass
from typing import Any

from transformers import HfArgumentParser

import fastdpo


@dataclass
class Inputs:
    """What is trained on what; every field of DPOConfig is an argument beside them."""

    model: str = "Qwen/Qwen2.5-0.5B-Instruct"
    train_dataset: str = "trl-lib/ultrafeedback_binarized"


def with_margin(m: Any, chosen: Any, rejected: Any, beta: Any, margin: float = 1.0) -> Any:
    """DPO whose answers are to be at least `margin` apart; m is the mathematics, the sides are log-ratios."""
    return -m.log_sigmoid(beta * (chosen - rejected) - margin)


def main(words: list[str] | None = None) -> fastdpo.TrainResult:
    parser = HfArgumentParser((Inputs, fastdpo.DPOConfig))  # type: ignore[arg-type]
    parser.set_defaults(output_dir="own_loss", per_device_train_batch_size=8)
    inputs, config = parser.parse_args_into_dataclasses(words)
    config.loss_type, config.loss_weights = [with_margin, "sft"], [1.0, 0.1]
    out = fastdpo.train(inputs.model, inputs.train_dataset, args=config)
    print(f"saved to {config.output_dir}: loss {out.metrics['train_loss']:.4f}")
    return out


if __name__ == "__main__":
    main()
