"""fastdpo: train language models from preference pairs, with packed prompts, no logits and a lean loop.

Names are imported on first use, so that `fastdpo --version` does not wait for torch.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdpo.config import DPOConfig
    from fastdpo.logps import token_logps
    from fastdpo.patching import patch, unpatch
    from fastdpo.train import DPOTrainer, TrainResult, train

__all__ = ["DPOConfig", "DPOTrainer", "TrainResult", "patch", "token_logps", "train", "unpatch"]
__version__ = "0.1.0"

# Whenever peft imports bitsandbytes without a GPU, it asks for one more package, for 4-bit inference on CPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit" not in record.getMessage())


_HOMES = {"DPOConfig": "config", "token_logps": "logps", "patch": "patching", "unpatch": "patching"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"fastdpo.{_HOMES[name]}"), name)
    if name in __all__:
        # the function takes the place of the module of its name, which the import system has just put there
        from fastdpo.train import DPOTrainer, TrainResult, train

        globals().update(DPOTrainer=DPOTrainer, TrainResult=TrainResult, train=train)
        return globals()[name]
    raise AttributeError(f"module 'fastdpo' has no attribute {name!r}")
