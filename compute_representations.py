"""Representations of all images of a data set: the first stage.

    python compute_representations.py --model ViT-B-32 --pretrained openai --dataset imagenet --data_path PATH --split val

Writes  DATASET_SPLIT_representations_MODEL_PRETRAINED.npy  [images, D], 100 times the unit representation
        DATASET_SPLIT_classes.npy                           [images], int64 labels
"""

import torch

from utils import arguments
from utils.artifacts import Names, RowWriter, save_array
from utils.clip import load_clip
from utils.datasets import batches, load_images


def main(args):
    names = Names(args.output_dir, args.model, args.pretrained)
    clip = load_clip(args.model, args.pretrained, args.device)
    images = load_images(args.dataset, args.data_path, args.split, clip.transform, args.subsample)
    data = {"dataset": args.dataset, "split": args.split, "data": images.fingerprint()}
    meta = {**arguments.clip_record(args), "fingerprint": clip.fingerprint, **data, "batch_size": args.batch_size}
    meta["coefficient"] = args.coefficient
    path = names.representations(args.dataset, args.split)
    shape = (len(images), clip.hooked_vit().D)
    with torch.inference_mode(), RowWriter({path: (shape, "float32")}, meta, args.overwrite) as writer:
        for row, pixels, _ in batches(images, args.batch_size, args.num_workers, writer.start, args.device):
            vectors = clip.model.encode_image(pixels, normalize=True) * args.coefficient
            writer.write(row, {path: vectors.float().cpu().numpy()})
    save_array(names.classes(args.dataset, args.split), images.labels, data)
    print(f"wrote {path} {shape} and {names.classes(args.dataset, args.split)}")
    print(f"next: python compute_classifier_projection.py --dataset {args.dataset} {arguments.repeated_flags(args)}")


if __name__ == "__main__":
    parser = arguments.stage_parser(__doc__)
    arguments.add_model(parser)
    arguments.add_data(parser)
    arguments.add_compute(parser)
    arguments.add_directories(parser, reads=False, streams=True)
    arguments.add_coefficient(parser)
    arguments.run(main, parser)
