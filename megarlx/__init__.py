"""megarlx: a trainer for language models, with reinforcement learning anywhere in training."""

__version__ = "0.1.0"
