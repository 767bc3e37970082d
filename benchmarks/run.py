"""All benchmarks, one after the other, and one table of them: what `make bench` runs.

    python benchmarks/run.py [--only omp pca] [--quick]

Writes benchmarks/results/results.json and results.md from the tables that are there, those of earlier runs included.
"""

import json
import subprocess
import sys
from pathlib import Path

from common import RESULTS, bench_parser, markdown

HERE = Path(__file__).resolve().parent
BENCHMARKS = ("naive", "second_order", "stages", "pca", "omp", "precision", "pipeline", "curves", "rehearsal")


def main(args):
    for name in args.only:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, HERE / f"{name}.py", *(["--quick"] if args.quick else [])], check=True)
    folder = RESULTS / "quick" if args.quick else RESULTS
    files = sorted(file for file in folder.glob("*.json") if file.stem != "results")
    files.sort(key=lambda file: [file.stem.startswith(name) for name in BENCHMARKS], reverse=True)
    tables = {file.stem: json.loads(file.read_text()) for file in files}
    (folder / "results.json").write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n")
    (folder / "results.md").write_text("\n".join(map(markdown, tables.values())))
    missed = [f"{name}: {item['what']}" for name, table in tables.items() for item in table["rows"] if item["held"] is False]
    print(f"wrote {len(tables)} tables to benchmarks/results" + ("/quick" if args.quick else ""))
    if missed and not args.quick:
        print("bars missed:", *missed, sep="\n  ")


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    main(parser.parse_args())
