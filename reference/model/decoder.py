"""A Llama-family decoder, written once over a backend.

    x = embedding(token)
    for each layer:
        x = x + o(attention(rotary(q, k, v of norm(x))))
        x = x + down(swiglu(gate and up of norm(x)))
    logits = head(norm(x))

All tokens of a step lie end to end, whatever sequences they belong to; only attention knows where one ends, and it
reads keys and values from the cache, this step's included. A backend's arrays are touched through ops, reshapes and
slices alone, so the same lines run in NumPy, in plain torch and on Triton kernels.

Nothing here knows how a weight or the cache is stored: see `linear/weight.py` and `kv_cache/cache.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from reference._checks import require
from reference.fusion.rotary import rotary_tables
from reference.kv_cache.cache import CacheView, KVCache
from reference.linear.weight import Weight
from reference.model.adapters import AdapterBank
from reference.model.config import ModelConfig
from reference.model.loading import Loader
from reference.model.overlay import overlay

__all__ = ["AdapterBank", "Decoder", "overlay"]

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
OUTPUT, DOWN = ("self_attn.o_proj",), ("mlp.down_proj",)


@dataclass
class Layer:
    """The weights of one layer. A list holds one `Weight`, or several where their formats differ."""

    attention_norm: Any
    qkv: list[Weight]
    o: Weight
    feed_forward_norm: Any
    gate_up: list[Weight]
    down: Weight
    q_norm: Any = None
    k_norm: Any = None
    window: int | None = None


class Decoder:
    """A model on a backend: its weights, and the function from tokens to logits.

    Args:
        config: What the model is made of.
        tensors: By Hugging Face's names: host arrays, or `Weight`s already in a format (a GGUF kept as it is). Each is
            read once and let go, layer by layer: a mapping that reads on access keeps the peak at the model's own size
            and one layer. Tensors that the config does not expect are not looked at.
        backend: Any module or object with the interface's names.
        dtype: Of activations, norms and biases: "float32", "bfloat16" or "float16".
        weight_format: Of the matrices in the layers: "auto" is ``dtype``; a name among ``WEIGHT_FORMATS`` rounds to it
            at load; "as-is" keeps `Weight`s as they come (and arrays in ``dtype``). The embedding and the head are
            kept in ``dtype``, or in the float format asked for, or as they come.
        device: The backend's device; None is its default.
        max_positions: How many positions the rotary tables have; None: as many as the model was made for.

    Attributes:
        fingerprint: Of the model's function; see `Fingerprint`.

    Raises:
        ValueError: If a tensor is missing or of the wrong shape, naming it; or an argument is not known.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Any],
        *,
        backend: ModuleType | Any,
        dtype: str = "float32",
        weight_format: str = "auto",
        device: str | None = None,
        max_positions: int | None = None,
    ):
        require(dtype in ("float32", "bfloat16", "float16"), "Decoder", "dtype", "float32, bfloat16 or float16", dtype)
        self.config, self.backend, self.dtype, self.device = config, backend, dtype, device
        loader = Loader(config, tensors, backend, dtype, weight_format, device)
        self.embedding = loader.table("model.embed_tokens.weight")
        self.head = self.embedding if config.tie_word_embeddings else loader.table("lm_head.weight")
        self.final_norm = loader.vector("model.norm.weight")
        self.layers = [self._layer(i, loader) for i in range(config.num_layers)]
        self.fingerprint = loader.fingerprint.hexdigest()
        tables = rotary_tables(
            config.head_dim,
            max_positions or config.max_position_embeddings,
            base=config.rope_base,
            scaling=config.rope_scaling,
        )
        self.cos, self.sin = (backend.from_host(table, device=device) for table in tables)

    def _layer(self, i: int, load: "Loader") -> Layer:
        name, config = f"model.layers.{i}.", self.config
        return Layer(
            attention_norm=load.vector(f"{name}input_layernorm.weight"),
            qkv=load.stack([name + module for module in QKV]),
            o=load.matrix(name + OUTPUT[0]),
            feed_forward_norm=load.vector(f"{name}post_attention_layernorm.weight"),
            gate_up=load.stack([name + module for module in GATE_UP]),
            down=load.matrix(name + DOWN[0]),
            q_norm=load.vector(f"{name}self_attn.q_norm.weight") if config.qk_norm else None,
            k_norm=load.vector(f"{name}self_attn.k_norm.weight") if config.qk_norm else None,
            window=config.layer_window(i),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        matrices = [self.embedding] + [self.head] * (self.head is not self.embedding)
        vectors = [self.final_norm]
        for layer in self.layers:
            matrices += [*layer.qkv, layer.o, *layer.gate_up, layer.down]
            vectors += [layer.attention_norm, layer.feed_forward_norm, layer.q_norm, layer.k_norm]
        return sum(matrix.nbytes for matrix in matrices) + sum(int(v.nbytes) for v in vectors if v is not None)

    def forward(
        self,
        token_ids: Any,
        positions: Any,
        view: CacheView,
        cache: KVCache,
        *,
        logit_rows: Any = None,
        adapters: AdapterBank | None = None,
        adapter_ids: Any = None,
        in_float32: bool = True,
    ) -> Any:
        """Logits of a step's tokens. Writes the step's keys and values to ``cache``.

        Args:
            token_ids: [num_tokens], packed.
            positions: [num_tokens], each token's place in its sequence.
            view: Where the tokens lie in the cache.
            cache: Of this model's layers, KV heads and head_dim.
            logit_rows: The tokens whose logits are wanted, in this order, repeated where asked twice; None: all.
            adapters: The LoRA adapters, if any token has one.
            adapter_ids: [num_tokens], an adapter's number or -1; None: no token has one, and nothing is spent on it.
            in_float32: The logits; if not, then in ``dtype``: the same numbers, for who does not compute with them
                but draws.

        Returns:
            Logits [num_rows, vocab_size], float32. Rounded to ``dtype`` on the way where that is 16 bits wide, as by
            every engine that runs its head so.
        """
        deltas = None if adapters is None or adapter_ids is None else (adapters, adapter_ids)
        x = self._embed(token_ids)
        for i, layer in enumerate(self.layers):
            x = self._attention(i, layer, x, positions, view, cache, deltas)
            if logit_rows is not None and i == len(self.layers) - 1:  # nobody reads the other rows from here on
                x = self.backend.take_rows(x, logit_rows)
                deltas = deltas and (deltas[0], self.backend.take_rows(deltas[1], logit_rows))
            x = self._feed_forward(i, layer, x, deltas)
        logits = self.head.rms_norm_linear(x, self.final_norm, eps=self.config.rms_norm_eps)
        return self.backend.cast(logits, "float32") if in_float32 and self.dtype != "float32" else logits

    def _embed(self, token_ids: Any) -> Any:
        x, format = self.embedding.rows(token_ids), self.embedding.format
        same = self.dtype == (format.name if format.is_float else "float32")
        return x if same else self.backend.cast(x, self.dtype)

    def _attention(self, i: int, layer: Layer, x: Any, positions: Any, view: CacheView, cache: KVCache, deltas: Any):
        config, num_tokens = self.config, len(x)
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv = self._norm_linear(i, layer.qkv, QKV, x, layer.attention_norm, deltas)
        q = qkv[:, :q_size].reshape(num_tokens, config.num_heads, config.head_dim)
        k = qkv[:, q_size : q_size + kv_size].reshape(num_tokens, config.num_kv_heads, config.head_dim)
        v = qkv[:, q_size + kv_size :].reshape(num_tokens, config.num_kv_heads, config.head_dim)
        q = cache.rotate_and_write(
            i, q, k, v, self.cos, self.sin, positions, view,
            q_norm=layer.q_norm, k_norm=layer.k_norm, eps=config.rms_norm_eps, interleaved=config.rope_interleaved,
        )  # fmt: skip
        attended = cache.attend(i, q, view, sliding_window=layer.window).reshape(num_tokens, q_size)
        x = layer.o.linear_add(attended, x, out=x)
        return x if deltas is None else deltas[0].apply(x, attended, i, OUTPUT, deltas[1])

    def _feed_forward(self, i: int, layer: Layer, x: Any, deltas: Any) -> Any:
        gate_up = self._norm_linear(i, layer.gate_up, GATE_UP, x, layer.feed_forward_norm, deltas)
        if deltas is None:
            return layer.down.swiglu_linear_add(gate_up, x, out=x)
        gated = self.backend.swiglu(gate_up)
        x = layer.down.linear_add(gated, x, out=x)
        return deltas[0].apply(x, gated, i, DOWN, deltas[1])

    def _norm_linear(
        self, i: int, weights: list[Weight], modules: Sequence[str], x: Any, norm: Any, deltas: Any
    ) -> Any:
        eps = self.config.rms_norm_eps
        if len(weights) == 1 and deltas is None:
            return weights[0].rms_norm_linear(x, norm, eps=eps)
        normed = self.backend.rms_norm(x, norm, eps=eps)  # also what the adapters read
        y = weights[0].linear(normed) if len(weights) == 1 else self._side_by_side(weights, normed)
        return y if deltas is None else deltas[0].apply(y, normed, i, modules, deltas[1])

    def _side_by_side(self, weights: list[Weight], x: Any) -> Any:
        width = sum(weight.out_features for weight in weights)
        y, start = self.backend.empty((len(x), width), dtype=self.dtype, device=self.device), 0
        for weight in weights:
            y[:, start : start + weight.out_features] = weight.linear(x)
            start += weight.out_features
        return y
