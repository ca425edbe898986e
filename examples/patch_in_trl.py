"""TRL's own DPOTrainer on a model with fastdpo's kernels: one line, before the trainer is made.

TRL adds the adapters after that; the patched model finds them at each call. Runs on a CPU in seconds, on a tiny random
model whose tokens are bytes; put your own model, tokenizer and dataset in.
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

import fastdpo

ROWS = [
    {"prompt": f"Is {n} even?", "chosen": " Yes." if n % 2 == 0 else " No.", "rejected": " I refuse to say."}
    for n in range(16)
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = ["<eos>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: n for n, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def main() -> list[float]:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=1, **shape))
    fastdpo.patch(model)
    with tempfile.TemporaryDirectory() as folder:
        options = {"per_device_train_batch_size": 8, "max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2}
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(folder, bf16=False, use_cpu=True, report_to="none", save_strategy="no", **options),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
