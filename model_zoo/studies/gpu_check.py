"""The 24 networks on a GPU: pruned there, exported in float32 and float16, compared with torch on it, and timed.

Without a GPU that torch and onnxruntime both work on, the command says so, writes nothing, and ends with exit code 2.
A network with random weights is pruned to half its MACs on the GPU. Dense and pruned network are exported, and
onnxruntime's CUDA provider must give what torch gives on the same GPU. Then both are timed in turn at several batch
sizes, inputs and outputs on the device; a latency is the median of three medians.
"""

from __future__ import annotations

from fxprune.deploy.runtime import CUDA
from model_zoo.measuring.gpu_check import BATCHES, measured, place_of
from model_zoo.networks import NETWORKS
from model_zoo.pages.gpu_check import page
from model_zoo.records import Layout, read
from model_zoo.study import Add, Options, Study, each, passed

LAYOUT = Layout("networks")


def _options(add: Add) -> None:
    add("--batches", type=int, nargs="+", default=[*BATCHES], help="batch sizes to time (1 32 128)")
    add("--device", default="cuda", help="of torch (default: cuda)")
    add("--provider", default=CUDA, help=f"of onnxruntime, on the same device (default: {CUDA})")


def _check(options: Options) -> str:
    if reason := place_of(options).why_not():
        return f"nothing can be checked here, and nothing was written: {reason}"
    if options.resume and options.out.exists():
        before = read(options.out, LAYOUT)[0]["device"]
        if before != place_of(options).described()["device"]:
            return f"{options.out} is of another device, {before}; give another --out"
    return ""


STUDY = Study(
    "gpu_check", "the 24 on a GPU: onnxruntime against torch there, in float32 and float16, and latencies",
    lambda _: NETWORKS, each(measured), page, options=_options, needs=("a GPU",), doc=__doc__, check=_check,
    head=lambda options: place_of(options).described(), finished=passed, open=True, strict=True, jobs=True,
    file="gpu.json", layout=LAYOUT,
)  # fmt: skip
