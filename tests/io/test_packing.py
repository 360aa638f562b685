"""Tensors that are mostly zeros: bit by bit what they were, and in few bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import chain, image, make
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxprune
from fxprune.errors import ArtifactError
from fxprune.io import artifact
from fxprune.io.artifact.packing import Packed, pack, unpack
from fxprune.methods.optim import magnitude_cut

pytestmark = pytest.mark.usefixtures("one_thread")


def sparse(size: int, density: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator).masked_fill_(
        torch.rand(size, generator=generator) >= density, 0
    )  # fmt: skip
    return values.to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("density", [1 / 300, 1 / 60, 0.1, 0.3, 0.45])
def test_the_size_is_close_to_the_entropy_of_what_is_left(density: float) -> None:
    size = 200_000
    tensor = sparse(size, density)
    packed = pack(tensor.view(200, -1))
    assert packed is not None
    count = int(tensor.count_nonzero())
    share = count / size
    entropy = -size / 8 * (share * math.log2(share) + (1 - share) * math.log2(1 - share))
    assert packed.values.nbytes == 4 * count
    assert packed.places.nbytes < 1.03 * entropy + 4
    assert torch.equal(bits(unpack(packed, [200, 1000], torch.float32)), bits(tensor))


@pytest.mark.parametrize(("dtype", "above"), [(torch.float32, 1.022), (torch.bfloat16, 1.042)])
def test_a_pattern_takes_little_more_than_its_entropy(dtype: torch.dtype, above: float) -> None:
    tensor = torch.randn(64, 36, 3, 3).to(dtype)
    magnitude_cut([tensor], 1, "2:4")
    packed = pack(tensor)
    assert packed is not None
    entropy = tensor.nbytes / 2 + tensor.numel() / 4 * math.log2(math.comb(4, 2)) / 8
    assert entropy < packed.values.nbytes + packed.places.nbytes < above * entropy
    assert torch.equal(bits(unpack(packed, [*tensor.shape], dtype)), bits(tensor))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int8, torch.float8_e4m3fn]
)
def test_every_dtype_comes_back(dtype: torch.dtype) -> None:
    tensor = sparse(6000, 0.05, torch.float32).mul(10).to(dtype).view(10, 3, 200)
    packed = pack(tensor)
    assert packed is not None
    found = unpack(packed, [10, 3, 200], dtype)
    assert (found.dtype, found.shape) == (dtype, tensor.shape)
    assert torch.equal(bits(found), bits(tensor))


def test_negative_zeros_and_what_is_no_number_are_values() -> None:
    tensor = torch.zeros(1000)
    tensor[[0, 7, 500, 999]] = torch.tensor([-0.0, float("nan"), 1e-45, float("-inf")])
    packed = pack(tensor)
    assert packed is not None
    assert len(packed.values) == 4
    assert torch.equal(bits(unpack(packed, [1000], torch.float32)), bits(tensor))


def test_nothing_is_packed_for_little() -> None:
    assert pack(sparse(10_000, 0.6)) is None
    assert pack(torch.randn(10_000)) is None
    assert pack(torch.zeros(100)) is None, "names take bytes too"
    assert pack(torch.tensor(0.0)) is None
    nothing = pack(torch.zeros(1000))
    assert nothing is not None
    assert nothing.places.nbytes == nothing.values.nbytes == 0
    assert torch.equal(unpack(nothing, [10, 100], torch.float32), torch.zeros(10, 100))


def test_what_was_not_packed_is_refused() -> None:
    packed = pack(sparse(1000, 0.1))
    assert packed is not None
    for wrong, shape, reason in [
        (packed._replace(places=packed.places[:-40]), [1000], "as many places"),
        (packed._replace(values=packed.values[1:]), [1000], "as many places"),
        (packed._replace(values=packed.values.double()), [1000], "of another kind"),
        (packed, [500], "not within it"),
        (Packed(torch.ones(1), torch.zeros(0, dtype=torch.uint8), 9), [1000], "as many places"),
    ]:
        with pytest.raises(ValueError, match=reason):
            unpack(wrong, shape, torch.float32)


# -- a file ------------------------------------------------------------------------------------------------------------


def saved(path: Path, model: nn.Module | None = None) -> Any:
    """A network most of whose weights are zero, pruned and written."""
    model = make() if model is None else model
    magnitude_cut(model.parameters(), 20)
    small = fxprune.prune(model, image(), channels=0.9, progress=False)
    fxprune.save(small, path)
    return small


def test_a_sparse_network_is_a_small_file_and_comes_back_bit_by_bit(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    small = saved(path)
    loaded = fxprune.load(path, make(seed=1))
    for name, tensor in small.state_dict().items():
        assert torch.equal(bits(loaded.state_dict()[name]), bits(tensor)), name
    packed = artifact.read_artifact(path).packed
    assert {"up.0.weight", "down.0.weight"} <= packed.keys()
    assert not {"up.0.bias", "up.1.running_var"} & packed.keys()
    tensors = load_file(path)
    left = sum(t.nbytes for t in tensors.values())
    assert left < 0.3 * sum(t.nbytes for t in small.state_dict().values())
    assert tensors["up.0.weight:values"].count_nonzero() == small.get_parameter("up.0.weight").count_nonzero()


def test_memory_orders_and_tied_weights_of_packed_tensors(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = chain(40, 40, 40, 20, 4).double()
        model.get_submodule("2").weight = model.get_parameter("0.weight")
        return model

    model = tied()
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(sparse(1600, 0.05).view(40, 40))
    small = fxprune.prune(model, torch.randn(2, 40, dtype=torch.float64), channels=1.0, progress=False)
    fxprune.save(small, tmp_path / "a.safetensors")
    loaded = fxprune.load(tmp_path / "a.safetensors", tied())
    assert loaded.get_parameter("0.weight") is loaded.get_parameter("2.weight")
    assert torch.equal(loaded.get_parameter("0.weight"), small.get_parameter("0.weight"))
    last = make().to(memory_format=torch.channels_last)
    kept = saved(tmp_path / "b.safetensors", last).get_parameter("up.0.weight")
    found = fxprune.load(tmp_path / "b.safetensors", make()).get_parameter("up.0.weight")
    assert found.stride() == kept.stride()
    assert torch.equal(found, kept)


def altered(path: Path, out: Path, change: Any) -> Path:
    """The file with its metadata and tensors changed, and a digest that fits."""
    with safe_open(path, framework="pt") as file:
        data = json.loads(file.metadata()["fxprune"])
    tensors = load_file(path)
    data.pop("digest")
    change(data, tensors)
    save_file(tensors, out, {"fxprune": json.dumps({**data, "digest": artifact.digest_of(data, tensors)})})
    return out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data, tensors: tensors.pop("up.0.weight:places"), "there is no up.0.weight:places"),
        (lambda data, tensors: data["packed"].pop("up.0.weight"), "missing: up.0.weight; unexpected: up.0.weight:"),
        (
            lambda data, tensors: data["packed"]["up.0.weight"].update(shape=[2**20] * 2),
            "of another shape: up.0.weight",
        ),
        (lambda data, tensors: data["packed"]["up.0.weight"].update(shape=[2**40] * 2), "metadata cannot be read"),
        (lambda data, tensors: data["packed"]["up.0.weight"].update(low=41), "metadata cannot be read"),
        (lambda data, tensors: data["packed"]["up.0.weight"].update(low=0), "as many places"),
    ],
)
def test_a_damaged_part_is_refused_before_it_takes_memory(tmp_path: Path, change: Any, reason: str) -> None:
    path = tmp_path / "small.safetensors"
    saved(path)
    wrong = altered(path, tmp_path / "wrong.safetensors", change)
    with pytest.raises(ArtifactError, match=reason):
        fxprune.load(wrong, make())


def test_files_without_packed_tensors_are_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    small = fxprune.prune(make(), image(), channels=0.9, progress=False)
    fxprune.save(small, path)
    old = altered(path, tmp_path / "old.safetensors", lambda data, tensors: data.pop("packed"))
    assert artifact.read_artifact(old).packed == {}
    loaded = fxprune.load(old, make(seed=1))
    assert all(torch.equal(t, small.state_dict()[name]) for name, t in loaded.state_dict().items())
