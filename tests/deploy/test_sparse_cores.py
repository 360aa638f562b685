"""2:4 weights on sparse tensor cores: which layers, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import randomise
from torch import Tensor, nn

import fxprune
from fxprune.deploy import sparse_cores
from fxprune.errors import ExportError, InputError
from fxprune.methods import GSM

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """``twice`` and ``again`` share a weight; the convolution is 2:4 too; ``dense`` is not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.odd = nn.Conv1d(64, 64, 1), nn.Linear(64, 66)
        self.even, self.twice, self.again = nn.Linear(66, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.again.weight = self.twice.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x[..., None])[..., 0].relu()
        return self.again(self.twice(self.even(self.odd(x).relu()).relu()).relu())


@pytest.fixture(scope="module")
def network() -> nn.Module:
    x = torch.randn(2, 64)
    return fxprune.attach(randomise(Net()).eval(), x, method=GSM(pattern="2:4"), progress=False).finish()


class Fake:
    """In the place of PyTorch's: 64 rows at least, and a tensor of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[Tensor] = []
        monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", self)
        monkeypatch.setattr(sparse_cores, "_check_device", lambda name, device: None)

    def __call__(self, weight: Tensor) -> Tensor:
        self.given.append(weight)
        if len(weight) % 64:
            raise RuntimeError("Error original_tensor.shape is not supported!\nBoth dimensions must be ...")
        return weight.clone()


def test_linear_layers_with_the_pattern_are_turned_in_a_copy(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, before = Fake(monkeypatch), copy.deepcopy(network.state_dict())
    result = fxprune.semi_structured(network)
    assert result.layers == ("twice", "again")
    assert result.left == {"odd": "Error original_tensor.shape is not supported!"}
    assert [tuple(weight.shape) for weight in fake.given] == [(66, 64), (64, 64)], "a shared weight is turned once"
    made = result.network.get_parameter("twice.weight")
    assert made is result.network.get_parameter("again.weight")
    assert not made.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.get_parameter("twice.weight").requires_grad
    x = torch.randn(3, 64)
    assert torch.equal(result.network(x), network(x))


def test_what_cannot_be_turned_is_refused(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^network is 3; pass a torch.nn.Module\.$"):
        fxprune.semi_structured(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^No weight of 4 linear layers is 2:4: train with GSM\(pattern='2:4'\), or"):
        fxprune.semi_structured(randomise(Net()))
    with pytest.raises(InputError, match=r"^odd.weight is on cpu: sparse tensor cores are a CUDA GPU's\. Move the"):
        fxprune.semi_structured(network)
    properties: Any = {"get_device_capability": (7, 5), "get_device_name": "Tesla T4"}
    for name, value in properties.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    message = r"^a is on Tesla T4, of compute capability 7\.5: sparse tensor cores are there from 8\.0 on\.$"
    with pytest.raises(InputError, match=message):
        sparse_cores._check_device("a", torch.device("cuda"))
    Fake(monkeypatch)
    left = nn.Linear(64, 66)
    fxprune.optim.magnitude_cut(left.parameters(), 1, "2:4")
    with pytest.raises(ExportError, match=r"^PyTorch takes none of the 2:4 weights\. 0: Error original_tensor\.shape"):
        fxprune.semi_structured(nn.Sequential(left))


@pytest.mark.gpu
def test_on_sparse_tensor_cores_it_computes_the_same(network: nn.Module) -> None:
    if torch.cuda.get_device_capability() < sparse_cores.CAPABILITY:
        pytest.skip("this GPU has no sparse tensor cores")
    dense = copy.deepcopy(network).half().cuda()
    result = fxprune.semi_structured(dense)
    assert {"twice", "again"} <= {*result.layers}
    kind = torch.sparse.SparseSemiStructuredTensor
    for name in result.layers:
        assert isinstance(result.network.get_parameter(f"{name}.weight"), kind)
    x = torch.randn(8, 64, dtype=torch.float16, device="cuda")
    with torch.inference_mode():
        found, expected = result.network(x).float(), dense(x).float()
    torch.testing.assert_close(found, expected, atol=5e-3 * float(expected.abs().max()), rtol=0)
