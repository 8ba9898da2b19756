"""From multi-head attention to fewer key and value heads, by averaging them.

The KV cache holds ``num_kv_heads`` keys and values a token; with a quarter of the heads it serves four times the
context. A model trained with one KV head for each query head is converted by replacing each group of heads by its mean,
which keeps more of what they know than picking one of them. It then needs a little training (the paper: 5 % of the
original), which is not done here: converted without it, a model gets worse, unless the heads of a group were alike.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from reference._checks import require
from reference.model.config import ModelConfig


def convert_to_gqa(
    config: ModelConfig, tensors: Mapping[str, np.ndarray], num_kv_heads: int
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    r"""A checkpoint with ``num_kv_heads`` key and value heads, each the mean of a group of the old ones.

    .. math::
        W'_g = \frac{1}{|group_g|} \sum_{h \in group_g} W_h

    for the rows of k_proj and v_proj that make head h, and their biases. A group is consecutive heads, so that the
    query heads which shared an old head share its group's.

    Args:
        config: Of the old model, with any number of KV heads.
        tensors: By Hugging Face's names. Not changed; what has no KV heads is passed on, not copied.
        num_kv_heads: Divides the old number; 1 makes multi-query attention.

    Returns:
        The new config, and all its tensors, each in its own dtype.

    Raises:
        ValueError: If ``num_kv_heads`` does not divide the old number, or a tensor is missing.

    Source:
        Ainslie et al., *GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints*, 2023,
        section 2.1.

    Example:
        >>> config = ModelConfig("llama", vocab_size=8, hidden_size=4, intermediate_size=6, num_layers=1,
        ...                      num_heads=2, num_kv_heads=2, head_dim=2, max_position_embeddings=16)
        >>> tensors = {name: np.zeros(shape) for name, shape in config.expected_tensors().items()}
        >>> name = "model.layers.0.self_attn.v_proj.weight"
        >>> tensors[name] = np.array([[1.0, 0, 0, 0], [2, 0, 0, 0], [5, 0, 0, 0], [6, 0, 0, 0]])   # two heads of two
        >>> convert_to_gqa(config, tensors, 1)[1][name][:, 0]
        array([3., 4.])
    """
    divides = num_kv_heads >= 1 and config.num_kv_heads % num_kv_heads == 0
    require(divides, "convert_to_gqa", "num_kv_heads", f"a divisor of {config.num_kv_heads}", num_kv_heads)
    converted = replace(config, num_kv_heads=num_kv_heads)
    missing = [name for name in config.expected_tensors() if name not in tensors]
    require(not missing, "convert_to_gqa", "tensors", "every tensor of the model", f"none called {', '.join(missing)}")

    pooled = {}
    for name in converted.expected_tensors():
        has_kv_heads = ".k_proj." in name or ".v_proj." in name
        pooled[name] = _mean_of_groups(tensors[name], config, num_kv_heads) if has_kv_heads else tensors[name]
    return converted, pooled


def _mean_of_groups(tensor: np.ndarray, config: ModelConfig, num_kv_heads: int) -> np.ndarray:
    group = config.num_kv_heads // num_kv_heads
    heads = tensor.astype(np.float32).reshape(num_kv_heads, group, config.head_dim, *tensor.shape[1:])
    return heads.mean(axis=1).reshape(num_kv_heads * config.head_dim, *tensor.shape[1:]).astype(tensor.dtype)
