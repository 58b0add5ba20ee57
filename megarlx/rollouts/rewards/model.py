"""A Hugging Face sequence-classification folder as a reward: its logit of prompt and completion."""

from __future__ import annotations

from pathlib import Path

import torch

from megarlx.rollouts.rewards.sample import Sample


class RewardModel:
    """Runs in a worker process of its own, on its own device. Only safetensors are read, and no
    code of the folder is run."""

    def __init__(
        self,
        folder: str,
        device: str = "cpu",
        label: int = 0,
        samples_per_batch: int = 16,
        max_tokens: int | None = None,
    ) -> None:
        if not list(Path(folder).glob("*.safetensors")):
            raise ValueError(f"reward model {folder}: no .safetensors file there")
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        safe = {"local_files_only": True, "trust_remote_code": False}
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, **safe
        )
        self.model = model.eval().to(device)
        if not 0 <= label < model.config.num_labels:
            raise ValueError(
                f"reward model {folder}: label is {label}; allowed are 0 to "
                f"{model.config.num_labels - 1}"
            )
        self.device, self.label, self.max_tokens = device, label, max_tokens
        self.samples_per_batch = samples_per_batch

    @torch.inference_mode()
    def __call__(self, samples: list[Sample]) -> list[float]:
        rewards: list[float] = []
        for first in range(0, len(samples), self.samples_per_batch):
            part = samples[first : first + self.samples_per_batch]
            inputs = self.tokenizer(
                [sample.prompt + sample.completion for sample in part],
                padding=True,
                truncation=self.max_tokens is not None,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self.device)
            rewards += self.model(**inputs).logits[:, self.label].float().tolist()
        return rewards
