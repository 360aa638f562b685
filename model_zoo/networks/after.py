"""The networks that are taken through quantisers, runtimes and trainers, and batches of one for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxprune.recording.inputs import describe_inputs
from model_zoo import networks
from model_zoo.networks.random_weights import randomise

NETWORKS = (
    "timm:resnet18",
    "timm:mobilenetv3_large_100",
    "timm:vit_tiny_patch16_224",
    "ultralytics:yolo11n",
    "transformers:llama",
)
BATCHES, SIDE, LENGTH, WORDS = 9, 320, 64, 1000


def made(spec: str) -> tuple[nn.Module, list[tuple[Tensor]]]:
    """The network in eval mode, without gradients, with random weights; what to look at, and what to calibrate with."""
    torch.manual_seed(0)
    library, _, name = spec.partition(":")
    if library == "ultralytics":
        from ultralytics import YOLO

        model = YOLO(f"{name}.yaml", verbose=False).model.float()
        batches = [torch.rand(1, 3, SIDE, SIDE) for _ in range(BATCHES)]
    elif library == "transformers":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=WORDS, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, use_cache=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        batches = [torch.randint(0, WORDS, (1, LENGTH)) for _ in range(BATCHES)]
    else:
        model = networks.load(spec)
        shape = networks.example_inputs(model)[0][0].shape[1:]
        batches = [torch.randn(1, *shape) for _ in range(BATCHES)]
    inputs = [(batch,) for batch in batches]
    randomise(model.eval(), describe_inputs(inputs[0], {}))
    return model.requires_grad_(False), inputs
