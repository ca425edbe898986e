"""A vision-language model from pairs whose prompts show images: LoRA, and the reference is the model without.

Take it where answers are to be true to a picture. Rows have `images` (or `image`) beside prompt, chosen and rejected:
PIL images, or paths from the file of rows. An image takes hundreds of tokens, and once for each answer, as batches of
such models are padded: memory goes there more than to weights, so smaller images are what saves most.

    python examples/vision_language.py --model HuggingFaceTB/SmolVLM-Instruct --train_dataset pairs.jsonl
"""

from dataclasses import dataclass

from transformers import HfArgumentParser

import fastdpo


@dataclass
class Inputs:
    """What is trained on what; every field of DPOConfig is an argument beside them."""

    model: str = "HuggingFaceTB/SmolVLM-Instruct"
    train_dataset: str = "HuggingFaceH4/rlaif-v_formatted"


def main(words: list[str] | None = None) -> fastdpo.TrainResult:
    parser = HfArgumentParser((Inputs, fastdpo.DPOConfig))  # type: ignore[arg-type]
    parser.set_defaults(
        output_dir="vision_adapter",
        use_peft=True,
        learning_rate=1e-5,
        max_length=2048,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        gradient_checkpointing=True,
    )
    inputs, config = parser.parse_args_into_dataclasses(words)
    out = fastdpo.train(inputs.model, inputs.train_dataset, args=config)
    print(f"adapters in {config.output_dir}: loss {out.metrics['train_loss']:.4f}")
    return out


if __name__ == "__main__":
    main()
