"""`bash run.sh latency RUN [RUN …]`: the time to one image, and images a second, by evaluations and batch.

Times are from noise to images (decoded, of latents), medians over rounds in which all take turns. They are for this
machine under its load now. What would take longer than --limit is left out.
"""

import argparse
import json
import platform
import shlex
import sys
from dataclasses import asdict

from eval.scoring.options import RUN, Parser, add_device, add_out, check_out, count, counts, path
from meanflow.errors import UserError, run_main
from meanflow.files import write_bytes, write_text


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("latency", __doc__.partition(": ")[2])
    parser.add_argument("runs", type=path, nargs="+", metavar="RUN", help=RUN)
    parser.add_argument("--steps", type=counts, default=(1, 2, 4, 8), help="network evaluations, NFE (1,2,4,8)")
    parser.add_argument("--batch", type=counts, default=(1, 16, 64), help="images at once (1,16,64)")
    parser.add_argument("--repeats", type=count, default=7, help="rounds, of which the median counts (7)")
    parser.add_argument("--limit", type=count, default=20, metavar="SECONDS", help="longest call that is timed (20)")
    parser.add_argument("--compile", action="store_true", help="time networks compiled by torch.compile too")
    parser.add_argument("--no-onnx", action="store_true", help="leave ONNX Runtime out (where it is installed)")
    parser.add_argument("--threads", type=count, help="of the CPU (PyTorch's choice)")
    add_device(parser)
    add_out(parser, "a JSON file with everything; the picture goes beside it, as .png")
    args = parser.parse_args(argv)
    if args.out and args.out.suffix != ".json":
        raise UserError(f"--out {args.out}: name a file that ends in .json")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    for file in (args.out, args.out.with_suffix(".png")) if args.out else ():
        check_out(file, args.overwrite)

    import torch

    from eval.exporting.files import refuse_missing
    from eval.timing.measure import COMPILED, EAGER, ONNX, Plan, measure
    from eval.timing.show import picture, ratios, table
    from meanflow.errors import AssetError
    from meanflow.logs import log
    from meanflow.training.model import device_of, load
    from meanflow.training.run_folder import environment

    if args.threads:
        torch.set_num_threads(args.threads)
    device = device_of(args.device)
    modes = [EAGER, *([COMPILED] if args.compile else [])]
    if not args.no_onnx and device.type == "cpu":
        try:
            refuse_missing("onnx")
            modes.append(ONNX)
        except AssetError as error:
            log.info(f"without ONNX Runtime: {error}")
    plan = Plan(tuple(modes), args.steps, args.batch, args.repeats, args.limit)
    where = {**environment(), "threads": torch.get_num_threads(), "platform": platform.platform()}
    machine = f"{where['device']}, {where['threads']} threads, torch {where['torch']}"
    print(machine)
    measured, facts = {}, []
    for what in args.runs:
        model = load(what, device=device)
        parameters = sum(p.numel() for p in model.network.parameters())
        name = f"{what}: {parameters / 1e6:.2f} M parameters, images {tuple(model.config.image_shape)}"
        measured[str(what)] = rows = measure(model, plan)
        print("\n" + "\n".join(line for line in (table(name, rows), ratios(rows)) if line), flush=True)
        rates = [asdict(row) | {"images_per_s": row.images_per_s} for row in rows]
        facts.append({"run": str(what), "parameters": parameters, "latencies": rates})
    if args.out:
        command = shlex.join(["bash", "run.sh", "latency", *(sys.argv[1:] if argv is None else argv)])
        found = {"command": command, "machine": where, "runs": facts}
        write_text(args.out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        write_bytes(args.out.with_suffix(".png"), picture(measured, machine))
        print(f"\n→ {args.out}, {args.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
