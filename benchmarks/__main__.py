"""`python -m benchmarks [name ...] [--quick] [--repeat N] [--json FILE]`: a Markdown table of ratios."""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.measure import Options, Row

FIGURES = {
    "resize": "image_resize against a bare loop, the usual task, and itself without MQTT and without rows",
    "broker": "the embedded broker alone against Redis and RabbitMQ",
    "pickup": "how soon an idle worker begins, and what it costs",
    "get": "how soon a waiting caller sees a completion",
    "claims": "reserve and claim with a million rows queued",
    "due": "how late a retry and an ETA begin",
    "recovery": "how soon jobs run again after a kill -9 and after the broker was emptied, on three brokers",
    "mqtt": "what MQTT costs the jobs, and how soon a subscriber knows",
    "imports": "starting a producer",
    "memory": "peak memory of a pool child",
}


def main() -> None:
    arguments = _arguments()
    about = machine()
    rows: list[Row] = []
    print("| figure | target | measured | |\n|---|---|---|---|")
    for name in arguments.names or FIGURES:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="media-tasks-bench-") as folder:
            options = Options(
                is_quick=arguments.quick, repeats=arguments.repeat, photos=arguments.photos, folder=Path(folder)
            )
            for row in import_module(f"benchmarks.figures.{name}").measure(options):
                print(f"| {row.figure} | {row.target} | {row.measured} | {row.detail} |", flush=True)
                rows.append(row)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    print("\n" + "\n".join(f"{name}: {value}  " for name, value in about.items()))
    if arguments.json:
        document = {"rows": [asdict(row) for row in rows], "machine": about}
        arguments.json.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _arguments() -> argparse.Namespace:
    known = "\n".join(f"  {name:10} {what}" for name, what in FIGURES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"Measure, side by side with other ways to do the same:\n{known}",
        epilog="Each ratio is the median over rounds that run in turn (A B, B A, ...); in brackets the extremes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="name", help="figures to measure (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and rows: five minutes instead of seventeen")
    parser.add_argument("--repeat", type=int, metavar="N", help="rounds of each comparison")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="camera JPEGs of 12-16 MP (also BENCH_PHOTOS)")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(FIGURES):
        parser.error(f"no figure is called {', '.join(sorted(unknown))}; known: {', '.join(FIGURES)}")
    return arguments


if __name__ == "__main__":
    main()
