"""What a Llama-family model is made of, read from its config; which family it is.

The families differ in four small things only: which linear layers have a bias, whether q and k are normed per head,
how far back each layer looks (its sliding window), and how rotary frequencies are scaled for long contexts. So one
config, and one decoder, serves them all.

A config comes from a stranger's file. Every size is checked here, before anything is allocated from it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reference._checks import require
from reference.fusion.rotary import rotary_tables

FAMILIES: tuple[str, ...] = ("llama", "mistral", "qwen2", "qwen3")
ARCHITECTURES = {f"{family.capitalize()}ForCausalLM": family for family in FAMILIES}

# Largest size believed. Generous (ten times any model known), yet far from what would exhaust a machine by itself.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_layers": 2**12,
    "num_heads": 2**12,
    "num_kv_heads": 2**12,
    "head_dim": 2**12,
    "max_position_embeddings": 2**24,
}
HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and switches of one model. Raises ``ValueError`` naming the field when one makes no sense.

    Attributes:
        family: One of ``FAMILIES``. SmolLM2 is "llama".
        num_kv_heads: Key and value heads; divides ``num_heads``.
        head_dim: Even. Not always ``hidden_size / num_heads`` (Qwen3).
        max_position_embeddings: The longest context the model was made for, in tokens.
        rope_base: Wavelengths of the rotary embedding grow geometrically from 2 pi up to 2 pi ``rope_base``.
        rope_scaling: How frequencies are scaled for contexts longer than trained on, in Hugging Face's words
            (``rope_type`` and what that type needs), or None. See ``rotary_tables``.
        rope_interleaved: True where q and k rows are stored for interleaved pairs (a GGUF of the Llama family).
        tie_word_embeddings: The head is the embedding table.
        attention_bias: q, k and v have a bias.
        output_bias: The projection of the attention's output has one.
        mlp_bias: gate, up and down have one.
        qk_norm: RMSNorm on each head of q and k, before the rotary embedding (Qwen3).
        sliding_window: Keys a query sees in a sliding layer, itself included; None where no layer slides.
        sliding_layers: Which layers slide, one flag a layer; None: all of them do, if ``sliding_window`` is set.
        eos_token_ids: Any of them ends a text.
        dtype: What the checkpoint was saved in: "float32", "bfloat16" or "float16".

    Example:
        >>> config = ModelConfig("llama", vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=1,
        ...                      num_heads=4, num_kv_heads=2, head_dim=4, max_position_embeddings=64)
        >>> config.expected_tensors()["model.layers.0.self_attn.k_proj.weight"]
        (8, 16)
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_base: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    rope_interleaved: bool = False
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"ModelConfig: family: unknown {self.family!r}; known are {', '.join(FAMILIES)}")
        for name, largest in LARGEST.items():
            self._require(_is_int(getattr(self, name), 1, largest), name, f"an integer from 1 to {largest}")
        self._require(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", f"a divisor of {self.num_heads} heads")
        self._require(self.head_dim % 2 == 0, "head_dim", "an even number (rotary turns pairs)")
        for name, low, high in (("rms_norm_eps", 0.0, 1.0), ("rope_base", 1.0, math.inf)):
            self._require(
                _is_number(getattr(self, name), low, high), name, f"a number above {low:g} and below {high:g}"
            )
        self._check_window()
        for name, ids in (("eos_token_ids", self.eos_token_ids), ("bos_token_id", (self.bos_token_id,))):
            known = all(i is None or _is_int(i, 0, self.vocab_size - 1) for i in ids)
            self._require(known, name, f"token ids below {self.vocab_size}")
        self._require(self.dtype in ("float32", "bfloat16", "float16"), "dtype", "float32, bfloat16 or float16")
        rotary_tables(self.head_dim, 1, base=self.rope_base, scaling=self.rope_scaling)  # names what is wrong with it

    def _check_window(self) -> None:
        window, layers = self.sliding_window, self.sliding_layers
        self._require(window is None or _is_int(window, 1, 2**31 - 1), "sliding_window", "a positive integer or none")
        fits = layers is None or (len(layers) == self.num_layers and all(isinstance(s, bool) for s in layers))
        self._require(fits, "sliding_layers", f"one flag for each of {self.num_layers} layers")

    def _require(self, condition: bool, name: str, expected: str) -> None:
        known_as = f"{name} ({HF_NAMES[name]})" if name in HF_NAMES else name
        require(condition, "ModelConfig", known_as, expected, repr(getattr(self, name)))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a Hugging Face ``config.json``, of transformers 4 or 5.

        Args:
            config: The parsed file. Rotary parameters may stand in ``rope_parameters`` or in ``rope_theta`` and
                ``rope_scaling``; the sliding window in ``layer_types`` or in ``max_window_layers``.

        Raises:
            ValueError: For an unknown family, naming it and those known; for a field that is missing or makes no
                sense, naming it; for what would change the model's function and is not supported here.

        Source: the configuration classes of `transformers` (defaults included).
        """
        require(isinstance(config, Mapping), "ModelConfig", "config", "a JSON object", type(config).__name__)
        family = _family(config)
        _refuse_unsupported(config)
        num_heads, num_layers = _required(config, "num_attention_heads"), _required(config, "num_hidden_layers")
        for name, value in (("num_attention_heads", num_heads), ("num_hidden_layers", num_layers)):
            require(_is_int(value, 1, 2**12), "ModelConfig", name, "an integer from 1 to 4096", repr(value))
        hidden_size = _required(config, "hidden_size")
        any_bias = _flag(config, "attention_bias") and family in ("llama", "qwen3")
        rope_base, rope_scaling = _rope(config)
        sliding_window, sliding_layers = _sliding(config, family, num_layers)
        eos = config.get("eos_token_id")
        return cls(
            family=family,
            vocab_size=_required(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_required(config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_num_kv_heads(config, family, num_heads),
            head_dim=_head_dim(config, family, hidden_size, num_heads),
            max_position_embeddings=_required(config, "max_position_embeddings"),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            attention_bias=any_bias or family == "qwen2",
            output_bias=any_bias,
            mlp_bias=_flag(config, "mlp_bias") and family == "llama",
            qk_norm=family == "qwen3",
            sliding_window=sliding_window,
            sliding_layers=sliding_layers,
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, Sequence) else () if eos is None else (eos,),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
        )

    def layer_window(self, layer: int) -> int | None:
        """Keys that a query of this layer sees, itself included; None: all before it."""
        return self.sliding_window if self.sliding_layers is None or self.sliding_layers[layer] else None

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor a checkpoint must have, by Hugging Face's name, with its shape."""
        hidden, q_size, kv_size = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
        for name, rows, columns, bias in (
            ("self_attn.q_proj", q_size, hidden, self.attention_bias),
            ("self_attn.k_proj", kv_size, hidden, self.attention_bias),
            ("self_attn.v_proj", kv_size, hidden, self.attention_bias),
            ("self_attn.o_proj", hidden, q_size, self.output_bias),
            ("mlp.gate_proj", self.intermediate_size, hidden, self.mlp_bias),
            ("mlp.up_proj", self.intermediate_size, hidden, self.mlp_bias),
            ("mlp.down_proj", hidden, self.intermediate_size, self.mlp_bias),
        ):
            layer[f"{name}.weight"] = (rows, columns)
            if bias:
                layer[f"{name}.bias"] = (rows,)
        if self.qk_norm:
            layer |= {"self_attn.q_norm.weight": (self.head_dim,), "self_attn.k_norm.weight": (self.head_dim,)}
        layer["post_attention_layernorm.weight"] = (hidden,)

        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for i in range(self.num_layers):
            tensors |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        tensors["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            tensors["lm_head.weight"] = (self.vocab_size, hidden)
        return tensors


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, above: float, below: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and above < value < below


def _required(config: Mapping[str, Any], name: str) -> Any:
    require(config.get(name) is not None, "ModelConfig", name, "to be in the config", "nothing")
    return config[name]


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name) or False
    require(isinstance(value, bool), "ModelConfig", name, "true or false", repr(value))
    return value


def _family(config: Mapping[str, Any]) -> str:
    """By ``model_type``, or by ``architectures`` where there is none; a model with another head is not ours."""
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    require(isinstance(architectures, list), "ModelConfig", "architectures", "a list", repr(architectures))
    families = [ARCHITECTURES.get(str(name)) for name in architectures]
    family = str(model_type or next(filter(None, families), None))
    if family not in FAMILIES or (families and family not in families):
        named = ", ".join(map(str, filter(None, [model_type, *architectures]))) or "none named"
        known = ", ".join(f"{family} ({name})" for name, family in ARCHITECTURES.items())
        raise ValueError(f"ModelConfig: model_type: unknown model family ({named}); known are {known}")
    return family


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    act = config.get("hidden_act") or "silu"
    require(act in ("silu", "swish"), "ModelConfig", "hidden_act", "silu", repr(act))
    quantized = config.get("quantization_config") or {}
    method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
    require(
        not quantized, "ModelConfig", "quantization_config", "none (use a float checkpoint or a GGUF)", repr(method)
    )


def _num_kv_heads(config: Mapping[str, Any], family: str, num_heads: int) -> Any:
    if config.get("num_key_value_heads") is None and (family == "llama" or "num_key_value_heads" in config):
        return num_heads  # multi-head attention: configs older than grouped heads do not say so
    return _required(config, "num_key_value_heads")


def _head_dim(config: Mapping[str, Any], family: str, hidden_size: Any, num_heads: int) -> Any:
    if config.get("head_dim") is not None:
        return config["head_dim"]
    if family == "qwen3":
        return 128
    whole = _is_int(hidden_size, 1, LARGEST["hidden_size"]) and hidden_size % num_heads == 0
    require(whole, "ModelConfig", "hidden_size", f"a multiple of {num_heads} heads (there is no head_dim)", hidden_size)
    return hidden_size // num_heads


def _rope(config: Mapping[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """(base, scaling), from either generation of names, with what transformers fills in filled in."""
    parameters = config.get("rope_parameters") or {}
    given = config.get("rope_scaling") or parameters
    for name, value in (("rope_parameters", parameters), ("rope_scaling", given)):
        require(isinstance(value, Mapping), "ModelConfig", name, "an object", repr(value))
    partial = given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    require(partial == 1.0, "ModelConfig", "partial_rotary_factor", "1.0", repr(partial))
    scaling = {name: value for name, value in given.items() if name not in ("type", "rope_theta") and value is not None}
    base = given.get("rope_theta") or config.get("rope_theta") or parameters.get("rope_theta") or 10000.0
    kind = scaling["rope_type"] = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return base, None
    if kind in ("llama3", "yarn"):
        longest = _required(config, "max_position_embeddings")
        original = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = original = original or longest
        if kind == "yarn" and "factor" not in scaling and _is_int(longest, 1, 2**31) and _is_int(original, 1, 2**31):
            scaling["factor"] = longest / original
    return base, scaling


def _sliding(config: Mapping[str, Any], family: str, num_layers: int) -> tuple[Any, tuple[bool, ...] | None]:
    """(window, which layers slide). Mistral slides everywhere or nowhere; Qwen from ``max_window_layers`` on."""
    if family == "llama":
        return None, None
    if family == "mistral":
        return config.get("sliding_window", 4096), None
    window = config.get("sliding_window", 4096) if _flag(config, "use_sliding_window") else None
    if window is None:
        return None, None
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28)
        require(_is_int(first, 0, 2**31), "ModelConfig", "max_window_layers", "an integer from 0", repr(first))
        return window, tuple(i >= first for i in range(num_layers))
    known = isinstance(kinds, list) and all(kind in ("sliding_attention", "full_attention") for kind in kinds)
    require(known, "ModelConfig", "layer_types", "a list of sliding_attention and full_attention", repr(kinds))
    return window, tuple(kind == "sliding_attention" for kind in kinds)
