"""`bash run.sh export RUN --to onnx|pt2|aoti|html --out FILE`: sampling as one graph that runs without this project.

bash run.sh export runs/demo --to onnx --steps 1 --out demo.onnx    for ONNX Runtime: noise (and class) → images
bash run.sh export runs/demo --to pt2 --steps 2 --out demo.pt2      for torch.export.load
bash run.sh export runs/demo --to aoti --out demo.aoti.pt2          compiled by AOTInductor for this machine
bash run.sh export runs/demo --to html --out demo.html              a page that samples in a browser, no server needed
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from eval.scoring.options import RUN, Parser, add_device, add_guidance, add_out, check_out, count, path
from meanflow.errors import UserError, run_main, write_errors_named

ENDINGS = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".pt2", "html": ".html"}
PRECISIONS = ("fp32", "bf16", "fp16")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("export", __doc__.partition(": ")[2])
    parser.add_argument("what", type=path, metavar="RUN", help=RUN)
    parser.add_argument("--to", choices=tuple(ENDINGS), required=True, help="which kind of file")
    parser.add_argument("--steps", type=count, default=1, help="network evaluations a sample, all in the graph (1)")
    parser.add_argument("--decode", action="store_true", help="decode latents in the graph too")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the network's blocks (fp32)")
    parser.add_argument("--ema", help="a decay that the run keeps, or 'weights' (the recipe's ema.eval)")
    parser.add_argument(
        "--runtime", type=path, metavar="DIR", help="with html: a copy of the npm package onnxruntime-web"
    )
    add_guidance(parser)
    add_out(parser, "the file to write")
    add_device(parser, "run a pt2 or aoti file")
    args = parser.parse_args(argv)
    if args.out is None:
        raise UserError("say where to: --out FILE")
    if args.out.suffix != ENDINGS[args.to]:
        raise UserError(f"--out {args.out}: a file for --to {args.to} ends in {ENDINGS[args.to]}")
    if args.runtime is not None and args.to != "html":
        raise UserError("--runtime goes with --to html")
    if args.device == "cuda" and args.to in ("onnx", "html"):
        raise UserError(f"--device cuda: a file for --to {args.to} is not of a device; it is checked on the CPU")
    if args.precision == "bf16" and args.to in ("onnx", "html"):
        raise UserError(
            "--precision bf16: ONNX Runtime has no such convolutions on CPUs to check it with: fp16, or --to pt2"
        )
    check_out(args.out, args.overwrite)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    from eval.exporting.files import refuse_missing

    kind = "onnx" if args.to == "html" else args.to
    refuse_missing(kind)

    from eval.exporting.check import LIMITS, SAMPLES, difference, expected, inputs_of
    from eval.exporting.files import open_program, write
    from eval.exporting.graph import DTYPES, Generator, Velocity, lower_precision
    from eval.exporting.page import page, read_runtime
    from meanflow.files import write_text
    from meanflow.training.model import device_of, load

    runtime = None if args.runtime is None else read_runtime(args.runtime)
    model = load(args.what, args.ema, "cpu" if kind == "onnx" else device_of(args.device))
    sampler, guidance = model.config.objective.sampler, model.guided(args.guidance, args.interval)
    if sampler == "renoise" and args.steps > 1:
        raise UserError(
            f"--steps {args.steps}: {args.what} adds new noise after each step, which no graph holds: give 1"
        )
    decoder = _decoder(args, model)
    known = expected(model, args.steps, guidance, decoder)
    network = model.network.to(memory_format=_contiguous())
    if args.precision != "fp32":
        lower_precision(network, DTYPES[args.precision], model.config.z_shape)
    output = "latents" if model.codec is not None and decoder is None else "images"
    graph = Generator(Velocity(network, guidance), args.steps, sampler, decoder)
    with write_errors_named(args.out), tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".export-") as folder:
        made = Path(folder) / args.out.with_suffix(ENDINGS[kind]).name
        write(kind, graph, inputs_of(model, SAMPLES - 2), output, made)
        found = difference(open_program(kind, made, model.device), known, args.precision, str(args.out))
        if args.to == "html":
            write_text(args.out, page(model, args.steps, made.read_bytes(), known, runtime))
        else:
            for file in sorted(Path(folder).iterdir(), reverse=True):  # weights of a large ONNX file lie beside it
                os.chmod(file, 0o644)
                shutil.move(file, args.out.parent / file.name)
    runs = {"onnx": "ONNX Runtime", "pt2": "torch.export", "aoti": "AOTInductor"}[kind]
    evaluations = "1 evaluation" if args.steps == 1 else f"{args.steps} evaluations"
    evaluations += "" if guidance is None else f", {guidance}"
    print(
        f"{args.what}, EMA {model.ema}, step {model.meta['step']:,} → {args.out}: {evaluations}, {args.precision}, "
        f"noise (batch, {', '.join(map(str, model.config.z_shape))}) → {output} {tuple(known.images.shape[1:])}, "
        f"{args.out.stat().st_size / 1e6:,.1f} MB"
    )
    print(
        f"checked: {SAMPLES} samples of {runs} differ from the network's in float32 by {found:.1e} at most "
        f"(allowed: {LIMITS[args.precision]:.0e})"
    )
    return 0


def _contiguous():
    import torch

    return torch.contiguous_format


def _decoder(args: argparse.Namespace, model):
    """The module that decodes latents in the graph; None if none is asked for. Raises UserError."""
    from meanflow.data.codec import open_codec

    if model.codec is None:
        if args.decode:
            raise UserError(f"--decode: {args.what} makes images itself, it has no latents")
        return None
    if args.to == "html" and not args.decode:
        raise UserError(f"--to html: {args.what} makes latents, so a page needs --decode")
    data = model.config.data
    return open_codec(data.vae, model.device, "fp32", data.decode_batch).decoder() if args.decode else None


if __name__ == "__main__":
    raise SystemExit(run_main(main))
