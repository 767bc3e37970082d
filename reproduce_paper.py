"""Make the paper's tables and figures: its numbers beside ours, each with the commands that compute them.

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
from applications.paper.study import Paper, add_flags
from utils.runtime import distributed, flags
from utils.runtime.errors import UserError
from utils.runtime.locks import Lock
from utils.runtime.stages import here

PUBLISHED = {  # the paper's
    "model": "ViT-B-32",
    "pretrained": "openai",
    "dataset": "imagenet",
    "mlp_layer": "9",
    "components": 128,
}


def main(args):
    """Make the items that are asked for, or list all of them."""
    if args.list:
        list_items()
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
        announce(paper, wanted)
        write_page(paper, wanted)


def list_items():
    """Print the name of every item, its other names and its title."""
    for name, item in ITEMS.items():
        others = "".join(f", {alias}" for alias, of in ALIASES.items() if of == name)
        print(f"{name}{others}: {item.title}")


def announce(paper, wanted):
    """Say what will be done, what it costs, and what is left out, before any of it is made."""
    possible = [name for name in wanted if not ITEMS[name].lacks(paper)]
    paper.wanted = [ITEMS[name].layers for name in possible if ITEMS[name].layers]
    for name in wanted:
        item = ITEMS[name]
        said = item.lacks(paper)
        if not said:
            hours = item.passes(paper) * paper.seconds_of_an_image / 3600
            said = f"{hours:.2g} hours of forward passes"
        print(f"  {name:8} {item.title}: {said}", flush=True)
    needed = sum(ITEMS[name].disk(paper) for name in possible)
    if paper.wanted:
        needed += paper.disk()
    free = shutil.disk_usage(paper.folder).free
    where = f"the {free / 1e9:.0f} GB free in {paper.folder.parent}"
    print(f"about {needed / 1e9:.1f} GB of {where} will be used")


def write_page(paper, wanted):
    """Make the wanted items one after the other; write the page after each.

    An item that fails stays as an earlier run made it. Raises UserError at the end when one has failed.
    """
    found = page.read(paper.folder)
    failed = []
    for name in wanted:
        try:
            found[name] = make(paper, name, found.get(name, {}))
        except UserError as error:
            failed.append(f"{name} failed: {' '.join(str(error).split())}")
            print(f"failed: {error}")
        shown = {name: found[name] for name in ITEMS if name in found}
        page.write(paper.folder, paper.name, paper.args.note, shown)
    print(f"\nwrote {paper.folder / 'paper.html'}, paper.md and paper.json")
    if failed:
        raise UserError("; ".join(failed))


def make(paper, name, earlier):
    """Make one item; return it as `page.write` takes it. earlier: the item of an earlier run, or {}."""
    began = time.monotonic()
    item = ITEMS[name]
    print(f"\n== {name}: {item.title}", flush=True)
    paper.stages.commands = []
    rows = pictures = []
    left_out = item.lacks(paper)
    if left_out:
        print(f"left out: {left_out}")
    else:
        rows, pictures = item.make(paper)
    for row in rows:
        beside = f" ({row.beside})" if row.beside else ""
        print(f"  {row.what}: {page.number(row.ours, row.unit)}{beside}")
    # what is kept costs nothing the second time
    seconds = max(round(time.monotonic() - began, 1), earlier.get("seconds", 0))
    args = paper.args
    return {
        "title": item.title,
        "left_out": left_out,
        "settings": f"{settings_of(args)}; seed: {item.seed}",
        "seconds": seconds,
        "commands": paper.stages.commands,
        "cost": f"{seconds:,.0f} s on this machine",
        "comparable": all(getattr(args, flag) == value for flag, value in PUBLISHED.items()),
        "rows": [row._asdict() for row in rows],
        "pictures": [path.name for path in pictures],
    }


def settings_of(args):
    """Return model, data and layers, in words."""
    layers = f"layer {args.mlp_layer}, applications {' '.join(args.mlp_layers)}"
    return f"{here(args.model)}, {here(args.pretrained)}, {args.precision}; {args.dataset}; {layers}"


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__, reads=False)
    parser.add_argument("items", nargs="*", metavar="ITEM", help="tables and figures, or all")
    parser.add_argument("--list", action="store_true", help="say which tables and figures there are")
    add_flags(parser)
    flags.run(main, parser)
