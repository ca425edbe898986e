"""Three ways to have an SFT adapter as the reference of DPO, by `--way`:

two_models      the adapter trains in one model, another has it as the reference: twice the weights in memory.
merged          the adapter is merged into its base, a new one of any rank trains on top, and the reference is without
                that: one model in memory, a copy on disk. In 4 bits the merge is into the dequantised weights it was
                trained over; training quantises the result again, which moves it a little.
adapter_twice   one model with the adapter under two names, of which one trains: least memory, no rounding.

    python examples/peft_options.py --way merged --adapter my-sft-adapter --train_dataset pairs.jsonl
"""

from dataclasses import dataclass
from typing import Literal

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, HfArgumentParser

import fastdpo
from fastdpo.merge import merge


@dataclass
class Inputs:
    """What is trained on what; every field of DPOConfig is an argument beside them."""

    way: Literal["two_models", "merged", "adapter_twice"] = "adapter_twice"
    adapter: str = "my-sft-adapter"  # the directory that SFT wrote; it names its base model
    train_dataset: str = "trl-lib/ultrafeedback_binarized"


def load(adapter: str, name: str, trains: bool) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(PeftConfig.from_pretrained(adapter).base_model_name_or_path)
    return PeftModel.from_pretrained(base, adapter, adapter_name=name, is_trainable=trains)


def two_models(inputs: Inputs, config: fastdpo.DPOConfig) -> fastdpo.TrainResult:
    model, ref_model = (load(inputs.adapter, "default", trains) for trains in (True, False))
    return fastdpo.train(model, inputs.train_dataset, ref_model=ref_model, args=config)


def merged(inputs: Inputs, config: fastdpo.DPOConfig) -> fastdpo.TrainResult:
    folder = f"{config.output_dir}/merged"
    merge(inputs.adapter, folder, None, config)  # as `fastdpo merge` does
    config.use_peft = True
    return fastdpo.train(folder, inputs.train_dataset, args=config)


def adapter_twice(inputs: Inputs, config: fastdpo.DPOConfig) -> fastdpo.TrainResult:
    model = load(inputs.adapter, "policy", trains=True)
    model.load_adapter(inputs.adapter, adapter_name="reference")
    config.model_adapter_name, config.ref_adapter_name = "policy", "reference"
    return fastdpo.train(model, inputs.train_dataset, args=config)


def main(words: list[str] | None = None) -> fastdpo.TrainResult:
    parser = HfArgumentParser((Inputs, fastdpo.DPOConfig))  # type: ignore[arg-type]
    parser.set_defaults(output_dir="dpo_adapter", learning_rate=5e-6, per_device_train_batch_size=8)
    inputs, config = parser.parse_args_into_dataclasses(words)
    ways = {"two_models": two_models, "merged": merged, "adapter_twice": adapter_twice}
    return ways[inputs.way](inputs, config)


if __name__ == "__main__":
    main()
