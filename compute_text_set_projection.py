"""Embed a text set, the candidate texts from which neurons are described.

    python compute_text_set_projection.py --model ViT-B-32 --pretrained openai --text_descriptions 30k

Reads a text file, one text a line (--text_descriptions NAME is text_descriptions/NAME.txt; a path works as
well). Writes NAME_MODEL_PRETRAINED.npy  [texts, D], 100 times the unit text vectors; and beside it a .txt,
the texts in that order.
"""

from utils.data.text_sets import as_text, digest_of_texts, find_texts, read_texts
from utils.model.clip import clip_of
from utils.model.texts import TEXTS, text_vectors, too_long
from utils.runtime import distributed, flags
from utils.runtime.files import save_atomic
from utils.runtime.passes import Pass, pieces_of


def main(args):
    given = args.data_path or args.text_descriptions
    texts = read_texts(find_texts(given, args.descriptions_dir))
    clip = clip_of(args, texts=True)
    results = flags.outputs_of(args, clip, descriptions_dir=None)
    if cut := too_long(clip, texts):
        what = f"{len(cut)} texts are longer than the model's context and are cut off"
        print(f"note: {what}; the first is {cut[0][:60]!r}")
    record = {**clip.text_record, "texts": len(texts), "content": digest_of_texts(texts)}
    record["coefficient"] = args.coefficient
    arrays = results.arrays(["texts"], {"texts": len(texts)}, texts=given)
    [path] = arrays
    pieces = pieces_of(len(texts), TEXTS, title="texts", unit="text")
    with Pass(arrays, record, pieces, overwrite=args.overwrite) as work:
        for rows in work:
            work[path][rows] = args.coefficient * text_vectors(clip, texts[rows], args.batch_size)
        if distributed.is_rank_zero():
            save_atomic(path.with_suffix(".txt"), lambda file: file.write(as_text(texts)))
    print(f"wrote {path} {arrays[path][0]}")
    known = {"texts": given, "dataset": "DATASET", "layer": "LAYER", "components": min(128, len(texts))}
    print(f"next: {results.command('decomposition', **known)}")


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__, reads=False)
    parser.add_argument(
        "--text_descriptions", default="30k", help="name of a text file in --descriptions_dir, or a path"
    )
    parser.add_argument("--data_path", help="the path of a text file; instead of --text_descriptions")
    parser.add_argument(
        "--descriptions_dir", default="text_descriptions", help="where text files are looked for"
    )
    flags.add_compute(parser, batch_size=512)
    flags.add_coefficient(parser)
    flags.add_unused(parser, "--num_workers")
    flags.run(main, parser, parallel=True)
