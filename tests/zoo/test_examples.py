"""The examples run as they are, on drawn images and small checkpoints; three lines are all that two of them add."""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import randomise
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import models

import fxprune
from model_zoo.examples import checkpoint_to_onnx, serve, timm_inference, torchvision_finetuning

EXAMPLES = Path(timm_inference.__file__).parent
ROOT = EXAMPLES.parents[1]
CLASSES = ("blue", "green", "red")
NETWORK = "test_resnet"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as of torchvision's ImageFolder: noise around three colours."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for index, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 120, (70, 90, 3))
                pixels[..., 2 - index] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{number}.png")
    return folder


def timm_network() -> nn.Module:
    return randomise(timm.create_model(NETWORK, num_classes=len(CLASSES)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "dense.safetensors"
    save_file(timm_network().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def served(images: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the walk wrote."""
    out = tmp_path_factory.mktemp("walk") / "served"
    checkpoint_to_onnx.main([
        *(str(images), "--model", NETWORK, "--weights", str(checkpoint), "--out", str(out), "--epochs", "1"),
        *("--batch-size", "6", "--workers", "0", "--device", "cpu"),
    ])  # fmt: skip
    return out


def lines_of(path: Path) -> tuple[list[str], str]:
    """The marked lines, and the script without them."""
    lines = path.read_text().splitlines()
    marked = [line for line in lines if line.endswith("# fxprune")]
    return marked, "\n".join(line for line in lines if line not in marked)


@pytest.mark.parametrize("name", ["timm_inference", "torchvision_finetuning"])
def test_three_lines_are_all_that_was_added(name: str) -> None:
    marked, before = lines_of(EXAMPLES / f"{name}.py")
    assert len(marked) == 3
    assert "fxprune" not in ast.unparse(ast.parse(before)).replace(
        ast.get_docstring(ast.parse(before), clean=False), ""
    )
    assert "\n".join(marked) in (EXAMPLES / "README.md").read_text()


def label(script: Any, images: Path, out: Path, *options: str) -> list[dict[str, str]]:
    script([
        *(str(images / "val"), "--model", NETWORK, "--num-classes", "3", "--top", "2", "--results", str(out)),
        *("--workers", "0", "--device", "cpu", *options),
    ])  # fmt: skip
    with out.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm leaves closing its images to Python
def test_inference_with_and_without_the_three_lines(images: Path, checkpoint: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    fxprune.save(fxprune.prune(timm_network(), flops=0.5, progress=False), half)
    names: dict[str, Any] = {"__name__": "before"}
    exec(compile(lines_of(EXAMPLES / "timm_inference.py")[1], "timm_inference.py", "exec"), names)
    before = label(names["main"], images, tmp_path / "before.csv", "--checkpoint", str(checkpoint))
    dense = label(timm_inference.main, images, tmp_path / "dense.csv", "--checkpoint", str(checkpoint))
    assert before == dense
    assert list(before[0]) == ["file", "class 1", "share 1", "class 2", "share 2"]
    assert sorted(row["file"] for row in before) == [f"{name}/{n}.png" for name in CLASSES for n in range(2)]
    pruned = label(timm_inference.main, images, tmp_path / "pruned.csv", "--pruned", str(half))
    assert [row["file"] for row in pruned] == [row["file"] for row in dense]
    assert pruned != dense
    assert all(0 <= float(row["share 2"]) <= float(row["share 1"]) <= 1 for row in pruned)


def squeezenet(classes: int) -> nn.Module:
    return randomise(models.get_model("squeezenet1_1", weights=None, num_classes=classes))


def test_fine_tuning_saves_a_pruned_network(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = tmp_path / "imagenet.pth", tmp_path / "tuned.pth"
    state = squeezenet(10).state_dict()  # a classifier for other classes
    torch.save(state, weights)
    torchvision_finetuning.main([
        *(str(images), "--model", "squeezenet1_1", "--weights", str(weights), "--out", str(out), "--epochs", "1"),
        *("--batch-size", "6", "--size", "40", "--workers", "0", "--device", "cpu"),
    ])  # fmt: skip
    told = capsys.readouterr().out
    assert told.startswith(f"{len(state) - 2} of {len(state)} tensors from the checkpoint\n")
    assert re.search(r"^epoch 1: \d+\.\d% of 6 images$", told, re.MULTILINE)
    loaded = fxprune.load(out.with_suffix(".safetensors"), squeezenet(3))
    tuned = torch.load(out, weights_only=True)
    assert {name: tuple(t.shape) for name, t in tuned.items()} != {n: tuple(t.shape) for n, t in state.items()}
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in loaded.state_dict().items())
    assert sum(map(torch.numel, tuned.values())) < 0.8 * sum(map(torch.numel, state.values()))


@pytest.fixture
def address(served: Path) -> Iterator[str]:
    with serve.server_of(serve.Classifier(served), port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def post(address: str, body: bytes) -> Any:
    with urllib.request.urlopen(urllib.request.Request(address, body), timeout=60) as answer:
        return json.load(answer)


def test_from_a_checkpoint_to_answers(images: Path, served: Path, address: str) -> None:
    assert sorted(path.name for path in served.iterdir()) == [
        "model.onnx", "preprocessing.json", "pruned.safetensors", "report.html",
    ]  # fmt: skip
    assert "<h2>ONNX</h2>" in (served / "report.html").read_text()
    recipe = json.loads((served / "preprocessing.json").read_text())
    assert recipe["classes"] == list(CLASSES)
    small = fxprune.load(served / "pruned.safetensors", timm_network()).eval()
    assert not torch.equal(small.get_parameter("conv1.0.weight"), timm_network().get_parameter("conv1.0.weight"))
    for name in CLASSES:
        path = images / "val" / name / "0.png"
        pixels = checkpoint_to_onnx.centred(recipe)(Image.open(path))[None]
        torch.testing.assert_close(torch.from_numpy(serve.Classifier(served).preprocess(Image.open(path))), pixels)
        with torch.no_grad():
            expected = small(pixels).softmax(1)[0]
        answer = post(address, path.read_bytes())
        assert list(answer["shares"].values()) == pytest.approx(expected.tolist(), abs=1e-4)
        assert answer["class"] == CLASSES[int(expected.argmax())]


def test_the_server_refuses_what_is_no_image(address: str) -> None:
    for body, status, error in (
        (b"no image", 400, "this is no image that Pillow reads"),
        (b"", 411, "send an image of 1 to 33554432 bytes"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(address, body)
        with refused.value as answer:
            assert answer.code == status
            assert json.load(answer) == {"error": error}


def test_the_server_needs_no_torch(served: Path, images: Path) -> None:
    script = (
        "import sys, serve\nfrom PIL import Image\n"
        f"print(serve.Classifier({str(served)!r})(Image.open({str(images / 'val/red/0.png')!r}))['class'])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'fxprune')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=EXAMPLES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in CLASSES


@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
def test_a_yolo_of_every_task_goes_all_the_way(task: str, tmp_path: Path) -> None:
    """In a process of its own: ultralytics changes settings of torch for good. Detection is a page of the docs."""
    pytest.importorskip("ultralytics")
    command = [sys.executable, "-m", "model_zoo.examples.yolo", "--task", task, "--out", "runs", "--device", "cpu"]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "YOLO_CONFIG_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--size", "64"], capture_output=True, text=True, check=False, cwd=tmp_path, env=settings, timeout=300
    )
    assert done.returncode == 0, done.stderr
    errors = [float(found) for found in re.findall(r"relative error (\S+) against torch", done.stdout)]
    assert len(errors) == 2
    assert max(errors) < 1e-4
    assert re.search(r"MACs .* -> .* \((59|60)\.\d%\)", done.stdout)
    assert "| metrics/mAP50(B) | – |" in (tmp_path / "runs/pruned/README.md").read_text()
