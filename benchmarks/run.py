"""Run all benchmarks, one after the other, and collect their tables in one (`make bench`).

    python -m benchmarks.run [--only omp pca] [--quick]

Writes benchmarks/results/results.json and results.md from the tables that are there, those of earlier runs
included.
"""

import argparse
import json
import subprocess
import sys

from benchmarks.common import RESULTS, ROOT, markdown

BENCHMARKS = ("naive", "second_order", "stages", "pca", "omp", "texts", "precision", "pipeline")
BENCHMARKS += (
    "fingerprints",
    "curves",
    "tricks",
    "layers",
    "rehearsal",
    "descriptions",
    "noise",
    "deletion",
    "page",
    "units",
)


def main(args):
    flags = ["--quick"] if args.quick else []
    for name in args.only:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *flags], check=True, cwd=ROOT)
    folder = RESULTS / "quick" if args.quick else RESULTS
    tables = collect(folder)
    (folder / "results.json").write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n")
    (folder / "results.md").write_text("\n".join(map(markdown, tables.values())))
    missed = []
    for name, table in tables.items():
        missed += [f"{name}: {item['what']}" for item in table["rows"] if item["held"] is False]
    print(f"wrote {len(tables)} tables to {folder.relative_to(ROOT)}")
    if missed and not args.quick:
        print("bars missed:", *missed, sep="\n  ")


def collect(folder):
    """Return the tables in a folder, {name: table}, in the order of BENCHMARKS."""
    files = sorted(file for file in folder.glob("*.json") if file.stem != "results")
    files.sort(key=lambda file: [file.stem.startswith(name) for name in BENCHMARKS], reverse=True)
    return {file.stem: json.loads(file.read_text()) for file in files}


if __name__ == "__main__":
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    help = "tiny sizes, to see that everything runs; the figures mean nothing"
    parser.add_argument("--quick", action="store_true", help=help)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    main(parser.parse_args())
