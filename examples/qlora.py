"""QLoRA: the weights in 4 bits, frozen; adapters on every linear layer train, and the reference is the model without.

Take it where the model in 16 bits does not fit the GPU: weights take about 0.6 bytes a parameter instead of 2, and
there is no second model. The 4-bit weights are a slightly worse model than those they came from, and are dequantised on
their way through each layer; where 16 bits fit, `--load_in_4bit False --use_peft True` is LoRA, faster and more exact.

    python examples/qlora.py --model mistralai/Mistral-7B-Instruct-v0.3 --train_dataset pairs.jsonl
"""

from dataclasses import dataclass

from transformers import HfArgumentParser

import fastdpo


@dataclass
class Inputs:
    """What is trained on what; every field of DPOConfig is an argument beside them."""

    model: str = "mistralai/Mistral-7B-Instruct-v0.3"
    train_dataset: str = "trl-lib/ultrafeedback_binarized"


def main(words: list[str] | None = None) -> fastdpo.TrainResult:
    parser = HfArgumentParser((Inputs, fastdpo.DPOConfig))  # type: ignore[arg-type]
    parser.set_defaults(
        output_dir="qlora",
        load_in_4bit=True,
        lora_r=16,
        lora_alpha=32,
        learning_rate=2e-5,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        gradient_checkpointing=True,
        optim="paged_adamw_8bit",
    )
    inputs, config = parser.parse_args_into_dataclasses(words)
    out = fastdpo.train(inputs.model, inputs.train_dataset, args=config)
    print(f"adapters of {config.output_dir}: loss {out.metrics['train_loss']:.4f}")
    return out


if __name__ == "__main__":
    main()
