"""The paper's tables and figures: its numbers beside ours, each with the commands that give them.

    python reproduce_paper.py --list
    python reproduce_paper.py table1 fig3 --model ViT-B-32 --pretrained openai --data_path PATH
    python reproduce_paper.py all --data_path PATH --imagenet_r PATH --segmentation gtsegs_ijcv.mat

Runs the stages that are needed, keeps what they leave in --output_dir, and writes into its folder
paper_MODEL_PRETRAINED
    paper.html paper.md paper.json   the page; and its pictures and tables
What cannot be done is left out, with the reason. Interrupted, the same command resumes. Without ImageNet:
make paper.
"""

import shutil
import time

from applications.paper import page
from applications.paper.items import ALIASES, ITEMS
from applications.paper.study import Paper, add_flags, here
from utils.runtime import distributed, flags
from utils.runtime.errors import UserError
from utils.runtime.locks import Lock

GPU = 40  # times two CPU cores: assumed where costs are projected, not measured
PUBLISHED = {
    "model": "ViT-B-32",
    "pretrained": "openai",
    "dataset": "imagenet",
    "mlp_layer": "9",
    "components": 128,
}  # the paper's


def main(args):
    if args.list:
        for name, item in ITEMS.items():
            others = "".join(f", {alias}" for alias, of in ALIASES.items() if of == name)
            print(f"{name}{others}: {item.title}")
        return
    wanted = [ALIASES.get(name, name) for name in args.items]
    wanted = list(ITEMS) if "all" in wanted else list(dict.fromkeys(wanted))
    if unknown := [name for name in wanted if name not in ITEMS]:
        raise UserError(f"{unknown[0]} is no table or figure; there are {', '.join(ITEMS)}, or all")
    if not wanted:
        raise UserError("name a table or figure, or all; --list says which there are")
    if distributed.world_size() > 1:
        raise UserError("run the stages with torchrun, and this command without: it keeps what they left")
    paper = Paper(args)
    with Lock(paper.folder):
        write_page(args, paper, wanted)


def write_page(args, paper, wanted):
    """Make the wanted items one after the other; the page is written after each."""
    found, failed = page.read(paper.folder), {}
    announce(paper, wanted)
    for name in wanted:
        try:
            found[name] = make(paper, name, found.get(name, {}))
        except UserError as error:  # what an earlier run found stays on the page
            failed[name] = error
            print(f"failed: {error}")
        page.write(
            paper.folder,
            paper.results.clip,
            args.note,
            {name: found[name] for name in ITEMS if name in found},
        )
    print(f"\nwrote {paper.folder / 'paper.html'}, paper.md and paper.json")
    if failed:
        raise UserError(
            "; ".join(f"{name} failed: {' '.join(str(error).split())}" for name, error in failed.items())
        )


def announce(paper, wanted):
    """Say what will be done, what it costs, and what is left out, before any of it is made."""
    possible = [name for name in wanted if not ITEMS[name].lacks(paper)]
    paper.wanted = [reach for name in possible if (reach := ITEMS[name].layers)]
    for name in wanted:
        item = ITEMS[name]
        hours = item.passes(paper) * paper.seconds_of_an_image / 3600 if name in possible else 0
        print(
            f"  {name:8} {item.title}: {item.lacks(paper) or f'{hours:.2g} hours of forward passes'}",
            flush=True,
        )
    needed = sum(ITEMS[name].disk(paper) for name in possible) + (paper.disk() if paper.wanted else 0)
    free = shutil.disk_usage(paper.folder).free
    print(
        f"about {needed / 1e9:.1f} GB of the {free / 1e9:.0f} GB free in {paper.results.directory} will be used"
    )


def make(paper, name, earlier):
    """One item, as `page.write` takes it."""
    item, args, began = ITEMS[name], paper.args, time.monotonic()
    print(f"\n== {name}: {item.title}", flush=True)
    paper.commands, left_out = [], item.lacks(paper)
    rows, pictures = ([], []) if left_out else item.make(paper)
    if left_out:
        print(f"left out: {left_out}")
    for row in rows:
        print(f"  {row.what}: {page.number(row.ours, row.unit)}{f' ({row.beside})' if row.beside else ''}")
    seconds = max(
        round(time.monotonic() - began, 1), earlier.get("seconds", 0)
    )  # what is kept costs nothing the second time
    layers = f"layer {args.mlp_layer}, applications {' '.join(args.mlp_layers)}"
    settings = f"{here(args.model)}, {here(args.pretrained)}, {args.precision}; {args.dataset}; {layers}; seed: {item.seed}"
    made = {
        "title": item.title,
        "left_out": left_out,
        "settings": settings,
        "seconds": seconds,
        "commands": paper.commands,
    }
    made["cost"] = (
        f"{seconds:,.0f} s on this machine; on one GPU perhaps {seconds / GPU:,.1f} s (a factor of {GPU}, not measured)"
    )
    made["comparable"] = all(getattr(args, flag) == value for flag, value in PUBLISHED.items())
    return {**made, "rows": [row._asdict() for row in rows], "pictures": [path.name for path in pictures]}


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__, reads=False)
    parser.add_argument("items", nargs="*", metavar="ITEM", help="tables and figures, or all")
    parser.add_argument("--list", action="store_true", help="say which tables and figures there are")
    add_flags(parser)
    flags.run(main, parser)
