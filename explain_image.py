"""Explain one decision of CLIP: the neurons, heads and patches that brought a score about, and the proof.

    python explain_image.py PICTURE --text "a dog" --against "a cat" --model ViT-B-32 --pretrained openai

Several pictures share a page. A folder in place of them gives the neurons that matter for the text over all
of its pictures. The score is 100 times the cosine of the picture and --text, or its margin over --against.

A neuron that is taken away acts as on average, at every token. The mean activations are those that
compute_second_order_neuron_prs.py leaves in --output_dir (or --input_dir) for --dataset; --baseline zero does
without them. Where the descriptions of the shown neurons and their grades are there, they are shown; where
the data set's classifier is there, it makes the predictions.
With --units PATH a dictionary's units are taken away in place of neurons (docs/units.md).

Prints tables, and writes OUTPUT_DIR/explanation_MODEL_PRETRAINED_TEXTS_....html, one file that needs no
network, and the same numbers as .json.
"""

from pathlib import Path

from applications.explain.answer import Explainer
from applications.explain.known import Known
from applications.explain.page import render
from applications.explain.question import (
    ask,
    images_of,
    load_classes,
    load_means,
    read_question,
    readable,
)
from applications.explain.table import lines_of
from applications.explain.write import check_finite, head_of, path_of, record_of, title_of, write
from utils.data.images import train_set_of
from utils.data.splits import Split
from utils.model.clip import load_clip
from utils.runtime import flags
from utils.runtime.errors import UserError
from utils.runtime.layers import parse_layers
from utils.runtime.results import PAIRS
from utils.units import kind_of, open_units


def main(args):
    asked = read_question(args)
    if args.unit_set == PAIRS:
        what = "a neuron cannot be taken away for one head alone, the model runs on through all"
        raise UserError(f"--units pairs: {what}; leave it out: every neuron is shown with its heads")
    clip = load_clip(args.model, args.pretrained, args.device)
    open_units(args, clip)
    question = ask(clip, asked.texts)
    inputs, results = flags.results_of(args, clip)
    layers = parse_layers(args.mlp_layer, clip.vit)
    means = load_means(args, clip, inputs, layers)
    names = flags.names_of_descriptions(args, train_set_of(args.dataset))
    known = Known(inputs, names, args.split)
    explainer = Explainer(clip, question, means, load_classes(args, clip, inputs), known, args)
    answers = explain(args, clip, asked, explainer)
    check_finite([answer for _, answer, _ in answers])
    size = (asked.texts, explainer.total, clip.vit.L)
    for name, answer, _ in answers:
        print("\n".join(lines_of(name, answer, *size)))
    record = record_of(args, clip, asked, layers, means)
    head = head_of(record, explainer.total, kind_of(clip), answers[0][1].get("one", "neuron"))
    html = render(title_of(asked.texts), head, answers, *size)
    path = path_of(results, asked, record)
    write(path, html, record, answers)
    print(f"\nwrote {path} and {path.with_suffix('.json').name}")


def explain(args, clip, asked, explainer):
    """Return the answers, a list of (name, answer, what is drawn)."""
    images = images_of(asked, clip)
    if asked.folder:
        split = Split(images, args.device, args.num_workers, args.batch_size)
        name = f"{readable(Path(asked.folder).resolve().name)}, {len(images):,} pictures"
        return [(name, explainer.folder(split), None)]
    items = [images[i] for i in range(len(images))]
    for item in items:
        if isinstance(item, UserError):
            raise item
    pixels = [item[0][None].to(args.device) for item in items]
    # a page that is sent says nothing of this machine
    names = [readable(Path(path).name) for path in asked.paths]
    return [(name, *explainer.picture(of)) for name, of in zip(names, pixels, strict=True)]


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__)
    add = parser.add_argument
    add("pictures", nargs="+", metavar="PICTURE", help="pictures, or one folder of them")
    add("--text", required=True, help="what the score is of; taken as it stands, without a template")
    add("--against", help="the score is the margin of --text over this one")
    add("--baseline", choices=("mean", "zero"), default="mean", help="how a neuron acts that is taken away")
    add("--neurons", type=flags.positive_int, default=10, help="neurons that are shown")
    help = "numbers of neurons that are taken away, and kept"
    add("--counts", type=flags.positive_int, nargs="+", default=[1, 2, 5, 10, 20], help=help)
    add("--seed", type=flags.count, default=0, help="of the random neurons")
    group = parser.add_argument_group("data")
    flags.add_dataset(group)
    help = "the split on which evaluate_descriptions.py has graded the descriptions"
    group.add_argument("--split", default="val", help=help)
    flags.add_workers(group)
    help = "zero-based MLP layers, or 'all'"
    parser.add_argument("--mlp_layer", nargs="+", default=["all"], help=help)
    flags.add_units(parser)
    flags.add_top_k(parser)
    flags.add_texts(parser, components=128)
    flags.add_normalise(parser)
    flags.add_compute(parser)
    flags.run(main, parser)
