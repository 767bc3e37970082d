"""Train the world's own dictionaries: top-k units of the small CLIP's residual stream and MLP, on a CPU.

    python -m demo.train_sae [--output_dir demo] [--random_decoder]

Writes DIR/symbols-sae-resid.safetensors and symbols-sae-mlp.safetensors, in our own format (docs/units.md)
and in 16 bits: 2,048 units each of what layer 4 writes, of which 16 act on a token. Both are trained in one
pass over drawn pictures, each of which is seen once; about four minutes on one core. With --random_decoder
their control, symbols-sae-resid-frozen.safetensors: decoder rows stay random directions, and all else of the
residual stream's dictionary is trained as ever.

    f = topk(relu((x - b_dec) W_enc + b_enc))     x^ = f W_dec + b_dec     loss = |x - x^|^2 / |x - mean x|^2

Decoder rows start as differences of tokens from the mean, and keep norm 1. Units that do not act any more are
left alone: started again they act rarely and mean little.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from demo.layout import GRADED, HERE, MODEL, WEIGHTS
from demo.world import HARD_RATE, World, draw, to_pil
from utils.model.clip import load_clip
from utils.model.dictionaries import Dictionary
from utils.model.dictionary_files import save_dictionary

LAYER = GRADED
SITES = {"resid": "resid.post", "mlp": "mlp.out"}
PICTURES = 32  # of a step
TOKENS = 32  # of each of them
START = 0.2  # norm of an encoder row: many units that are alike act at first
FIRST = 1024  # pictures that means and first decoders are taken from


class Autoencoder:
    """An Autoencoder is a top-k dictionary in training.

    x: tokens [n, d], from which it starts.
    units, k: how many there are, and how many act on a token.
    lr: of Adam.
    frozen: whether decoder rows stay random directions.
    """

    def __init__(self, x, units, k, lr, frozen=False):
        self.k = k
        self.bias = x.mean(dim=0).requires_grad_()
        self.variance = float((x - x.mean(dim=0)).square().sum(dim=1).mean())
        if frozen:
            rows = normalize(torch.randn(units, x.shape[1]), dim=1)
        else:
            chosen = torch.randperm(len(x))[:units]
            rows = normalize((x[chosen] - self.bias).detach(), dim=1)
        self.decoder = rows.clone().requires_grad_(not frozen)
        self.encoder = (START * rows).requires_grad_()
        self.encoder_bias = torch.zeros(units, requires_grad=True)
        weights = [self.encoder, self.encoder_bias, self.decoder, self.bias]
        learned = [weight for weight in weights if weight.requires_grad]
        self.adam = torch.optim.Adam(learned, lr=lr, betas=(0.9, 0.99))

    def step(self, x):
        """Learn from tokens x [n, d]; return the share of the variance that is lost."""
        before = (x - self.bias) @ self.encoder.T + self.encoder_bias
        values, places = before.topk(self.k, dim=1)
        values = values.relu()
        f = torch.zeros_like(before).scatter(1, places, values)
        error = x - f @ self.decoder - self.bias
        loss = error.square().sum(dim=1).mean() / self.variance
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        with torch.no_grad():
            self.decoder.copy_(normalize(self.decoder, dim=1))
        return float(loss.detach())

    def dictionary(self, site, fingerprint):
        """Return the `Dictionary` in 16 bits."""
        weights = (self.encoder, self.encoder_bias, self.decoder, self.bias)
        found = Dictionary(*(tensor.detach().half() for tensor in weights), site, LAYER)
        found.activation = "topk"
        found.k = self.k
        found.input_bias = found.decoder_bias
        found.fingerprint = fingerprint
        return found


def tokens(clip, world, rng, pictures):
    """Return what the layer writes on newly drawn pictures, {name: [n, d]}."""
    scenes = [world.sample(rng, hard=HARD_RATE) for _ in range(pictures)]
    pixels = torch.stack([clip.transform(to_pil(image)) for image in draw(scenes)[0]])
    names = {"resid": f"blocks.{LAYER + 1}.resid.pre", "mlp": f"blocks.{LAYER}.mlp.out"}
    with torch.inference_mode(), clip.vit.record(*names.values()) as cache:
        clip.vit(pixels)
    chosen = torch.rand(pictures, clip.vit.T).argsort(dim=1)[:, :TOKENS]
    each = torch.arange(pictures)[:, None]
    return {short: cache[name][each, chosen].flatten(0, 1).clone() for short, name in names.items()}


def train(args):
    """Train the dictionaries; return {name: Dictionary} and {name: share of variance lost at the end}."""
    torch.manual_seed(args.seed)
    clip = load_clip(MODEL, WEIGHTS, "cpu", image_only=True)
    rng = random.Random(f"dictionaries {args.seed}")
    world = World()
    first = tokens(clip, world, rng, FIRST)
    frozen = args.random_decoder
    sizes = (args.units, args.k, args.lr)
    sites = {"resid": SITES["resid"]} if frozen else SITES
    found = {name: Autoencoder(first[name].clone(), *sizes, frozen) for name in sites}
    steps = args.pictures // PICTURES
    lost = dict.fromkeys(found, 1.0)
    with tqdm(range(steps), desc="dictionaries", unit="step") as bar:
        for step in bar:
            x = tokens(clip, world, rng, PICTURES)
            for name, of in found.items():
                for group in of.adam.param_groups:
                    group["lr"] = args.lr * min(1, 3 * (1 - step / steps))
                lost[name] += 0.05 * (of.step(x[name].clone()) - lost[name])
            bar.set_postfix({name: f"{1 - value:.3f}" for name, value in lost.items()})
    return {name: of.dictionary(SITES[name], clip.fingerprint) for name, of in found.items()}, lost


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--output_dir", type=Path, default=HERE)
    parser.add_argument("--random_decoder", action="store_true", help="train the control instead")
    parser.add_argument("--pictures", type=int, default=38_400)
    parser.add_argument("--units", type=int, default=2048)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.time()
    found, lost = train(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, dictionary in found.items():
        name_of = f"{name}-frozen" if args.random_decoder else name
        path = args.output_dir / f"symbols-sae-{name_of}.safetensors"
        save_dictionary(path, dictionary)
        print(f"wrote {path}: rebuilds {100 * (1 - lost[name]):.1f} % of the variance")
    print(f"{time.time() - began:.0f} seconds")


if __name__ == "__main__":
    main()
