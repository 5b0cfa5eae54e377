# SPDX-License-Identifier: MIT
"""The graph of a decoder: what its layers compute, in the operators that ONNX Runtime's own model builder uses.

Inputs are `input_ids`, `attention_mask` (padding on the right) and a cache; outputs are the logits of all positions,
and the cache with them. Attention is `com.microsoft::GroupQueryAttention`, which rotates, masks and caches.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from edgemoe.errors import ConversionError

from ..hf.family import Hparams
from .blocks import Grid
from .experts import find_experts
from .families import Family
from .graph import FLOAT, INT32, INT64, MICROSOFT, Graph
from .moe import add_experts, route
from .rope import find_rope, softmax_factor
from .weights import Weights

_MOE_PREFIXES = ("mlp", "block_sparse_moe", "feed_forward")
_ROUTERS = ("gate", "router", "router.layer")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What config.json says of all layers."""

    hidden: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int
    n_positions: int


class Decoder:
    """Builds the graph of a checkpoint into `weights.graph`; afterwards `shape` says what onnxruntime-genai must know.

    Args:
        weights: of the checkpoint.
        family: of the checkpoint.
        hparams: its config.json.
        grid: how experts are quantized.
        max_positions: the longest context; tables of RoPE have as many rows.

    Raises:
        ConversionError: a tensor is missing, has another shape, or has no place in the graph.
    """

    def __init__(self, weights: Weights, family: Family, hparams: Hparams, grid: Grid, max_positions: int) -> None:
        self._weights = weights
        self._graph: Graph = weights.graph
        self._family = family
        self._hparams = hparams
        self._grid = grid
        self._eps = float(hparams.need("rms_norm_eps", "norm_eps", "layer_norm_eps"))
        n_heads = hparams.count("num_attention_heads")
        self._n_rotated = hparams.head_dim
        if family.is_latent:
            self._n_rotated = hparams.count("qk_rope_head_dim")
        self._rope = find_rope(hparams, self._n_rotated, max_positions)
        self.shape = Shape(
            hidden=hparams.count("hidden_size"),
            n_layers=hparams.n_layers,
            n_heads=n_heads,
            n_kv_heads=n_heads if family.is_latent else hparams.count("num_key_value_heads", "num_attention_heads"),
            head_dim=hparams.count("qk_nope_head_dim") + self._n_rotated if family.is_latent else hparams.head_dim,
            n_vocab=hparams.count("vocab_size"),
            n_positions=self._rope.n_positions,
        )
        self.n_moe_layers = 0
        self._build()

    @property
    def layer_types(self) -> list[str] | None:
        """Of each layer, `conv` or an attention; None where all are attention."""
        kinds = self._hparams.get("layer_types")
        return list(kinds) if kinds and "conv" in kinds else None

    def _build(self) -> None:
        graph, s = self._graph, self.shape
        ids = graph.input("input_ids", INT64, ["batch", "sequence"])
        mask = graph.input("attention_mask", INT64, ["batch", "total"])
        n_real = graph.node("ReduceSum", mask, graph.constant([1], np.int64), keepdims=0)
        last = graph.node("Sub", n_real, graph.constant([1], np.int64))
        self._lengths = graph.node("Cast", last, to=INT32)
        total = graph.reshape(graph.node("Shape", mask, start=1, end=2), 1)
        self._total = graph.node("Cast", graph.node("Squeeze", total), to=INT32)
        self._tables = self._rope_tables()
        x = self._weights.embedding("model.embed_tokens.weight", s.n_vocab, s.hidden, ids)
        x = self._scaled(x, "embedding")
        for layer in range(s.n_layers):
            x = self._layer(layer, x)
        graph.scope = "model"
        norm = self._weights.first("model.norm.weight", "model.embedding_norm.weight").removesuffix(".weight")
        x = self._norm(x, norm)
        logits = self._head(x)
        divisor = self._family.multiplier("logits", self._hparams)
        if divisor is not None:
            logits = graph.node("Div", logits, graph.constant(divisor))
        graph.nodes("Identity", [logits], ["logits"])
        graph.output("logits", FLOAT, ["batch", "sequence", s.n_vocab])

    def _rope_tables(self) -> tuple[str, str]:
        names = ("rope.cos", "rope.sin")
        tables = self._rope.tables()
        for name, table in zip(names, tables, strict=True):
            self._weights.table(name, table)
        return names

    def _head(self, x: str) -> str:
        s, name = self.shape, "lm_head"
        if self._hparams.get("tie_word_embeddings", "tie_embedding") or not self._weights.has("lm_head.weight"):
            self._weights.use("lm_head.weight")  # a second copy
            name = "model.embed_tokens"
        return self._weights.linear(x, name, s.n_vocab, s.hidden)

    def _layer(self, layer: int, x: str) -> str:
        weights, graph = self._weights, self._graph
        graph.scope = prefix = f"model.layers.{layer}"
        first = weights.first(f"{prefix}.input_layernorm.weight", f"{prefix}.operator_norm.weight")
        second = weights.first(f"{prefix}.post_attention_layernorm.weight", f"{prefix}.ffn_norm.weight")
        y = self._norm(x, first.removesuffix(".weight"))
        if weights.has(f"{prefix}.conv.conv.weight"):
            y = self._convolution(layer, y, f"{prefix}.conv")
        elif self._family.is_latent:
            y = self._latent_attention(layer, y, f"{prefix}.self_attn")
        else:
            y = self._attention(layer, y, f"{prefix}.self_attn")
        x = graph.node("Add", x, self._scaled(y, "residual"))
        y = self._feed_forward(prefix, self._norm(x, second.removesuffix(".weight")))
        return graph.node("Add", x, self._scaled(y, "residual"))

    # ─── attention ───────────────────────────────────────────────────────────────────────────────────────────────

    def _attention(self, layer: int, x: str, prefix: str) -> str:
        weights, s = self._weights, self.shape
        q = weights.linear(x, f"{prefix}.q_proj", s.n_heads * s.head_dim, s.hidden)
        k = weights.linear(x, f"{prefix}.k_proj", s.n_kv_heads * s.head_dim, s.hidden)
        v = weights.linear(x, f"{prefix}.v_proj", s.n_kv_heads * s.head_dim, s.hidden)
        q = self._norm_heads(q, prefix, "q", s.n_heads)
        k = self._norm_heads(k, prefix, "k", s.n_kv_heads)
        sinks = ""
        if weights.has(f"{prefix}.sinks"):
            sinks = self._graph.constant(weights.vector(f"{prefix}.sinks", s.n_heads))
        scale = self._family.multiplier("attention", self._hparams) or s.head_dim**-0.5
        y = self._attend(layer, q, k, v, scale, sinks)
        out = weights.first(f"{prefix}.o_proj.weight", f"{prefix}.out_proj.weight").removesuffix(".weight")
        return weights.linear(y, out, s.hidden, s.n_heads * s.head_dim)

    def _norm_heads(self, x: str, prefix: str, role: str, n_heads: int) -> str:
        """Queries or keys after their norm, if there is one: of each head, or of all together."""
        weights, head_dim = self._weights, self.shape.head_dim
        name = weights.first(f"{prefix}.{role}_norm.weight", f"{prefix}.{role}_layernorm.weight")
        if not weights.has(name):
            return x
        size = weights.need(name).n_columns
        if size != head_dim:
            return self._rms_norm(x, name, n_heads * head_dim)
        heads = self._graph.reshape(x, 0, 0, n_heads, head_dim)
        return self._graph.reshape(self._rms_norm(heads, name, head_dim), 0, 0, n_heads * head_dim)

    def _latent_attention(self, layer: int, x: str, prefix: str) -> str:
        """MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1) with its keys and values written out: heads are rotated in
        their first dimensions, where GroupQueryAttention rotates, and values filled up to the size of keys."""
        weights, graph, s = self._weights, self._graph, self.shape
        rank, n_rope, n_value = self._hparams.count("kv_lora_rank"), self._n_rotated, self._hparams.count("v_head_dim")
        n_plain = s.head_dim - n_rope
        if n_value > s.head_dim:
            raise ConversionError(
                f"cannot convert {prefix}: values have {n_value} elements, expected {s.head_dim} at most, as keys have "
                f"({self._hparams.path})"
            )
        q, n_q = x, s.hidden
        if q_rank := self._hparams.get("q_lora_rank"):
            q = weights.linear(x, f"{prefix}.q_a_proj", q_rank, s.hidden)
            q, n_q = self._rms_norm(q, f"{prefix}.q_a_layernorm.weight", q_rank, eps=1e-6), q_rank
        q_name = f"{prefix}.q_b_proj" if q_rank else f"{prefix}.q_proj"
        q = graph.reshape(weights.linear(q, q_name, s.n_heads * s.head_dim, n_q), 0, 0, s.n_heads, s.head_dim)
        q_plain, q_rope = self._split(q, n_plain, n_rope)
        q = graph.reshape(graph.node("Concat", q_rope, q_plain, axis=-1), 0, 0, s.n_heads * s.head_dim)
        latent, k_rope = self._split(
            weights.linear(x, f"{prefix}.kv_a_proj_with_mqa", rank + n_rope, s.hidden), rank, n_rope
        )
        latent = self._rms_norm(latent, f"{prefix}.kv_a_layernorm.weight", rank, eps=1e-6)
        kv = weights.linear(latent, f"{prefix}.kv_b_proj", s.n_heads * (n_plain + n_value), rank)
        k_plain, v = self._split(graph.reshape(kv, 0, 0, s.n_heads, n_plain + n_value), n_plain, n_value)
        ones = graph.constant([1, 1, s.n_heads, 1], np.int64)
        k_rope = graph.node("Expand", graph.reshape(k_rope, 0, 0, 1, n_rope), ones)
        k = graph.reshape(graph.node("Concat", k_rope, k_plain, axis=-1), 0, 0, s.n_heads * s.head_dim)
        if n_value < s.head_dim:
            v = graph.node("Pad", v, graph.constant([0] * 7 + [s.head_dim - n_value], np.int64))
        v = graph.reshape(v, 0, 0, s.n_heads * s.head_dim)
        scale = s.head_dim**-0.5 * softmax_factor(self._hparams)
        y = self._attend(layer, q, k, v, scale, is_interleaved=True)
        if n_value < s.head_dim:
            heads = graph.reshape(y, 0, 0, s.n_heads, s.head_dim)
            y = graph.reshape(self._split(heads, n_value, s.head_dim - n_value)[0], 0, 0, s.n_heads * n_value)
        return weights.linear(y, f"{prefix}.o_proj", s.hidden, s.n_heads * n_value)

    def _attend(
        self, layer: int, q: str, k: str, v: str, scale: float, sinks: str = "", *, is_interleaved: bool = False
    ) -> str:
        graph, s = self._graph, self.shape
        past: list[int | str] = ["batch", s.n_kv_heads, "past", s.head_dim]
        present: list[int | str] = ["batch", s.n_kv_heads, "total", s.head_dim]
        inputs = [q, k, v]
        inputs += [graph.input(f"past_key_values.{layer}.{part}", FLOAT, past) for part in ("key", "value")]
        inputs += [self._lengths, self._total, *self._tables, "", "", sinks]
        outputs = [f"{graph.scope}.attention", *(f"present.{layer}.{part}" for part in ("key", "value"))]
        for name in outputs[1:]:
            graph.output(name, FLOAT, present)
        return graph.nodes(
            "GroupQueryAttention",
            inputs if sinks else inputs[:-3],
            outputs,
            domain=MICROSOFT,
            num_heads=s.n_heads,
            kv_num_heads=s.n_kv_heads,
            scale=scale,
            do_rotary=1,
            rotary_interleaved=int(is_interleaved),
            local_window_size=self._window(layer),
        )[0]

    def _window(self, layer: int) -> int:
        """Positions that a layer attends to; -1 for all."""
        window, kinds = self._hparams.get("sliding_window"), self._hparams.get("layer_types")
        is_windowed = kinds[layer] == "sliding_attention" if kinds else self._family.uses_window
        if not window or not is_windowed or window >= self.shape.n_positions:
            return -1
        return int(window)

    def _convolution(self, layer: int, x: str, prefix: str) -> str:
        """LFM2's gated short convolution; the cache is what came before the window's last position."""
        weights, graph, hidden = self._weights, self._graph, self.shape.hidden
        n_taps = self._hparams.count("conv_L_cache")
        both = weights.linear(x, f"{prefix}.in_proj", 3 * hidden, hidden)
        both = graph.node("Transpose", both, perm=[0, 2, 1])
        sizes = graph.constant([hidden] * 3, np.int64)
        gate, out_gate, value = graph.nodes("Split", [both, sizes], 3, axis=1)
        past = graph.input(f"past.{layer}.conv", FLOAT, ["batch", hidden, n_taps - 1])
        seen = graph.node("Concat", past, graph.node("Mul", gate, value), axis=2)
        end = graph.constant([np.iinfo(np.int64).max], np.int64)
        axis = graph.constant([2], np.int64)
        present = f"present.{layer}.conv"
        graph.nodes("Slice", [seen, graph.constant([1 - n_taps], np.int64), end, axis], [present])
        graph.output(present, FLOAT, ["batch", hidden, n_taps - 1])
        kernel = weights.need(f"{prefix}.conv.weight", (hidden, 1, n_taps))
        taps = weights.checkpoint.read_rows(kernel, 0, hidden).reshape(kernel.shape)
        y = graph.node("Conv", seen, graph.constant(taps), group=hidden, kernel_shape=[n_taps])
        y = graph.node("Transpose", graph.node("Mul", out_gate, y), perm=[0, 2, 1])
        return weights.linear(y, f"{prefix}.out_proj", hidden, hidden)

    # ─── feed-forward ────────────────────────────────────────────────────────────────────────────────────────────

    def _feed_forward(self, prefix: str, x: str) -> str:
        weights = self._weights
        for block in _MOE_PREFIXES:
            for router in _ROUTERS:
                if weights.has(f"{prefix}.{block}.{router}.weight"):
                    return self._moe(f"{prefix}.{block}", router, x)
        for block in _MOE_PREFIXES:
            for names in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
                if weights.has(f"{prefix}.{block}.{names[0]}.weight"):
                    return self._mlp(x, *(f"{prefix}.{block}.{name}" for name in names))
        raise ConversionError(
            f"cannot convert {weights.checkpoint.folder}: {prefix} has neither a router nor a feed-forward block; a "
            "file of the checkpoint is missing: download it again"
        )

    def _mlp(self, x: str, gate: str, up: str, down: str) -> str:
        weights, hidden = self._weights, self.shape.hidden
        inter = weights.need(f"{gate}.weight").n_rows
        y = self._gated(weights.linear(x, gate, inter, hidden), weights.linear(x, up, inter, hidden))
        return weights.linear(y, down, hidden, inter)

    def _gated(self, gate: str, up: str) -> str:
        graph = self._graph
        return graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)

    def _moe(self, prefix: str, router: str, x: str) -> str:
        weights, graph, s, hparams = self._weights, self._graph, self.shape, self._hparams
        n_experts, n_used = hparams.n_experts, hparams.count("num_experts_per_tok", "num_experts_per_token")
        self.n_moe_layers += 1
        name = f"{prefix}.{router}"
        logits = [graph.reshape(x, -1, s.hidden), weights.matrix(f"{name}.weight", n_experts, s.hidden)]
        if weights.has(f"{name}.bias"):
            logits.append(graph.constant(weights.vector(f"{name}.bias", n_experts)))
        bias_name = weights.first(f"{name}.e_score_correction_bias", f"{prefix}.expert_bias")
        bias = weights.vector(bias_name, n_experts) if weights.has(bias_name) else None
        routing = self._family.routing(hparams)
        routed = route(graph, graph.node("Gemm", *logits, transB=1), bias, routing)
        experts = find_experts(weights, prefix, n_experts, s.hidden)
        activation = self._family.activation(hparams)
        y = add_experts(graph, x, routed, experts, n_experts, n_used, s.hidden, self._grid, routing, activation)
        shared = self._shared_experts(prefix, x)
        return y if shared is None else graph.node("Add", y, shared)

    def _shared_experts(self, prefix: str, x: str) -> str | None:
        """What every token uses: DeepSeek's and Qwen2's beside the experts, GraniteMoE's beside the block."""
        weights, graph, hidden = self._weights, self._graph, self.shape.hidden
        for name in (f"{prefix}.shared_experts", f"{prefix}.shared_expert"):
            if not weights.has(f"{name}.gate_proj.weight"):
                continue
            y = self._mlp(x, *(f"{name}.{part}_proj" for part in ("gate", "up", "down")))
            if not weights.has(f"{name}_gate.weight"):
                return y
            gate = graph.node("MatMul", x, self._column(f"{name}_gate.weight"))
            return graph.node("Mul", graph.node("Sigmoid", gate), y)
        name = f"{prefix.rpartition('.')[0]}.shared_mlp"
        if not weights.has(f"{name}.input_linear.weight"):
            return None
        inter = weights.need(f"{name}.input_linear.weight").n_rows // 2
        both = weights.linear(x, f"{name}.input_linear", 2 * inter, hidden)
        return weights.linear(self._gated(*self._split(both, inter, inter)), f"{name}.output_linear", hidden, inter)

    def _column(self, name: str) -> str:
        """A matrix of one row, as a column."""
        tensor = self._weights.need(name, (1, self.shape.hidden))
        return self._graph.constant(self._weights.checkpoint.read_rows(tensor, 0, 1).T)

    # ─── pieces ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _norm(self, x: str, name: str) -> str:
        """The family's kind of norm over the hidden dimension."""
        hidden = self.shape.hidden
        if not self._family.has_layer_norm:
            return self._rms_norm(x, f"{name}.weight", hidden)
        vectors = [self._graph.constant(self._weights.vector(f"{name}.{part}", hidden)) for part in ("weight", "bias")]
        return self._graph.node("LayerNormalization", x, *vectors, axis=-1, epsilon=self._eps)

    def _rms_norm(self, x: str, name: str, size: int, eps: float | None = None) -> str:
        scale = self._graph.constant(self._weights.vector(name, size))
        epsilon = self._eps if eps is None else eps
        return self._graph.node("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=epsilon, stash_type=1)

    def _scaled(self, x: str, role: str) -> str:
        factor = self._family.multiplier(role, self._hparams)
        return x if factor is None else self._graph.node("Mul", x, self._graph.constant(factor))

    def _split(self, x: str, *sizes: int) -> list[str]:
        """Parts of the last axis."""
        return self._graph.nodes("Split", [x, self._graph.constant(sizes, np.int64)], len(sizes), axis=-1)
