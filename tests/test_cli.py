import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from conftest import randomise

from fxprune import cli

pytestmark = pytest.mark.usefixtures("ops_read_once")

NET = """
import torch
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )

class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = make()

    def forward(self, x):
        return self.body(x).softmax(1)

BATCHES = [(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))] * 2

def batches():
    return BATCHES

def loss(output, target):
    return nn.functional.cross_entropy(output, target)

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, ids, scale=None):
        x = self.table(ids).mean(1)
        return self.down(self.up(x if scale is None else x * scale).relu())

IDS = torch.randint(0, 20, (2, 7))

def named():
    return {"ids": IDS, "scale": torch.rand(2, 1)}

def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)

def constant(optimizer, epochs):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path / 'net.py'}:make"


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = cli.main(arguments)
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def refused(*arguments: str) -> str:
    """The one sentence on stderr; nothing on stdout, and exit code 2."""
    code, out, err = run(*arguments, "--quiet")
    assert code == 2
    assert out == ""
    assert err.startswith("fxprune: ")
    assert err.count("\n") == 1
    return err.removeprefix("fxprune: ").rstrip("\n")


# -- what it does


def test_prune_reconstructs_on_data_or_without(net: str, tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text("import torch\n\ndef images():\n    return torch.randn(40, 3, 8, 8)\n")
    common = ["prune", net, "--flops", "0.5", "--input-size", "3,8,8", "--json"]
    code, out, _ = run(*common, "--method", "obs", "--data", f"{tmp_path / 'data.py'}:images", "--reconstruct")
    assert code == 0
    told = json.loads(out)["reconstruction"]
    assert told["samples"] + told["held_out"] == 40
    code, out, _ = run(*common, "--reconstruct")
    assert code == 0
    assert json.loads(out)["reconstruction"]["of_noise"]
    assert "neither a folder of images nor" in refused(*common, "--reconstruct", "--data", str(tmp_path / "none"))
    from PIL import Image

    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    assert "wants its images is not known" in refused(*common, "--reconstruct", "--data", str(tmp_path))


def test_prune_writes_all_that_was_asked_for(net: str, tmp_path: Path) -> None:
    model = randomise(cli_model(net))
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    outputs = [tmp_path / name for name in ("half.onnx", "half.safetensors", "half.json")]
    code, out, err = run(
        *("prune", net, "--weights", str(tmp_path / "dense.pt"), "--input-size", "3,32,32", "--flops", "0.5"),
        *("--onnx", str(outputs[0]), "--save", str(outputs[1]), "--plan", str(outputs[2])),
    )
    assert code == 0, err
    assert all(path.stat().st_size > 0 for path in outputs)
    assert "MACs" in out
    assert f"plan: {outputs[2]}\nweights: {outputs[1]}\nonnx: {outputs[0]}: opset" in out
    assert err.startswith(f"loading {net}\n")
    assert "exporting to ONNX and comparing with onnxruntime" in err
    json.loads(outputs[2].read_text())
    assert sum(tensor.numel() for tensor in load(outputs[1]).values()) < sum(
        map(torch.numel, model.state_dict().values())
    )


def test_quiet_says_nothing_but_the_result(net: str) -> None:
    code, out, err = run("prune", net, "--input-size", "3,32,32", "--channels", "0.5", "--method", "l1", "--quiet")
    assert (code, err) == (0, "")
    assert "MACs" in out


def test_every_option_reaches_prune(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fxprune

    seen: dict[str, Any] = {}

    class Report:
        def __str__(self) -> str:
            return "the report"

    def prune(model: Any, example_inputs: Any, **options: Any) -> Any:
        seen.update(options, shape=tuple(example_inputs.shape), training=model.training)
        model.meta = {"fxprune": Report()}
        return model

    monkeypatch.setattr(fxprune, "prune", prune)
    file = net.removesuffix(":make")
    code, out, _ = run(
        *("prune", net, "--input-size", "3,8,8", "--params", "0.25", "--method", "random", "--scope", "uniform"),
        *("--attention", "heads", "--exact", "--ignore", "0", "3", "--ignore", "4", "--round-to", "8"),
        *("--keep", "layer4.*", "fc"),
        *("--min-channels", "2", "--seed", "7", "--no-verify", "--quiet", "--latency", "0.5", "--steps", "2"),
        *("--provider", "CPUExecutionProvider", "--threads", "3", "--batch", "4", "--flops", "0.1", "--channels", "1"),
        *("--max-ratio", "0.9", "layer.*=0.5", "--consume", "--epochs", "5", "--amp", "--clip", "1", "--device", "cpu"),
        *("--checkpoint", "run.pt", "--resume", "old.pt", "--data", f"{file}:batches", "--loss", "mse_loss"),
        *("--validation", f"{file}:BATCHES", "--optimizer", f"{file}:sgd", "--schedule", f"{file}:constant"),
        *("--per-step", "--depth", "0.3"),
    )
    assert (code, out) == (0, "the report\n")
    options, names = seen.pop("options"), sys.modules["_fxprune_model_net"]
    assert options == fxprune.Options(
        min_channels=2,
        steps=2,
        max_ratio={"*": 0.9, "layer.*": 0.5},
        consume=True,
        loop=fxprune.Loop(
            names.sgd, names.constant, names.BATCHES, device="cpu", amp=True, clip=1.0, checkpoint="run.pt",
            resume="old.pt", per_step=True,
        ),
    )  # fmt: skip
    assert seen == {
        "shape": (1, 3, 8, 8),
        "training": False,
        "method": "random",
        "flops": 0.1,
        "params": 0.25,
        "channels": 1.0,
        "latency": fxprune.LatencyBudget(0.5, provider="CPUExecutionProvider", threads=3, batch=4),
        "data": names.BATCHES,
        "loss_fn": torch.nn.functional.mse_loss,
        "epochs": 5,
        "ignore": ("0", "3", "4"),
        "keep": ("layer4.*", "fc"),
        "exact": True,
        "attention": "heads",
        "scope": "uniform",
        "round_to": 8,
        "depth": 0.3,
        "verify": False,
        "seed": 7,
        "progress": False,
    }
    seen.clear()
    assert run("prune", net, "--input-size", "3,8,8", "--depth", "--flops", "0.5", "--quiet")[0] == 0
    assert seen["depth"] is True


def test_what_is_not_given_is_left_to_prune(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fxprune

    seen: dict[str, Any] = {}

    def prune(model: Any, example_inputs: Any, **options: Any) -> Any:
        seen.update(options)
        raise fxprune.FxpruneError("seen")

    monkeypatch.setattr(fxprune, "prune", prune)
    assert refused("prune", net, "--input-size", "3,8,8", "--macs", "0.25") == "seen"
    assert seen == {"macs": 0.25, "progress": False}


def test_a_learner_trains_on_the_data_of_a_file(net: str, tmp_path: Path) -> None:
    path, file = tmp_path / "run.pt", net.removesuffix(":make")
    code, out, err = run(
        *("prune", net, "--input-size", "3,32,32", "--method", "slimming", "--flops", "0.5", "--epochs", "1"),
        *("--checkpoint", str(path), "--data", f"{file}:batches", "--loss", f"{file}:loss"),
    )
    assert code == 0, err
    assert "method slimming" in out
    assert "epoch 1/1: loss" in err
    assert path.exists()


def test_a_part_of_a_model_is_pruned_and_exported(net: str, tmp_path: Path) -> None:
    out = tmp_path / "part.safetensors"
    code, text, err = run(
        *("prune", f"{net.removesuffix('make')}Whole", "--input-size", "3,32,32", "--submodule", "body"),
        *("--params", "0.5", "--save", str(out), "--onnx", str(tmp_path / "part.onnx"), "--quiet"),
    )
    assert (code, err) == (0, "")
    assert "Sequential, method l2" in text
    assert "onnx: " in text
    assert out.exists()


def test_inputs_that_are_no_image_come_from_a_file(net: str, tmp_path: Path) -> None:
    file, onnx = net.removesuffix("make"), str(tmp_path / "half.onnx")
    for name in ("named", "IDS"):  # a function that makes a dict, and a tensor
        given = (f"{file}Tokens", "--inputs", f"{file}{name}", "--quiet")
        code, out, err = run("prune", *given, "--params", "0.5", "--onnx", onnx, "--plan", str(tmp_path / "plan.json"))
        assert (code, err) == (0, "")
        assert "masked original and pruned model agree" in out
        assert run("inspect", *given)[0] == 0
        assert run("apply", str(tmp_path / "plan.json"), *given)[0] == 0
        taken = [i.name for i in onnxruntime.InferenceSession(onnx).get_inputs()]
        assert taken == (["ids", "scale"] if name == "named" else ["ids"])
    code, _, err = run("prune", f"{file}Tokens", "--inputs", f"{file}name", "--params", "0.5")
    assert code == 2
    assert "has no function 'name'" in err
    code, _, err = run("prune", *given, "--input-size", "3,8,8", "--params", "0.5")
    assert (code, err) == (2, "fxprune: --input-size and --inputs both say what the model takes; give one of them\n")


def test_inspect_lists_groups_and_what_is_frozen(net: str) -> None:
    code, out, _ = run("inspect", net, "--input-size", "3,32,32", "--quiet")
    assert code == 0
    assert re.search(r"\b16\b", out)
    assert re.search(r"\b24\b", out)


def test_pages(net: str, tmp_path: Path) -> None:
    page, onnx = str(tmp_path / "page.html"), str(tmp_path / "half.onnx")
    size = ("--input-size", "3,32,32", "--quiet")
    code, _, err = run("inspect", net, *size, "--html", page)
    assert (code, err) == (0, "")
    assert "what can be cut" in Path(page).read_text()
    code, out, err = run("prune", net, *size, "--flops", "0.5", "--onnx", onnx, "--html", page)
    assert (code, err) == (0, "")
    assert out.endswith(f"page: {page}\n")
    text = Path(page).read_text()
    assert "method l2, flops=0.5" in text
    assert f"<td>{onnx}</td>" in text, "what onnxruntime found is on the page"


def test_methods_lists_each_with_a_line() -> None:
    code, out, err = run("methods")
    assert (code, err) == (0, "")
    names = [line.split()[0] for line in out.splitlines()]
    assert names == sorted(names)
    assert {"bn_scale", "l1", "l2", "random"} <= set(names)
    assert all(len(line.split()) > 2 for line in out.splitlines())


def test_a_network_goes_through_files(net: str, tmp_path: Path) -> None:
    """prune, save, apply the plan, export from the file, validate, compare: every command on what another wrote."""
    model = randomise(cli_model(net))
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    half, plan, program = (str(tmp_path / name) for name in ("half.safetensors", "half.json", "half.pt2"))
    given = ("--weights", str(tmp_path / "dense.pt"), "--input-size", "3,32,32", "--quiet")
    assert run("prune", net, *given, "--flops", "0.5", "--save", half, "--plan", plan)[0] == 0
    code, out, err = run("apply", plan, net, *given, "--save", program, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["written"] == {"weights": program}
    assert told["macs_after"] < told["macs_before"]
    onnx = str(tmp_path / "half.onnx")
    chosen = ("--opset", "21", "--dynamic-size", "--half", "--no-fold-norms", "--provider", "CPUExecutionProvider")
    code, out, err = run("export", half, net, "--onnx", onnx, *chosen, "--quiet")
    assert (code, err) == (0, "")
    assert out.startswith(f"onnx: {onnx}: opset 21 in float16, max error ")
    assert " and sizes 32 x 32, 32 x 64, 64 x 32; " in out
    assert b"BatchNormalization" in Path(onnx).read_bytes()
    code, out, _ = run("export", program, "--onnx", str(tmp_path / "program.onnx"), "--json", "--quiet")
    assert code == 0
    assert json.loads(out)["onnx"]["max_rel_error"] < 1e-4
    told = refused("export", program, "--onnx", str(tmp_path / "no.onnx"), "--sparse")
    assert told.startswith("sparse=True: no weight has so many exact zeros")
    code, out, _ = run("validate", half, net, "--json", "--quiet")
    assert code == 0
    facts = json.loads(out)
    assert (facts["model"], facts["method"], facts["checked"]) == ("Sequential", "l2", ["file", "outputs"])
    assert facts["onnx"] is None
    code, out, _ = run("validate", half, net, "--onnx", onnx, "--json", "--quiet")
    assert code == 0
    told = json.loads(out)
    assert told["checked"] == ["file", "outputs", "onnx"]
    assert told["onnx"]["metadata"]["plan_digest"] == json.loads(Path(plan).read_text())["digest"]
    assert told["onnx"]["runs"][-1]["provider"] == "CPUExecutionProvider"
    assert "\nonnx         " + onnx in run("validate", half, net, "--onnx", onnx, "--quiet")[1]
    assert refused("validate", half, "--onnx", onnx) == (
        f"'{onnx}' is compared with what the network computes: give the MODEL too"
    )
    assert refused("validate", half, net, "--provider", "CPUExecutionProvider") == (
        "--provider says where the file of --onnx is run; give that too"
    )
    assert run("validate", half)[1].endswith("its outputs were not checked: give the MODEL too\n")
    assert run("validate", program, "--quiet")[0] == 0
    assert run("compare", plan, program)[1].startswith("the same channels stay\ntensor  ")
    content = bytearray(Path(half).read_bytes())
    content[-3] ^= 1
    Path(half).write_bytes(content)
    assert refused("validate", half) == (
        f"'{half}' was changed after it was saved (its digest differs). Save or copy it again."
    )


def test_bench_runs_a_saved_network_beside_the_dense_one(net: str, tmp_path: Path) -> None:
    small = str(tmp_path / "small.safetensors")
    assert run("prune", net, "--input-size", "3,32,32", "--flops", "0.5", "--save", small, "--quiet")[0] == 0
    code, out, _ = run("bench", small, net, "--batch", "3", "--runs", "4", "--threads", "1", "--json", "--quiet")
    found = json.loads(out)
    assert code == 0
    assert found["batch"] == 3
    assert found["threads"] == 1
    assert found["ratio"] == found["pruned_ms"] / found["dense_ms"]
    code, out, _ = run("bench", small, net, "--runs", "4", "--threads", "1", "--quiet")
    assert code == 0
    assert re.match(r"latency: [\d.]+ ms -> [\d.]+ ms ", out)
    assert refused("bench", small, net, "--batch", "0") == "--batch 0: give a whole number of at least 1"
    assert refused("bench", small, net, "--provider", "Nobody").startswith("this onnxruntime has no execution provider")


def test_compare_counts_what_two_cuts_share(net: str, tmp_path: Path) -> None:
    first, second = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    for path, seed in ((first, "1"), (second, "2")):
        run("prune", net, "--input-size", "3,32,32", "--channels", "0.5", "--method", "random", "--seed", seed,
            "--plan", path, "--quiet")  # fmt: skip
    kept = [set(json.loads(Path(path).read_text())["kept"]["0.weight"]["0"]) for path in (first, second)]
    rows = json.loads(run("compare", first, second, "--json")[1])["kept"]
    row = next(r for r in rows if (r["name"], r["dim"]) == ("0.weight", 0))
    assert (row["first"], row["second"], row["both"]) == (len(kept[0]), len(kept[1]), len(kept[0] & kept[1]))
    assert run("compare", first, second)[1].startswith("different channels stay\n")


def test_json_for_machines(net: str) -> None:
    size = ("--input-size", "3,32,32", "--quiet", "--json")
    told = json.loads(run("prune", net, *size, "--flops", "0.5")[1])
    assert {row["name"] for row in told["rows"]} == {"0", "3", "8"}
    assert (told["model"], told["method"], told["written"]) == ("Sequential", "l2", {})
    groups = json.loads(run("inspect", net, *size)[1])["groups"]
    assert {group["channels"] for group in groups} >= {16, 24}
    assert any(group["locked"].startswith("network output") for group in groups)
    assert json.loads(run("methods", "--json")[1]).keys() >= {"l1", "l2"}


# -- what it refuses


def test_errors_are_one_sentence(net: str, tmp_path: Path) -> None:
    size = ("--input-size", "3,32,32")
    assert refused("prune", "timm:resnet5O", "--flops", "0.5").startswith("timm has no model 'resnet5O'; did you mean ")
    assert refused("inspect", "net") == (
        "cannot read the model spec 'net'; write timm:NAME, torchvision:NAME or path/to/file.py:factory"
    )
    assert refused("prune", net, *size, "--flops", "0.5", "--weights", "none.pt") == "there is no file 'none.pt'"
    assert refused("prune", net, *size, "--flops", "0.5", "--weights", "none.pt", "--pretrained") == (
        "--pretrained and --weights both name weights; give one of them"
    )
    assert "l2" in refused("prune", net, *size, "--flops", "0.5", "--method", "l3")
    refused("prune", net, *size)
    refused("prune", net, *size, "--flops", "0")
    refused("prune", net, *size, "--flops", "nan")
    refused("prune", net, *size, "--flops", "0.5", "--params", "0.5")
    assert refused("prune", net, "--flops", "0.5").startswith("what Sequential takes is not known: give --input-size")


@pytest.mark.parametrize("option", ["--onnx", "--plan", "--save", "--html"])
def test_an_unwritable_path_is_found_before_the_model_is_loaded(tmp_path: Path, option: str) -> None:
    path = tmp_path / "no" / "out.pt"
    assert refused("prune", "timm:no_such_model", "--flops", "0.5", option, str(path)) == (
        f"cannot write '{path}': the folder '{path.parent}' does not exist; create it first"
    )


@pytest.mark.parametrize(("one", "other"), [("--onnx", "--plan"), ("--plan", "--html"), ("--html", "--save")])
def test_two_outputs_of_one_name_are_found_before_the_model_is_loaded(one: str, other: str, tmp_path: Path) -> None:
    path = str(tmp_path / "out.pt")
    (tmp_path / "link.pt").symlink_to(path)
    again = str(tmp_path / "link.pt")
    assert refused("prune", "nothing.py:make", "--flops", "0.5", one, path, other, again) == (
        f"{one} and {other} name one file, {again!r}; give each its own"
    )


def test_usage_errors_are_one_sentence_too(net: str) -> None:
    code, out, err = run("prune", net, "--flops", "half")
    assert (code, out) == (2, "")
    assert err == "fxprune: argument --flops: invalid float value: 'half'; see `fxprune prune --help`\n"
    _, _, err = run("inspect", net, "--input-size", "3x32")
    assert err == (
        "fxprune: argument --input-size: '3x32' is no shape; write sizes with commas between, for instance 3,224,224; "
        "see `fxprune inspect --help`\n"
    )
    code, _, err = run("prine")
    assert code == 2
    assert "'prine'" in err
    assert err.count("\n") == 1
    assert refused("prune", net, "--input-size", "3,32,32", "--flops", "0.5", "--threads", "2") == (
        "--threads is about a budget of latency: give --latency too"
    )
    assert run("prune", net, "--round-to", "many")[2].startswith(
        "fxprune: argument --round-to: 'many' is no number of "
    )
    assert run("prune", net, "--max-ratio", "head=x")[2].startswith(
        "fxprune: argument --max-ratio: 'head=x' is no share"
    )
    # An abbreviation would change its meaning with the next option that begins like it.
    assert run("prune", net, "--flop", "0.5")[2].startswith("fxprune: unrecognized arguments: --flop")


def test_an_interrupt_has_its_own_exit_code(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxprune.io.specs.load_model", interrupt)
    assert run("inspect", net, "--quiet") == (130, "", "fxprune: interrupted\n")


def test_a_mistake_of_ours_is_not_hidden(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("fxprune.io.specs.load_model", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["inspect", net, "--quiet"])


# -- how it starts


def test_help_does_not_load_torch() -> None:
    script = (
        "import sys, contextlib\n"
        "from fxprune.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, "importing fxprune.cli imported torch"
    assert "fxprune prune timm:resnet50 --method l2 --flops 0.5 --onnx resnet50-half.onnx" in done.stdout


def test_the_package_is_run_as_the_command_is() -> None:
    done = subprocess.run([sys.executable, "-m", "fxprune", "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: fxprune ")


def test_a_closed_pipe_is_no_error() -> None:
    script = (
        "import sys; from fxprune import cli, errors\n"
        "cli.commands.methods = lambda options: print('x' * 1_000_000)\n"
        "sys.exit(cli.main(['methods']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


def cli_model(spec: str) -> torch.nn.Module:
    from fxprune.io.specs import load_model

    return load_model(spec)


def load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
