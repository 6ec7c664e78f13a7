"""Files that hold a traced module: written, and opened to be run."""

import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from meanflow.errors import AssetError

FORMATS = ("onnx", "pt2", "aoti")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
PROTOBUF_LIMIT = 1.5e9  # bytes of weights above which they lie in a file beside the ONNX one, which holds 2 GB at most
Program = Callable[..., Tensor]  # of the inputs in order; one that the module does without is left out


def refuse_missing(kind: str) -> None:
    """Before the work. Raises AssetError, saying how to get it, where a package or a compiler is missing."""
    if kind == "onnx":
        missing = [name for name in ONNX_PACKAGES if name in sys.modules and sys.modules[name] is None]
        missing += [name for name in ONNX_PACKAGES if name not in sys.modules and not importlib.util.find_spec(name)]
        if missing:
            raise AssetError(
                f"ONNX needs {', '.join(missing)}: {sys.executable} -m pip install {' '.join(ONNX_PACKAGES)}"
            )
    if kind == "aoti" and not shutil.which(os.environ.get("CXX", "g++")):
        raise AssetError("AOTInductor needs a C++ compiler, and there is no g++ (or $CXX) here: use --to pt2 or onnx")


def write(kind: str, module: nn.Module, inputs: dict[str, Tensor], output: str, path: Path) -> None:
    """`module` as a file of one of `FORMATS` at `path`, for any batch, or up to the `largest_batch` of a part of it.

    inputs: an example of each, (B, …) with B > 1, in the order of its arguments.
    """
    limits = [part.largest_batch for part in module.modules() if hasattr(part, "largest_batch")]
    batch = torch.export.Dim("batch", max=min(limits)) if limits else torch.export.Dim("batch")
    shapes, values = tuple({0: batch} for _ in inputs), tuple(inputs.values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporters' own insides
        program = torch.export.export(module.eval(), values, dynamic_shapes=shapes)
        if kind == "pt2":
            torch.export.save(program, path)
        elif kind == "aoti":
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        else:
            found = torch.onnx.export(
                program, values, dynamo=True, input_names=list(inputs), output_names=[output], verbose=False
            )
            for node in found.model.graph:
                node.metadata_props.clear()  # its place in the source: paths of this machine, and half of the file
                node.doc_string = None
            size = sum(x.numel() * x.element_size() for x in module.state_dict().values())
            found.save(str(path), external_data=size > PROTOBUF_LIMIT)


def open_program(kind: str, path: Path, device: torch.device, threads: int | None = None) -> Program:
    """What the file computes; inputs and output are tensors. ONNX Runtime computes on the CPU."""
    if kind == "pt2":
        return torch.export.load(path).module()
    if kind == "aoti":
        return torch._inductor.aoti_load_package(str(path))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = threads or torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own kinds, for operations that this processor has no kernel for among others
        reason = " ".join(str(error).split())[:200]
        raise AssetError(f"{path.name}: ONNX Runtime cannot run this graph here ({reason})") from error
    names = [given.name for given in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        arrays = {name: x.cpu().numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0]).to(device)

    return run
