"""DPO with LoRA in a plain PyTorch loop: `fastdpo.patch` for the model, `fastdpo.token_logps` in place of its logits.

Runs on a CPU in seconds, on a tiny random model whose tokens are bytes; put your own model, tokens and rows in.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM

import fastdpo

ROWS = [("Is 7 a prime? ", "Yes.", "No way!"), ("Is 8 a prime? ", "It is not.", "Yes."), ("2 + 2 = ", "4", "five")]


def encode(prompt: str, answer: str, length: int = 32) -> tuple[torch.Tensor, ...]:
    """-> ids, mask and labels, (length,); only the answer and the 0 that ends it are scored."""
    ids, place = torch.tensor([*(prompt + answer).ljust(length, "\0").encode()]), torch.arange(length)
    mask = place <= len(prompt + answer)
    return ids, mask.long(), ids.where(mask & (place >= len(prompt)), -100)


def main() -> list[float]:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape))
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    fastdpo.patch(model)
    sides = [encode(row[0], row[side]) for side in (1, 2) for row in ROWS]
    batch = [torch.stack(column) for column in zip(*sides, strict=True)]  # chosen rows, then rejected ones
    with torch.no_grad(), model.disable_adapter():
        reference = fastdpo.token_logps(model, *batch).sum(-1)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for step in range(8):
        chosen, rejected = (fastdpo.token_logps(model, *batch).sum(-1) - reference).chunk(2)
        loss = -logsigmoid(0.1 * (chosen - rejected)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
