"""Compare our way of embedding words and class prompts, sorted and cut, with open_clip's own.

    python -m benchmarks.texts [--words 1536] [--classes 8] [--rounds 5] [--device cpu] [--quick]

The same words of text_descriptions/30k.txt, spread evenly, go through `text_vectors` and `encode_text`, the
same class names through `zero_shot_classifier` and open_clip's `build_zero_shot_classifier`, in turn; a ratio
is the median of the rounds' ratios. The time of all 30,000 words and 1,000 classes is computed from the time
of one.
"""

import numpy as np
import open_clip
import torch

from benchmarks.common import ROOT, Table, alone, bench_parser, interleaved, median, of_model, ratio, row, run
from utils.data.text_sets import read_texts
from utils.model.clip import load_clip
from utils.model.texts import text_vectors, zero_shot_classifier

BATCH = 512


def inputs(words, classes):
    """Return some words, and some class names."""
    pool = read_texts(ROOT / "text_descriptions" / "30k.txt")
    names = open_clip.IMAGENET_CLASSNAMES
    return pool[:: len(pool) // words][:words], names[:: len(names) // classes][:classes]


def set_up(args, folder):
    return load_clip(args.model, "random", args.device), *inputs(args.words, args.classes)


@torch.inference_mode()
def plain_words(clip, words):
    found = []
    for i in range(0, len(words), BATCH):
        tokens = clip.tokenizer(words[i : i + BATCH]).to(clip.device)
        found.append(clip.text.encode_text(tokens, normalize=True))
    return torch.cat(found).cpu().numpy()


@torch.inference_mode()
def plain_classifier(clip, names):
    options = {"num_classes_per_batch": 10, "device": clip.device}  # its default
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    build = open_clip.build_zero_shot_classifier
    return build(clip.text, clip.tokenizer, names, templates, **options).cpu().numpy()


def peak(model, words, classes):
    """Embed words and prompts, in a process of its own whose memory is measured."""
    clip = load_clip(model, "random", "cpu")
    pool, names = inputs(words, classes)
    text_vectors(clip, pool, BATCH)
    zero_shot_classifier(clip, names, BATCH)


def measure(args, case):
    clip, words, names = case
    turns = {
        "words": lambda: text_vectors(clip, words, BATCH),
        "words, encode_text": lambda: plain_words(clip, words),
        "prompts": lambda: zero_shot_classifier(clip, names, BATCH),
        "prompts, build_zero_shot_classifier": lambda: plain_classifier(clip, names),
    }
    apart = [np.abs(text_vectors(clip, words, BATCH) - plain_words(clip, words)).max()]
    apart.append(np.abs(zero_shot_classifier(clip, names, BATCH) - plain_classifier(clip, names)).max())
    _, process = alone(peak, model=args.model, words=4096, classes=50) if not args.quick else (0, None)
    return interleaved(turns, args.rounds, args.device), apart, process


def table(args, found):
    times, apart, process = found
    rows = []
    for kind, other, count, whole, bar, difference in (
        ("words", "encode_text", args.words, 30_000, 20, apart[0]),
        ("prompts", "build_zero_shot_classifier", 80 * args.classes, 80_000, 6, apart[1]),
    ):
        theirs = times[f"{kind}, {other}"]
        each = median(times[kind]) / count
        note = f"{1000 * each:.2f} ms each, {other} {1000 * median(theirs) / count:.1f} ms"
        note += f"; entries differ by {difference:.1e}"
        what = f"{kind}, as many a second as {other}"
        rows.append(row(what, ratio(theirs, times[kind]), "x", at_least=bar, note=note))
        rows.append(row(f"all {whole:,} {kind}", whole * each / 60, "min", note="from the time of one"))
    if process:
        rows.append(row("peak memory, 4,096 words and 4,000 prompts", process.peak / 1e9, "GB", at_most=2.5))
    return Table(of_model("texts", args.model), f"Texts, {args.model}, batches of {BATCH}", rows)


if __name__ == "__main__":
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--words", type=int, default=1536)
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    run(parser, set_up, measure, table, quick={"words": 8, "classes": 1, "rounds": 1})
