"""Go on training the adapter of a supervised fine-tuning: its frozen copy, in the same model, is the reference.

Take it after SFT with LoRA. It costs an adapter more than training a new one and nothing else: one model in memory, no
merged copy on disk, and what comes out is one adapter over the original model. The two phases share the adapter's rank;
`peft_options.py` has the ways for a new adapter on top.

    python examples/sft_adapter_as_reference.py --adapter my-sft-adapter --train_dataset pairs.jsonl
"""

from dataclasses import dataclass

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, HfArgumentParser

import fastdpo


@dataclass
class Inputs:
    """What is trained on what; every field of DPOConfig is an argument beside them."""

    adapter: str = "my-sft-adapter"  # a directory or a Hub name; it knows its base model
    train_dataset: str = "trl-lib/ultrafeedback_binarized"


def main(words: list[str] | None = None) -> fastdpo.TrainResult:
    parser = HfArgumentParser((Inputs, fastdpo.DPOConfig))  # type: ignore[arg-type]
    parser.set_defaults(output_dir="dpo_adapter", learning_rate=5e-6, per_device_train_batch_size=8)
    inputs, config = parser.parse_args_into_dataclasses(words)
    name = PeftConfig.from_pretrained(inputs.adapter).base_model_name_or_path
    base = AutoModelForCausalLM.from_pretrained(name)
    model = PeftModel.from_pretrained(base, inputs.adapter, is_trainable=True)
    out = fastdpo.train(model, inputs.train_dataset, args=config)
    print(f"adapter in {config.output_dir}: loss {out.metrics['train_loss']:.4f}")
    return out


if __name__ == "__main__":
    main()
