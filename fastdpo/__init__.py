"""fastdpo: train language models from preference pairs, with packed prompts, no logits and a lean loop."""

from fastdpo.config import DPOConfig
from fastdpo.train import DPOTrainer, TrainResult, train

__all__ = ["DPOConfig", "DPOTrainer", "TrainResult", "train"]
__version__ = "0.1.0"
