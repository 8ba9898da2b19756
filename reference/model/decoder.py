"""A Llama-family decoder, written once over a backend."""

from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from reference.kv_cache.cache import CacheView, KVCache
from reference.model.config import ModelConfig


def overlay(module: ModuleType | Any, base: ModuleType | Any) -> SimpleNamespace:
    """A backend made of ``module``'s ops where it has them and ``base``'s where not; ``.origin`` says which is which."""


class AdapterBank:
    """The LoRA adapters of a running model, stacked by linear layer, ranks padded: what the `lora` op reads."""


class Decoder:
    def __init__(self, config: ModelConfig, tensors: Mapping[str, np.ndarray], *, backend: ModuleType | Any,
                 dtype: str = "float32", weight_format: str = "auto", device: str | None = None): ...  # fmt: skip

    # tensors: by Hugging Face's names, as host arrays, or as `Weight`s already in a format (a GGUF kept as it is).

    def forward(self, token_ids: Any, positions: Any, view: CacheView, cache: KVCache, *, logit_rows: Any = None,
                adapters: AdapterBank | None = None, adapter_ids: Any = None) -> Any:
        """Logits, float32, of the rows asked for (all when None). Writes the step's keys and values to ``cache``."""  # fmt: skip
