"""One HTML page that samples in a browser: the network inside, run by onnxruntime-web, without a server."""

import base64
import json
from pathlib import Path
from typing import Any

from eval.exporting.check import Expected
from eval.sampling.grid import class_names
from meanflow.errors import AssetError, UserError
from meanflow.files import read_json
from meanflow.training.model import Model

TEMPLATE = Path(__file__).with_name("page.html")
VERSION = "1.30.0"  # of onnxruntime-web
CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{VERSION}/dist/"
FILES = {  # of its package's dist/: the library, and the WebAssembly that it runs; with their hashes in VERSION
    "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
}
LARGEST = 100e6  # bytes of a network that a page should hold


def read_runtime(folder: Path) -> tuple[str, dict[str, bytes]]:
    """The version and the files of a local copy of the npm package. Raises AssetError if it is none."""
    package, dist = folder / "package.json", folder / "dist"
    if not package.is_file() or not all((dist / name).is_file() for name in FILES):
        raise AssetError(
            f"--runtime {folder}: is no copy of the npm package onnxruntime-web (npm pack onnxruntime-web@{VERSION}, "
            "and unpack it)"
        )
    return str(read_json(package).get("version")), {name: (dist / name).read_bytes() for name in FILES}


def page(
    model: Model, steps: int, network: bytes, known: Expected, runtime: tuple[str, dict[str, bytes]] | None
) -> str:
    """The page of an ONNX graph that makes images. Raises UserError for one that is too large for a page.

    runtime: see `read_runtime`; None: the pinned version from its CDN. `known` is what the page compares itself with.
    """
    if len(network) > LARGEST:
        raise UserError(
            f"--to html: the network has {len(network) / 1e6:,.0f} MB, and a page should have {LARGEST / 1e6:.0f} at "
            "most: use --to onnx"
        )
    version, files = runtime or (VERSION, {})
    labels = known.inputs.get("class_labels")
    facts = {
        "name": model.config.description,
        "about": f"EMA {model.ema}, step {model.meta['step']:,}",
        "steps": steps,
        "z_shape": list(model.config.z_shape),
        "classes": model.config.model.classes,
        "class_names": class_names(list(model.meta["data"]["classes"] or [])),
        "rule": model.config.sample.uint8,
        "runtime": {"version": version, "base": CDN, "integrity": FILES},
        "check": {
            "noise": _base64(known.inputs["noise"].cpu().numpy().tobytes()),
            "labels": [] if labels is None else labels.tolist(),
            "images": _base64(known.images.cpu().numpy().tobytes()),
        },
    }
    parts = {
        "FACTS": _json(facts),
        "NETWORK": _base64(network),
        "LIBRARY": _base64(files.get("ort.wasm.bundle.min.mjs", b"")),
        "WASM": _base64(files.get("ort-wasm-simd-threaded.wasm", b"")),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in parts.items():
        text = text.replace(f"@@{name}@@", value)
    return text


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _json(value: Any) -> str:
    """In a form that cannot end the <script> that it stands in."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
