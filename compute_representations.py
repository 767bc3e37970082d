"""Representations of all images of a data set: the first stage.

    python compute_representations.py --model ViT-B-32 --pretrained openai --dataset imagenet --data_path PATH --split val

Writes  DATASET_SPLIT_representations_MODEL_PRETRAINED.npy  [images, D], 100 times the unit representation
        DATASET_SPLIT_classes.npy                           [images], int64 labels
"""

import torch

from utils import arguments, distributed
from utils.artifacts import Names, save_array
from utils.clip import load_clip
from utils.datasets import batches, load_images
from utils.rows import RowWriter, row_pieces


def main(args):
    names = Names(args.output_dir, args.model, args.pretrained)
    clip = load_clip(args.model, args.pretrained, args.device, precision=args.precision, image_only=True)
    images = load_images(args.dataset, args.data_path, args.split, clip.transform, args.subsample)
    data = {"dataset": args.dataset, "split": args.split, "data": images.fingerprint()}
    meta = {**arguments.clip_record(args), "fingerprint": clip.fingerprint, **data, "batch_size": args.batch_size}
    meta["coefficient"] = args.coefficient
    vit = clip.hooked_vit()
    path = names.representations(args.dataset, args.split)
    shape = (len(images), vit.D)
    pieces = row_pieces(len(images), args.batch_size)
    with torch.inference_mode(), RowWriter({path: (shape, "float32")}, meta, pieces, args.overwrite) as writer:
        for number, row, pixels, _ in batches(images, writer.todo, args.num_workers, args.device):
            vectors = args.coefficient * torch.nn.functional.normalize(vit(pixels), dim=-1)
            writer.write(number, row, {path: vectors.cpu().numpy()})
    if not distributed.first():
        return
    save_array(names.classes(args.dataset, args.split), images.labels, data)
    print(f"wrote {path} {shape} and {names.classes(args.dataset, args.split)}")
    print(f"next: python compute_classifier_projection.py --dataset {args.dataset} {arguments.repeated_flags(args)}")


if __name__ == "__main__":
    parser = arguments.stage_parser(__doc__)
    arguments.add_model(parser)
    arguments.add_data(parser)
    arguments.add_compute(parser)
    arguments.add_precision(parser)
    arguments.add_directories(parser, reads=False, streams=True)
    arguments.add_coefficient(parser)
    arguments.run(main, parser, parallel=True)
