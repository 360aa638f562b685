"""Serve a folder that ``checkpoint_to_onnx.py`` wrote. It needs onnxruntime, numpy and Pillow; no torch, no fxprune.

    python serve.py served/ --port 8000
    curl --data-binary @rose.jpg localhost:8000

An image is POSTed as it is (JPEG, PNG, …); the answer is JSON: the class and the share of every class.
For one machine and a few clients; put a real server in front of anything else.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

LARGEST = 32 * 2**20  # bytes of a request


class Classifier:
    """The network in a folder, and how an image becomes its input."""

    def __init__(self, folder: str | Path, provider: str = "CPUExecutionProvider"):
        self.recipe = json.loads((Path(folder) / "preprocessing.json").read_text())
        self.session = onnxruntime.InferenceSession(Path(folder) / "model.onnx", providers=[provider])
        self.input = self.session.get_inputs()[0].name

    def preprocess(self, image: Image.Image) -> Any:
        """Pixels [1, 3, size, size]: the shorter side resized, the centre cut out, normalised."""
        size, resize = self.recipe["size"], self.recipe["resize"]
        image = image.convert("RGB")
        shorter = min(image.size)
        width, height = (int(resize * side / shorter) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
        mean, std = (np.asarray(self.recipe[name], dtype=np.float32) for name in ("mean", "std"))
        return ((pixels - mean) / std).transpose(2, 0, 1)[None]

    def __call__(self, image: Image.Image) -> dict[str, Any]:
        (logits,) = self.session.run(None, {self.input: self.preprocess(image)})
        weights = np.exp(logits[0] - logits[0].max())
        shares = dict(zip(self.recipe["classes"], (weights / weights.sum()).tolist(), strict=True))
        return {"class": max(shares, key=shares.__getitem__), "shares": shares}


def server_of(classifier: Classifier, host: str = "127.0.0.1", port: int = 8000) -> ThreadingHTTPServer:
    """A server that answers every POST; ``serve_forever`` starts it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            given = self.headers.get("Content-Length", "")
            length = int(given) if given.isdecimal() else 0
            if not 0 < length <= LARGEST:
                self.answer(413 if length > LARGEST else 411, {"error": f"send an image of 1 to {LARGEST} bytes"})
                return
            try:
                image = Image.open(io.BytesIO(self.rfile.read(length)))
                image.load()
            except (OSError, Image.DecompressionBombError):
                self.answer(400, {"error": "this is no image that Pillow reads"})
                return
            self.answer(200, classifier(image))

        def answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return ThreadingHTTPServer((host, port), Handler)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="serve a network of checkpoint_to_onnx.py")
    parser.add_argument("folder", help="with model.onnx and preprocessing.json")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--provider", default="CPUExecutionProvider", choices=onnxruntime.get_available_providers())
    args = parser.parse_args(argv)
    with server_of(Classifier(args.folder, args.provider), args.host, args.port) as server:
        print(f"http://{args.host}:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
