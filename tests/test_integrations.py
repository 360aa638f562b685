"""Every page of docs/integrations runs with the real library, where that is installed, and gives what the page says."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from pages import DOCS, ROOT, block_with, blocks, run, stand_in
from processes import TORCHRUN
from torch import Tensor, nn

import fxprune

PAGES = {page.stem: page for page in sorted(DOCS.glob("integrations/*.md"))}
INT8 = 0.1  # of the largest output, at random weights: rounding to 8 bits
SAME = 1e-4
HALF = 1e-3  # weights in float16

# What other libraries warn of when they are imported and used is theirs.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def missing(page: Path) -> list[str]:
    """The packages that the page's extras bring and that are not installed here."""
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.findall(r"fxprune\[(\w+)\]", "".join(blocks("sh", page)))
    wanted = [re.search(rf"^{extra} = \[(.*?)\]", project, re.MULTILINE | re.DOTALL) for extra in extras]
    names = [name for found in wanted if found for name in re.findall(r'"([\w-]+)[^"]*"', found[1])]
    installed = {re.sub("[-_.]+", "-", str(d.name)).lower() for d in metadata.distributions()}
    return [name for name in names if name not in installed and name != "onnxruntime"]


def small_network(name: str, pretrained: bool = False) -> nn.Module:
    if not name.startswith("vit"):
        return stand_in(name)
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(64, 16, num_classes=10, embed_dim=64, depth=2, num_heads=4)
    model.pretrained_cfg = {"input_size": (3, 64, 64)}
    return model.eval()


def error(found: Any, expected: Tensor) -> float:
    """The largest difference, relative to the largest output."""
    found = torch.as_tensor(found)
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def onnx_ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def check_onnxruntime(names: dict[str, Any], folder: Path) -> None:
    import onnxruntime

    session, images = names["session"], names["images"]
    (expected,) = onnxruntime.InferenceSession("small.onnx", providers=["CPUExecutionProvider"]).run(
        None, {"x": images.numpy()}
    )
    assert error(names["logits"], torch.from_numpy(expected)) < INT8
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimised.onnx"), 3
    onnxruntime.InferenceSession("int8.onnx", options, providers=["CPUExecutionProvider"])
    ops, exported = onnx_ops(folder / "optimised.onnx"), onnx_ops(folder / "small.onnx")
    assert (ops["QLinearConv"], ops["QLinearAdd"], ops["Conv"]) == (exported["Conv"], exported["Add"], 0)
    assert (folder / "int8.onnx").stat().st_size < 0.4 * (folder / "small.onnx").stat().st_size
    assert session.get_inputs()[0].shape[0] == "batch"
    assert onnx_ops(folder / "attention.onnx")["Attention"] == 2


def check_fx(names: dict[str, Any], folder: Path) -> None:
    assert error(names["logits"], names["small"](names["images"])) < INT8
    calls = Counter(str(node.target) for node in names["int8"].graph.nodes if node.op == "call_function")
    assert calls["quantized.add_relu"] == 4


def check_torchao(names: dict[str, Any], folder: Path) -> None:
    int8 = names["int8"]
    kinds = {type(layer.weight.data).__name__ for layer in int8.modules() if isinstance(layer, nn.Linear)}
    assert kinds == {"Int8Tensor"}
    assert sum(isinstance(layer, nn.Linear) for layer in int8.modules()) == 2 * 4 + 1
    calls = Counter(str(node.target) for node in names["lowered"].graph.nodes if node.op == "call_function")
    assert calls["onednn.qconv2d_pointwise.binary"] == 4
    with torch.no_grad():
        assert error(names["quantised"], names["small"](names["images"][:4])) < INT8


def same(names: dict[str, Any], folder: Path, most: float = SAME) -> None:
    with torch.no_grad():
        expected = names["small"](names["images"])
    assert error(names["logits"], expected[: len(names["logits"])]) < most


def check_executorch(names: dict[str, Any], folder: Path) -> None:
    same(names, folder)
    assert error(names["int8_logits"], names["small"](names["images"][:1])) < INT8
    for edge in (names["edge"], names["edge_int8"]):
        calls = [str(n.target) for n in edge.exported_program().graph.nodes if n.op == "call_function"]
        assert calls == ["executorch_call_delegate", "<built-in function getitem>"]


def check_trained(names: dict[str, Any], folder: Path, net: str) -> None:
    """The pruned graph itself was trained, and its file fits the class."""
    small, model = names["small"], names["model"]
    found = names["task"].net if net == "task" else names[net]
    assert found is small
    assert not torch.equal(small.conv1.weight, fxprune.apply(model, small.meta["fxprune"].plan).conv1.weight)
    loaded = fxprune.load(folder / "tuned.safetensors", stand_in("resnet18"))
    assert torch.equal(loaded.conv1.weight, small.conv1.weight)
    if net == "task":
        assert names["loaded"].net is names["again"]
        assert torch.equal(names["again"].conv1.weight, small.conv1.weight)


