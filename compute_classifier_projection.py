"""Make the zero-shot classifier of a data set, over OpenAI's 80 templates.

    python compute_classifier_projection.py --model ViT-B-32 --pretrained openai --dataset imagenet

Writes  DATASET_classifier_MODEL_PRETRAINED.npy  [D, classes], unit columns; the class names are in its
.meta.json
"""

from utils.data.images import classes_of, pairing, train_set_of
from utils.model.clip import clip_of
from utils.model.texts import CLASSES, zero_shot_classifier
from utils.runtime import flags
from utils.runtime.passes import Pass, pieces_of


def main(args):
    classes = classes_of(args.dataset, args.data_path, args.split, args.class_names)
    names = classes["class_names"]
    print(f"{args.dataset}: {pairing(**classes)}")
    clip = clip_of(args, texts=True)
    results = flags.outputs_of(args, clip)
    dataset = train_set_of(args.dataset)
    record = {**clip.text_record, "dataset": dataset, **classes}
    arrays = results.arrays(["classifier"], {"classes": len(names)}, dataset=dataset)
    [path] = arrays
    pieces = pieces_of(len(names), CLASSES, title="classes", unit="class")
    with Pass(arrays, record, pieces, overwrite=args.overwrite) as work:
        for columns in work:
            work[path][:, columns] = zero_shot_classifier(clip, names[columns], args.batch_size)
    print(f"wrote {path} {arrays[path][0]}")
    known = {"dataset": dataset, "split": "train", "layer": "LAYER"}
    if dataset != args.dataset:
        known["data_path"] = "DATA_PATH"  # of ImageNet, and not of ImageNet-R
    print(f"next: {results.command('coefficients', **known)}")


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__, reads=False)
    flags.add_dataset(parser)
    parser.add_argument(
        "--data_path", help="root folder, where the class names are folder names (CIFAR, folder)"
    )
    parser.add_argument(
        "--split", default="val", help="the folder in the root whose sub-folders are the classes"
    )
    help = "a text file, a class a line: folders, or names in their order; for --dataset images any texts"
    parser.add_argument("--class_names", help=help)
    flags.add_compute(parser, batch_size=800)
    flags.run(main, parser, parallel=True)
