"""megarlx: language models trained from scratch, with reinforcement learning anywhere in the training."""

__version__ = "0.1.0"