def check_peft(names: dict[str, Any], folder: Path) -> None:
    small, merged, model = names["small"], names["merged"], names["model"]
    q_proj, v_proj = (small.get_submodule(f"model.layers.1.self_attn.{name}") for name in ("q_proj", "v_proj"))
    for layer, name in ((q_proj, "q_proj"), (v_proj, "v_proj")):
        of = f"base_model.model.model.layers.1.self_attn.{name}.lora_"
        assert names["shapes"][f"{of}A.default.weight"] == (8, layer.in_features)
        assert names["shapes"][f"{of}B.default.weight"] == (layer.out_features, 8)
    trained = [name for name, p in names["graph"].named_parameters() if p.grad is not None]
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)
    assert isinstance(merged, type(model))
    assert merged.get_submodule("model.layers.1.self_attn.q_proj").weight.shape == q_proj.weight.shape
    same = names["kept"](names["tokens"]).logits
    torch.testing.assert_close(names["same"](names["tokens"]).logits, same)


def check_ema(names: dict[str, Any], folder: Path) -> None:
    small, averaged, ema = names["small"], names["averaged"].module, names["ema"].module
    for net in (averaged, ema):
        assert net.meta["fxprune"].plan == small.meta["fxprune"].plan
        assert not torch.equal(net.conv1.weight, small.conv1.weight)
    assert torch.equal(fxprune.load(folder / "ema.safetensors", stand_in("resnet18")).conv1.weight, ema.conv1.weight)


def check_distributed(names: dict[str, Any], folder: Path) -> None:
    assert sorted(re.findall(r"rank (\d) of 2: ", names["printed"])) == ["0", "1"]  # lines of two processes may meet


def check_yolo(names: dict[str, Any], folder: Path) -> None:
    (told,) = re.findall(r"^\{.*\}$", names["printed"], re.MULTILINE)
    found = json.loads(told)
    assert max(found["errors"]) < SAME
    assert (found["class"], found["nc"]) == ("DetectionModel", 2)
    assert found["loaded"] == 0
    assert (folder / "yolo-small/plan.json").exists()


YOLO_TOLD = """
import json
from ultralytics.nn.tasks import DetectionModel
loaded = fxprune.load_pretrained("yolo-small", DetectionModel("yolo11n.yaml", nc=2, verbose=False)).eval()
found = {"errors": errors, "class": type(yolo.model).__name__, "nc": yolo.model.nc}
print(json.dumps(found | {"loaded": float(abs(loaded(x)[0] - expected).max())}))
"""


def alone(page: Path, *launcher: str, more: str = "") -> dict[str, Any]:
    """What the page's code prints in processes of its own."""
    Path("train.py").write_text("\n".join([*blocks("python", page), more]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "YOLO_CONFIG_DIR": os.getcwd()}
    command = [sys.executable, *launcher, "train.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return {"printed": done.stdout}


ALONE: dict[str, Callable[[Path], dict[str, Any]]] = {
    "distributed": lambda page: alone(page, *TORCHRUN),
    "yolo": lambda page: alone(page, more=YOLO_TOLD),  # ultralytics changes settings of torch for good
}


CHECKS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "accelerate": partial(check_trained, net="tuned"),
    "aotinductor": same,
    "distributed": check_distributed,
    "ema": check_ema,
    "executorch": check_executorch,
    "fx-quantization": check_fx,
    "lightning": partial(check_trained, net="task"),
    "litert": same,
    "onnxruntime": check_onnxruntime,
    "openvino": lambda names, folder: same(names, folder, HALF),
    "peft": check_peft,
    "torchao": check_torchao,
    "yolo": check_yolo,
}


def test_every_page_is_checked_and_in_the_list() -> None:
    assert sorted(CHECKS) == sorted(PAGES.keys() - {"index"})
    listed = re.findall(r"\]\(([\w-]+)\.md\)", PAGES["index"].read_text())
    assert sorted(listed) == sorted(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacking := missing(PAGES[name]):
        pytest.skip(f"not installed: {', '.join(lacking)}")
    monkeypatch.setattr(timm, "create_model", small_network)
    monkeypatch.chdir(tmp_path)
    CHECKS[name](ALONE.get(name, run)(PAGES[name]), tmp_path)


def test_fx_quantises_a_network_that_is_bound_to_a_size() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model, x = small_network("vit"), torch.randn(2, 3, 64, 64)
    small = fxprune.prune(model, x, flops=0.5, progress=False)
    outputs = []
    for network in (fxprune.into(model, small), small):  # layer norms are quantised too, which costs either the same
        observed = prepare_fx(copy.deepcopy(network), get_default_qconfig_mapping("x86"), (x,))
        observed(x)
        int8 = convert_fx(observed)
        outputs.append(int8(x))
    assert error(outputs[1], outputs[0]) < SAME
    with pytest.raises(fxprune.FxpruneError, match="64 would have held"):
        int8(torch.randn(2, 3, 32, 32))


class Twice(nn.Module):
    """Two convolutions, and one ReLU after either."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU()
        self.head = nn.Conv2d(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.b(self.relu(self.a(x)))))


def test_the_x86_quantizer_refuses_one_relu_in_two_places_dense_or_pruned() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    model, x = Twice().eval(), torch.randn(1, 3, 8, 8)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    small = fxprune.prune(model, x, channels=0.5, progress=False)
    expected = small(x)
    for network in (model, small):
        with pytest.raises(ValueError, match="Input partition has more than one output node"):
            prepare_pt2e(torch.export.export(network, (x,)).module(), quantizer)
    exec(block_with("nn.functional.relu", PAGES["torchao"]), {"small": small, "torch": torch})
    observed = prepare_pt2e(torch.export.export(small, (x,)).module(), quantizer)
    assert torch.equal(observed(x), expected)
