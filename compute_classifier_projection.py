"""The zero-shot classifier of a data set, over OpenAI's 80 templates.

    python compute_classifier_projection.py --model ViT-B-32 --pretrained openai --dataset imagenet

Writes  DATASET_classifier_MODEL_PRETRAINED.npy  [D, classes], unit columns; the class names are in its .meta.json
"""

from utils import arguments
from utils.artifacts import Names, save_array
from utils.clip import load_clip, zero_shot_classifier
from utils.datasets import class_names_of


def main(args):
    class_names = class_names_of(args.dataset, args.data_path, args.split, args.class_names)
    clip = load_clip(args.model, args.pretrained, args.device)
    path = Names(args.output_dir, args.model, args.pretrained).classifier(args.dataset)
    classifier = zero_shot_classifier(clip, class_names, args.batch_size)
    meta = {**arguments.clip_record(args), "fingerprint": clip.fingerprint, "dataset": args.dataset}
    save_array(path, classifier, {**meta, "class_names": class_names})
    print(f"wrote {path} {classifier.shape}")
    print(
        f"next: python compute_second_order_neuron_prs.py --split train --dataset {args.dataset} {arguments.repeated_flags(args)}"
    )


if __name__ == "__main__":
    parser = arguments.stage_parser(__doc__)
    arguments.add_model(parser)
    arguments.add_dataset(parser)
    parser.add_argument("--data_path", help="root folder, where the class names are folder names (CIFAR, folder)")
    parser.add_argument("--split", default="val", help="the folder in the root whose sub-folders are the classes")
    parser.add_argument("--class_names", help="a text file with one class name a line, in the order of the sorted folders")
    arguments.add_compute(parser, batch_size=800)
    arguments.add_directories(parser, reads=False)
    arguments.run(main, parser)
