"""Text vectors of a set of texts: the pool from which neurons are described.

    python compute_text_set_projection.py --model ViT-B-32 --pretrained openai --text_descriptions 30k

Reads a text file, one text a line (--text_descriptions NAME is text_descriptions/NAME.txt; a path works as well). Writes
NAME_MODEL_PRETRAINED.npy  [texts, D], 100 times the unit text vectors; and beside it a .txt, the texts in that order.
"""

from pathlib import Path

from utils import arguments
from utils.artifacts import Names, read_texts, save_array, save_atomic
from utils.clip import load_clip, text_vectors


def main(args):
    given = Path(args.data_path or args.text_descriptions)
    file = given if given.is_file() else Path(args.descriptions_dir) / f"{given.name}.txt"
    texts = read_texts(file)
    clip = load_clip(args.model, args.pretrained, args.device)
    path = Names(args.output_dir, args.model, args.pretrained).texts(file.stem)
    vectors = text_vectors(clip, texts, args.batch_size) * args.coefficient
    save_atomic(path.with_suffix(".txt"), lambda out: out.write(("\n".join(texts) + "\n").encode()))
    save_array(path, vectors, {**arguments.clip_record(args), "fingerprint": clip.fingerprint, "texts": len(texts)})
    print(f"wrote {path} {vectors.shape}")
    flags = f"--text_descriptions {file.stem} {arguments.repeated_flags(args)}"
    print(f"next: python compute_sparse_decomposition.py --components 128 {flags}")


if __name__ == "__main__":
    parser = arguments.stage_parser(__doc__)
    arguments.add_model(parser)
    parser.add_argument("--text_descriptions", default="30k", help="name of a text file in --descriptions_dir, or a path")
    parser.add_argument("--data_path", help="the path of a text file; instead of --text_descriptions")
    parser.add_argument("--descriptions_dir", default="text_descriptions", help="where text files are looked for")
    arguments.add_compute(parser, batch_size=256)
    arguments.add_directories(parser, reads=False)
    arguments.add_coefficient(parser)
    arguments.run(main, parser)
