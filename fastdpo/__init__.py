"""fastdpo: train language models from preference pairs, with packed prompts, no logits and a lean loop.

Names are imported on first use, so that `fastdpo --version` does not wait for torch.
"""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdpo.config import DPOConfig
    from fastdpo.train import DPOTrainer, TrainResult, train

__all__ = ["DPOConfig", "DPOTrainer", "TrainResult", "train"]
__version__ = "0.1.0"

# Whenever peft imports bitsandbytes without a GPU, it asks for one more package, for 4-bit inference on CPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit" not in record.getMessage())


def __getattr__(name: str) -> Any:
    if name == "DPOConfig":
        from fastdpo.config import DPOConfig

        return DPOConfig
    if name in __all__:
        # the function takes the place of the module of its name, which the import system has just put there
        from fastdpo.train import DPOTrainer, TrainResult, train

        globals().update(DPOTrainer=DPOTrainer, TrainResult=TrainResult, train=train)
        return globals()[name]
    raise AttributeError(f"module 'fastdpo' has no attribute {name!r}")
