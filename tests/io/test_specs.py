import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.errors import InputError
from fxprune.io.specs import check_weights_path, load_checkpoint, load_data, load_model, save_weights

FACTORY = """
from dataclasses import dataclass
from torch import nn
import neighbour

@dataclass
class Options:
    width: int = neighbour.WIDTH

def make_net():
    return nn.Sequential(nn.Linear(3, Options().width), nn.Linear(Options().width, 2))

def broken():
    raise KeyError("no such thing")

def number():
    return 3
"""


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    path = tmp_path / "net.py"
    path.write_text(FACTORY)
    return path


def error_of(spec: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_model(spec, **options)
    return str(caught.value)


# -- models


def test_library_models_come_in_eval_mode() -> None:
    for spec, name in [("timm:resnet18", "ResNet"), ("torchvision:shufflenet_v2_x0_5", "ShuffleNetV2")]:
        model = load_model(spec)
        assert type(model).__name__ == name
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "lraspp_mobilenet_v3_large"])
def test_torchvision_builders_that_warn_or_download_do_neither(name: str) -> None:
    assert next(load_model(f"torchvision:{name}").parameters()).std() > 0


def test_a_factory_in_a_file(source: Path) -> None:
    model = load_model(f"{source}:make_net")
    assert [layer.out_features for layer in model] == [5, 2]
    assert not model.training


def test_unknown_names_list_close_ones() -> None:
    assert error_of("timm:resnet5O").startswith("timm has no model 'resnet5O'; did you mean resnet5")
    assert re.search(r"did you mean .*\bresnet50\b.* or ", error_of("timm:resnet5O"))
    assert error_of("torchvision:shufflenet_v3_x1_0") == (
        "torchvision has no model 'shufflenet_v3_x1_0'; did you mean shufflenet_v2_x1_0, shufflenet_v2_x2_0, "
        "shufflenet_v2_x1_5, shufflenet_v2_x0_5 or quantized_shufflenet_v2_x1_0?"
    )
    assert re.fullmatch(
        r"timm has no model '\?\?\?'; it knows \d+ names, none of them close to this one", error_of("timm:???")
    )
    assert error_of("timm:resnet50.no_such_tag").startswith("timm:resnet50.no_such_tag could not be loaded: ")


def test_specs_that_cannot_be_read() -> None:
    for spec in ("resnet50", "timm:", "keras:resnet50", "net.py", "net.txt:make", "net.py:"):
        assert error_of(spec) == (
            f"cannot read the model spec {spec!r}; write timm:NAME, torchvision:NAME or path/to/file.py:factory"
        )


def test_files_and_factories_that_fail(source: Path) -> None:
    assert error_of("no/net.py:make") == "there is no file 'no/net.py'"
    assert error_of(f"{source}:make_nets") == f"'{source}' has no function 'make_nets'; did you mean make_net?"
    assert error_of(f"{source}:broken") == f"{source}:broken could not be loaded: KeyError: 'no such thing'"
    assert error_of(f"{source}:number") == f"{source}:number returned int, not a torch.nn.Module"
    assert error_of(f"{source}:make_net", pretrained=True) == (
        f"pretrained weights are for timm and torchvision only; load those of '{source}:make_net' in its factory"
    )
    source.write_text("def make(:")
    assert error_of(f"{source}:make").startswith(f"{source} could not be loaded: SyntaxError: ")


# -- weights


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_saved_weights_load_again(tmp_path: Path, suffix: str) -> None:
    model, other = Tied(), Tied()
    save_weights(model, tmp_path / f"w{suffix}")
    load_checkpoint(other, tmp_path / f"w{suffix}")
    assert [each.name for each in tmp_path.iterdir()] == [f"w{suffix}"]
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert other.last.weight is other.first.weight


def test_tensors_in_another_memory_format_are_saved(tmp_path: Path) -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    save_weights(model, tmp_path / "w.safetensors")
    other = nn.Conv2d(3, 4, 3)
    load_checkpoint(other, tmp_path / "w.safetensors")
    assert torch.equal(other.weight, model.weight)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_checkpoints_of_training_scripts(tmp_path: Path, key: str, prefix: str) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({key: state, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "c.pt")
    load_checkpoint(other, tmp_path / "c.pt")
    assert torch.equal(other.weight, model.weight)


def test_weights_of_another_model_are_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    state = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 3), nn.BatchNorm1d(3)).state_dict()
    torch.save(state, path)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3), nn.Identity(), nn.Linear(3, 1))
    before = model[0].weight.clone()
    with pytest.raises(InputError) as caught:
        load_checkpoint(model, path)
    assert str(caught.value) == (
        f"the weights in '{path}' are not those of this Sequential; missing: 3.weight, 3.bias; "
        "unexpected: 2.weight, 2.bias, 2.running_mean and 2 more; "
        "of another shape: 1.weight ([3, 3] in the file, [3, 2] in the model)"
    )
    assert torch.equal(model[0].weight, before)


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    def error(name: str) -> str:
        with pytest.raises(InputError) as caught:
            load_checkpoint(nn.Linear(1, 1), tmp_path / name)
        return str(caught.value)

    (tmp_path / "w.bin").touch()
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 20)
    torch.save(nn.Linear(1, 1), tmp_path / "pickled.pt")
    torch.save({"a": 1}, tmp_path / "other.pt")
    assert error("none.pt") == f"there is no file '{tmp_path}/none.pt'"
    assert error("w.bin") == (
        f"cannot tell the format of '{tmp_path}/w.bin' by its name; weights end in .pt, .pth or .safetensors"
    )
    for name in ("damaged.pt", "damaged.safetensors", "pickled.pt"):
        assert re.fullmatch(
            rf"cannot read '.*{name}' \(\w+\); it must hold a state_dict, "
            r"as torch\.save\(model\.state_dict\(\), path\) or safetensors write it",
            error(name),
        )
    assert error("other.pt") == (
        f"'{tmp_path}/other.pt' holds no state_dict, neither at its top nor under "
        "'state_dict', 'model' or 'model_state_dict'"
    )


def test_the_suffix_names_the_format(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"by its name; end it in \.pt, \.pth or \.safetensors$"):
        check_weights_path(tmp_path / "weights.ckpt")
    with pytest.raises(InputError, match="does not exist; create it first"):
        check_weights_path(tmp_path / "no" / "weights.pt")


def test_images_in_a_folder_go_through_the_models_own_preprocessing(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "inside").mkdir()
    for number in range(3):
        Image.new("RGB", (300, 260), (255, 255, 255)).save(tmp_path / "inside" / f"{number}.png")
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    for spec in ("timm:resnet18", "torchvision:resnet18"):
        (batch,) = load_data(str(tmp_path), spec, load_model(spec))
        assert batch.shape == (3, 3, 224, 224)
        torch.testing.assert_close(batch[0, :, 0, 0], white)
