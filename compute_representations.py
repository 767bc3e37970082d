"""Representations of all images of a data set: the first stage.

    python compute_representations.py --model ViT-B-32 --pretrained openai --dataset imagenet --data_path PATH

Writes  DATASET_SPLIT_representations_MODEL_PRETRAINED.npy  [images, D], 100 times the unit representation
        DATASET_SPLIT_classes.npy                           [images], int64 labels
"""

import torch

from utils.data.images import Loader, load_images
from utils.model.clip import load_clip
from utils.runtime import distributed, flags
from utils.runtime.locks import Lock, is_locked
from utils.runtime.passes import Pass, pieces_of
from utils.runtime.records import complete, is_made, save_array
from utils.runtime.results import Results


def main(args):
    results = Results(
        args.output_dir, args.model, args.pretrained, data_path=args.data_path, split=args.split
    )
    clip = load_clip(args.model, args.pretrained, args.device, precision=args.precision, image_only=True)
    images = load_images(args.dataset, args.data_path, args.split, clip.transform, subsample=args.subsample)
    loader, data = Loader(images, args.device, args.num_workers), images.record
    path = results.path("representations", dataset=args.dataset, split=args.split)
    classes = results.path("classes", dataset=args.dataset, split=args.split)
    of_labels = {**data, **images.classes}
    of_labels.pop("preprocessing")  # labels are the same for all models
    labels_made = is_made(classes, complete(of_labels), args.overwrite)

    record = {**clip.record, **data, "coefficient": args.coefficient}
    arrays = {path: ((len(images), clip.vit.D), "float32")}
    pieces, settings = pieces_of(images, args.batch_size), {"batch_size": args.batch_size}
    with torch.inference_mode(), Pass(arrays, record, pieces, settings, overwrite=args.overwrite) as work:
        for rows, pixels in work.over(loader):
            work[path][rows] = args.coefficient * torch.nn.functional.normalize(clip.vit(pixels), dim=-1)

    if distributed.is_rank_zero():
        if not labels_made or is_locked([classes]):
            with Lock(classes):  # other models have the same labels
                if not is_made(classes, complete(of_labels), args.overwrite):
                    save_array(classes, images.labels, of_labels)
        print(f"wrote {path} {arrays[path][0]} and {classes}")
        print(f"next: {results.command('classifier', dataset=args.dataset)}")


if __name__ == "__main__":
    parser = flags.stage_parser(__doc__, reads=False)
    flags.add_data(parser, split="train")
    flags.add_compute(parser, precision=True)
    flags.add_coefficient(parser)
    flags.run(main, parser, parallel=True)
