"""A Hugging Face causal LM from its config, with random weights: the real model of a plan, to be measured."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from meshwright import InputError
from meshwright.profiler.model import ModelSpec


class HuggingFaceModel:
    """Builds the model of a ``config.json`` (a file, or its folder); called with the plan's spec, which it must match.

    Raises ``InputError`` when transformers is not installed or does not know the config.
    """

    def __init__(self, source: Path) -> None:
        try:
            import transformers  # noqa: F401  # here, so that ranks forked later have it
        except ImportError:
            raise InputError("Hugging Face models need transformers: pip install transformers") from None
        self.source = source

    def __call__(self, spec: ModelSpec) -> nn.Module:
        """The model."""
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(self.source, local_files_only=True)
            model: nn.Module = AutoModelForCausalLM.from_config(config)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"transformers cannot build a causal LM from {self.source}: {error}") from None
        return model
