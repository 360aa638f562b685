"""Published networks, recorded with one batch size and compared with another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from fxprune.recording import record

# name -> image size
TIMM = {
    "resnet18": 64,
    "efficientnet_b0": 64,
    "convnext_atto": 64,
    "vit_tiny_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224,
    "levit_128s": 224,
    "mobilevit_xxs": 64,
    "ghostnet_100": 64,
}
TORCHVISION = {"shufflenet_v2_x0_5": 64, "lraspp_mobilenet_v3_large": 64, "googlenet": 64}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small images: threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _torchvision(name: str) -> nn.Module:
    more = {"lraspp_mobilenet_v3_large": {"weights_backbone": None}, "googlenet": {"init_weights": False}}
    return torchvision.models.get_model(name, weights=None, **more.get(name, {}))


def _leaves(output: Tensor | dict[str, Tensor]) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output.values())


@pytest.mark.parametrize("name", [*TIMM, *TORCHVISION])
def test_bit_identical(name: str) -> None:
    torch.manual_seed(0)
    model = (timm.create_model(name) if name in TIMM else _torchvision(name)).eval()
    size = {**TIMM, **TORCHVISION}[name]
    gm = record(model, torch.randn(1, 3, size, size))
    gm.graph.lint()
    assert list(gm.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(_leaves(gm(x)), _leaves(model(x)), strict=True))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "convnext_atto", "levit_128s"])
def test_trains_like_the_original(name: str) -> None:
    """Same loss and same gradients in train mode, stochastic depth and dropout included."""
    torch.manual_seed(0)
    options = {} if name == "levit_128s" else {"drop_path_rate": 0.2}
    model = timm.create_model(name, drop_rate=0.2, **options)
    size = TIMM[name]
    gm = record(model, torch.randn(1, 3, size, size))
    x = torch.randn(2, 3, size, size)
    results = []
    for network in (model, gm):
        buffers = {key: value.clone() for key, value in model.named_buffers()}
        torch.manual_seed(1)
        loss = sum(output.square().mean() for output in _outputs(network(x)))
        results.append((loss, *torch.autograd.grad(loss, list(network.parameters()))))
        model.load_state_dict(buffers, strict=False)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def _outputs(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else value
