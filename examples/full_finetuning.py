"""Full fine-tuning: every weight trains, and the reference is a frozen copy of the model as it was.

Take it for a small model, or where adapters stop short of the quality that you need. It is the most that DPO costs: a
parameter takes 16 bytes of weight, gradient and Adam's two moments, and 4 more in the frozen copy, which is freed
before training where the reference is computed ahead, as here. `fastdpo plan --model ...` says what fits a GPU.

    python examples/full_finetuning.py --model Qwen/Qwen2.5-0.5B-Instruct --train_dataset pairs.jsonl
"""

from dataclasses import dataclass

from transformers import HfArgumentParser

import fastdpo


@dataclass
class Inputs:
    """What is trained on what; every field of DPOConfig is an argument beside them."""

    model: str = "Qwen/Qwen2.5-0.5B-Instruct"
    train_dataset: str = "trl-lib/ultrafeedback_binarized"


def main(words: list[str] | None = None) -> fastdpo.TrainResult:
    parser = HfArgumentParser((Inputs, fastdpo.DPOConfig))  # type: ignore[arg-type]
    parser.set_defaults(
        output_dir="full_finetuned",
        learning_rate=5e-7,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,
        gradient_checkpointing=True,
        precompute_ref_log_probs=True,
    )
    inputs, config = parser.parse_args_into_dataclasses(words)
    out = fastdpo.train(inputs.model, inputs.train_dataset, args=config)
    print(f"saved to {config.output_dir}: loss {out.metrics['train_loss']:.4f}")
    return out


if __name__ == "__main__":
    main()
