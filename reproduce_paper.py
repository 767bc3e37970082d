"""The paper's tables and figures: its numbers beside ours, each with the commands that give them.

    python reproduce_paper.py --list
    python reproduce_paper.py table1 fig3 --model ViT-B-32 --pretrained openai --data_path PATH
    python reproduce_paper.py all --data_path PATH --imagenet_r PATH --segmentation gtsegs_ijcv.mat

Runs the stages that are needed, keeps what they leave in --output_dir, and writes into its folder paper_MODEL_PRETRAINED
    paper.html paper.md paper.json   the page; and its pictures and tables
What cannot be done is left out, with the reason. Interrupted, the same command resumes. Without ImageNet: make paper.
"""

import time
from pathlib import Path

from utils.paper import page
from utils.paper.items import ITEMS
from utils.paper.paper import Paper
from utils.runtime import distributed, flags
from utils.runtime.errors import UserError
from utils.runtime.files import read_json

GPU = 40  # times two CPU cores: assumed where costs are projected, not measured


def main(args):
    if args.list:
        for name, item in ITEMS.items():
            print(f"{name:8} {item.title}{f' (needs {item.needs})' if item.needs else ''}")
        return
    wanted = list(ITEMS) if "all" in args.items else args.items
    if unknown := [name for name in wanted if name not in ITEMS]:
        raise UserError(f"{unknown[0]} is no table or figure; there are {', '.join(ITEMS)}, or all")
    if not wanted:
        raise UserError("name a table or figure, or all; --list says which there are")
    if distributed.world_size() > 1:
        raise UserError("run the stages with torchrun, and this command without: it keeps what they left")
    paper = Paper(args)
    path = paper.folder / "paper.json"
    found = read_json(path, "", "remove it").get("items", {}) if path.is_file() else {}
    announce(paper, wanted)
    lines = about(paper)
    for name in wanted:
        found[name] = make(paper, name, found.get(name, {}))
        title = f"Second-order effects of neurons, {paper.results.clip}"
        page.write(paper.folder, title, lines, in_order(found), comparable=paper.results.clip == "ViT-B-32_openai")
    print(f"\nwrote {paper.folder / 'paper.html'}, paper.md and paper.json")


def in_order(found):
    return {name: found[name] for name in ITEMS if name in found}


def announce(paper, wanted):
    """Say what the items need and cost, before any of them is made."""
    print(f"{paper.results.directory} keeps the results; each item needs, besides the model and images:")
    for name in wanted:
        item = ITEMS[name]
        try:
            hours = f"about {item.passes(paper) * paper.seconds_of_an_image / 3600:.2g} hours of forward passes"
        except UserError as error:
            hours = f"left out: {error}"
        print(f"  {name:8} {item.title}; {item.needs or 'nothing'}; {hours}", flush=True)


def about(paper):
    """What stands on top of the page."""
    args = paper.args
    model, layers = f"{args.model}, {args.pretrained}", f"layer {args.mlp_layer}, applications {' '.join(args.mlp_layers)}"
    lines = [f"{model}; data set {args.dataset}; {layers}."]
    lines += ["The paper's numbers are of ViT-B-32 with OpenAI's weights on ImageNet; differences are shown for these only."]
    return [*lines, *([args.note] if args.note else [])]


def make(paper, name, earlier):
    """One item, as `page.write` takes it."""
    item, began = ITEMS[name], time.monotonic()
    print(f"\n== {name}: {item.title}", flush=True)
    paper.commands = []
    made = {"title": item.title, "left_out": "", "rows": [], "pictures": [], "commands": [], "seconds": 0, "cost": ""}
    try:
        rows, pictures = item.make(paper)
    except UserError as error:
        print(f"left out: {error}")
        return {**made, "left_out": str(error)}
    seconds = max(round(time.monotonic() - began, 1), earlier.get("seconds", 0))  # what is kept costs nothing the second time
    for row in rows:
        print(f"  {row.what}: {page.number(row.ours, row.unit)}{f' ({row.beside})' if row.beside else ''}")
    cost = f"{seconds:,.0f} s on this machine; on one GPU perhaps {seconds / GPU:,.1f} s (a factor of {GPU}, not measured)."
    made |= {"rows": [row._asdict() for row in rows], "pictures": [path.name for path in pictures], "commands": paper.commands}
    return {**made, "seconds": seconds, "cost": cost}


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__)
    parser.add_argument("items", nargs="*", metavar="ITEM", help="tables and figures, or all")
    parser.add_argument("--list", action="store_true", help="say which tables and figures there are")
    flags.add_paper(parser, Path)
    flags.run(main, parser)
