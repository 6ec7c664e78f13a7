"""`bash run.sh check_data PATH`: all faults of a folder, zip or tar of images, and how to repair them.

Exit code 0 if the images can be trained on as they are, 3 if not.
"""

import argparse
import os
import shlex
import sys

from eval.scoring.options import Parser, count
from meanflow.errors import EXIT_ASSET, run_main

KINDS = ("unreadable", "size", "mode", "depth", "loose", "empty")
SHOWN = 3  # names of each group


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from meanflow.data.check import check_images

    report = check_images(args.path, args.split, args.size, args.channels, args.resize)
    code = EXIT_ASSET if report.groups else 0
    if args.list:
        names = [name for group in report.groups if group.kind == args.list for name in group.faults]
        sys.stdout.buffer.write(b"".join(os.fsencode(name) + b"\n" for name in names))
        return code
    print(f"{args.path}: {report.images:,} images in {len(report.classes):,} classes")
    repairs = []
    for group in report.groups:
        print(f"\n{group.title}")
        for name, fault in list(group.faults.items())[:SHOWN]:
            print(f"    {printable(f'{name} {fault}'.strip())}")
        if len(group.faults) > SHOWN:
            print(f"    … and {len(group.faults) - SHOWN:,} more (--list {group.kind})")
        print("  as above" if group.repair in repairs else f"  {printable(group.repair)}")
        repairs.append(group.repair)
    for note in report.notes:
        print(f"\nnote: {printable(note)}")
    once = " once that is repaired" if report.must_be_repaired else ""
    print(f"\nto train on them{once}: --set data.path={shlex.quote(args.path)} {report.settings}")
    return code


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("check_data", __doc__.partition(": ")[2])
    parser.add_argument("path", help="folder, zip or tar of images, in class folders or none; or parquet files")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="where it has both (train)")
    parser.add_argument("--size", type=count, help="pixels a side to check for (the most common one)")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="1 is grey, 3 is RGB (3 unless most are grey)")
    parser.add_argument("--resize", choices=("crop",), help="as data.resize: other sizes and modes are no faults then")
    parser.add_argument("--list", choices=KINDS, help="print nothing but the names of one group, one a line")
    return parser.parse_args(argv)


def printable(text: str) -> str:
    """For names, which may hold any character."""
    return "".join(c if c.isprintable() else "�" for c in text)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
