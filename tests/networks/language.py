"""Transformers over tokens: decoder-only, encoder with keywords, encoder-decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import network, words


class RMSNorm(nn.Module):
    """Written by hand, with the statistic in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    left, right = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-right, left), dim=-1)


class Rotary(nn.Module):
    """Cosines and sines [T, D] of the positions."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", 10000 ** -(torch.arange(0, width, 2).float() / width), persistent=False)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(length, device=self.frequencies.device).float(), self.frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def repeat_heads(x: Tensor, times: int) -> Tensor:
    n, heads, length, width = x.shape
    return x[:, :, None].expand(n, heads, times, length, width).reshape(n, heads * times, length, width)


class GroupedQueryAttention(nn.Module):
    """``fused``: SDPA with is_causal and enable_gqa; otherwise written out, with repeated heads and a causal mask."""

    def __init__(self, width: int, heads: int, shared: int, fused: bool):
        super().__init__()
        self.head_width, self.times, self.fused = width // heads, heads // shared, fused
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, shared * self.head_width, bias=False)
        self.v_proj = nn.Linear(width, shared * self.head_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (
            layer(x).view(n, length, -1, self.head_width).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = repeat_heads(k, self.times), repeat_heads(v, self.times)
            scores = q @ k.transpose(2, 3) / math.sqrt(self.head_width)
            mask = torch.full((length, length), -1e4, device=x.device).triu(1)
            y = (scores + mask).softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        return self.o_proj(y.transpose(1, 2).reshape(n, length, -1))


class GatedMLP(nn.Module):
    def __init__(self, width: int, hidden: int, packed: bool):
        super().__init__()
        self.packed = packed
        if packed:
            self.gate_up_proj = nn.Linear(width, 2 * hidden, bias=False)
        else:
            self.gate_proj = nn.Linear(width, hidden, bias=False)
            self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if self.packed else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, width: int, variant: bool):
        super().__init__()
        norm = RMSNorm if variant else nn.RMSNorm
        self.input_norm, self.attention = norm(width), GroupedQueryAttention(width, 4, 2, fused=not variant)
        self.post_norm, self.mlp = norm(width), GatedMLP(width, 48, packed=variant)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x), cos, sin)
        return x + self.mlp(self.post_norm(x))


@network(
    words,
    """embed.weight[1] layers.0.attention.q_proj.weight[0] layers.0.attention.k_proj.weight[0]
    layers.1.attention.v_proj.weight[0] layers.0.mlp.gate_proj.weight[0] layers.1.mlp.gate_up_proj.weight[0]""",
    heads=True,
)
class Decoder(nn.Module):
    """Rotary embedding, grouped-query attention, RMSNorm, gated perceptron, tied embeddings, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rotary = nn.Embedding(50, 32), Rotary(8)
        self.layers = nn.ModuleList(DecoderLayer(32, variant) for variant in (False, True))
        self.norm, self.lm_head = RMSNorm(32), nn.Linear(32, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        cos, sin = self.rotary(tokens.shape[1])
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))


@dataclass
class EncoderOutput:
    last_hidden_state: Tensor
    pooler_output: Tensor | None = None


class EncoderLayer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output, self.norm_attention = nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.down, self.norm = nn.Linear(width, 64), nn.Linear(64, width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], 4, 8).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(8) + mask
        context = torch.matmul(self.dropout(scores.softmax(-1)), v).permute(0, 2, 1, 3).contiguous()
        context = context.view(*context.shape[:-2], 32)
        x = self.norm_attention(x + self.dropout(self.output(context)))
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


def sentence() -> dict[str, Tensor]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": words(), "attention_mask": mask}


@network(sentence, "layers.0.query.weight[0] layers.1.value.weight[0] layers.0.up.weight[0]", heads=True)
class KeywordEncoder(nn.Module):
    """Keyword inputs and a dataclass output, written with the width as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions, self.types = nn.Embedding(50, 32), nn.Embedding(16, 32), nn.Embedding(2, 32)
        self.register_buffer("position_ids", torch.arange(16)[None], persistent=False)
        self.norm = nn.LayerNorm(32)
        self.layers = nn.ModuleList(EncoderLayer(32) for _ in range(2))
        self.pooler = nn.Linear(32, 24)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_pooled: bool = True,
    ) -> EncoderOutput:
        assert input_ids is not None
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.words(input_ids) + self.positions(self.position_ids[:, : input_ids.shape[1]])
        x = self.norm(x + self.types(token_type_ids))
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -1e4
        for layer in self.layers:
            x = layer(x, mask)
        return EncoderOutput(x, self.pooler(x[:, 0]).tanh() if return_pooled else None)


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values packed from another."""

    def __init__(self, width: int):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, causal: bool = False) -> Tensor:
        n, length, _ = x.shape
        q = self.q(x).reshape(n, length, 4, -1).transpose(1, 2)
        k, v = self.kv(memory).reshape(n, memory.shape[1], 2, 4, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(n, length, -1))


class CrossBlock(nn.Module):
    def __init__(self, width: int, cross: bool):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.own, self.cross = CrossAttention(width), CrossAttention(width) if cross else None
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        y = self.norms[0](x)
        x = x + self.own(y, y, causal=self.cross is not None)
        if self.cross is not None and memory is not None:
            x = x + self.cross(self.norms[1](x), memory)
        return x + self.mlp(self.norms[2](x))


@network(
    lambda: {"source": torch.randn(2, 12, 10), "target": words(length=7)},
    "front.weight[0] shared.weight[1] decoder.0.cross.q.weight[0] decoder.0.cross.kv.weight[0] "
    "encoder.0.mlp.0.weight[0]",
    heads=True,
)
class EncoderDecoder(nn.Module):
    """Frames in, tokens out: a strided 1-d convolution, and a decoder that attends to the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv1d(10, 32, 3, stride=2, padding=1)
        self.places = nn.Parameter(torch.randn(1, 32, 32))
        self.shared, self.norm, self.memory_norm = nn.Embedding(50, 32), nn.LayerNorm(32), nn.LayerNorm(32)
        self.encoder = nn.ModuleList([CrossBlock(32, cross=False)])
        self.decoder = nn.ModuleList([CrossBlock(32, cross=True), CrossBlock(32, cross=True)])

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = F.gelu(self.front(source.transpose(1, 2))).transpose(1, 2)
        memory = memory + self.places[:, : memory.shape[1]]
        for layer in self.encoder:
            memory = layer(memory)
        memory, x = self.memory_norm(memory), self.shared(target) * 32**0.5
        for layer in self.decoder:
            x = layer(x, memory)
        return F.linear(self.norm(x), self.shared.weight)


@network(
    lambda: (words(), words(length=7)),
    "words.weight[1] body.encoder.layers.0.linear1.weight[0] body.decoder.layers.0.multihead_attn.out_proj.weight[1]",
    heads=True,
)
class BuiltInTransformer(nn.Module):
    """torch.nn.Transformer with a causal mask for the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.body = nn.Transformer(16, 4, 1, 1, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 50)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.body(self.words(source), self.words(target), tgt_mask=mask))
