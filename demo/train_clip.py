"""Train the demo's small CLIP on the embedded world, from scratch, on a CPU.

    python -m demo.train_clip --work_dir runs/clip    # after an interruption the same command resumes
    python -m demo.train_clip --evaluate              # zero-shot accuracies of the repository's checkpoint

The pictures are drawn as they are needed, each is seen once. What is special:
  1. Linear heads on the representation name the symbols, colours, pairs and the background. Linear heads on
     the patch tokens before the last block name what lies on each patch. Contrastive training alone learns
     almost nothing within this many pictures. The heads are thrown away at the end.
  2. Symbols start large, centred and upright, and widen to any place, size and tilt (the curriculum).
  3. In a share of the pictures (`--forget`) the class token forgets, after a late layer, all that it
     has gathered.
  4. In a share of the pictures (`--quiet`) the class token passes by the MLPs. Left alone it does the work
     with its own MLPs, and those of the patch tokens hardly matter; so the patch tokens must carry what they
     see.
  5. After `--text_start` of the training the text tower joins, with captions (contrastively) and prompts of
     each attribute.
  6. Of two symbols the larger one is 0.65 of the target at first, and 0.9 once the text tower joins: with a
     narrow margin between the two an ablation easily swaps them.

Letters: B pictures, T patches, D the output width.
"""

import argparse
import json
import math
import os
import random
import time
from functools import cache
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.transforms import Normalize
from tqdm import tqdm

from demo.world import COLOURS, HARD_RATE, PAIRS, SYMBOLS, TEXTURES, World, articles, caption, draw, to_pil

HERE = Path(__file__).parent
DENSE_LAYER = 4  # the patch heads read its output: the last block's attention takes it to the class token
FORGET = [2, 3, 4]  # the layers after which the class token may forget what it has gathered
MAIN = (0.65, 0.9)  # the larger symbol's share in the target of two, before and after the text tower joins
BACKGROUNDS = [f"{texture} {colour}" for texture in TEXTURES for colour in COLOURS]
# Flags that must stay when a training is resumed
SETTINGS = ("pictures", "batch_size", "lr", "warmup", "widen", "forget", "quiet", "text_start", "seed")
SETTINGS += ("precision",)


# ------------------------------------------------------------------------------------------------------------
# What a batch should say


def batch_of(world, step, size, spread, two):
    """Return the scenes of a step, their captions and the generator after them.

    They depend on the step alone, so that a resumed training sees the same scenes.
    """
    rng = random.Random(f"train {step}")
    scenes = [world.sample(rng, companion=two, hard=HARD_RATE, spread=spread) for _ in range(size)]
    return scenes, [caption(scene, rng) for scene in scenes], rng


def targets_of(scenes, main):
    """Return the distributions over the classes of each attribute, {attribute: [B, classes]}.

    The row of a scene that lacks the attribute is zero.

    main: the main symbol's share in a picture with two.
    """
    classes = {
        "symbol": (SYMBOLS, lambda s: [t.symbol for t in s.things]),
        "colour": (COLOURS, lambda s: [t.colour for t in s.things]),
        "pair": (PAIRS, lambda s: [t.pair for t in s.things]),
        "background": (COLOURS, lambda s: [s.background]),
        "texture": (TEXTURES, lambda s: [s.texture]),
        "both": (BACKGROUNDS, lambda s: [f"{s.texture} {s.background}"]),
    }
    targets = {}
    for name, (names, values) in classes.items():
        targets[name] = torch.zeros(len(scenes), len(names))
        for row, scene in zip(targets[name], scenes, strict=True):
            present = values(scene)
            shares = (main, 1 - main) if len(present) == 2 else (1.0,) * len(present)
            for value, share in zip(present, shares, strict=True):
                row[names.index(value)] += share
    return targets


WEIGHTS = {"symbol": 1.0, "colour": 0.3, "pair": 1.5, "background": 0.4, "texture": 0.4, "both": 0.2}


def soft_cross_entropy(logits, target):
    """Return the cross entropy against distributions [B, classes], over the rows that have one."""
    rows = target.sum(dim=1)
    return -(target * logits.float().log_softmax(dim=1)).sum() / rows.sum().clamp(min=1)


def patch_targets(scenes, masks, patch):
    """Return what lies on each patch: the index of its symbol and that of its colour, two [B, T].

    The last class is the bare background; -100 (ignored) is a patch that a symbol only touches.
    """
    cover = F.avg_pool2d(masks.float(), patch).flatten(2)  # [B, O, T]
    share, which = cover.max(dim=1)
    found = []
    for names, value in ((SYMBOLS, "symbol"), (COLOURS, "colour")):
        index = torch.tensor([[names.index(getattr(t, value)) for t in (s.things * 2)[:2]] for s in scenes])
        target = index.gather(1, which)
        target[share < 0.12] = -100
        target[share == 0] = len(names)
        found.append(target)
    return found


class Heads(nn.Module):
    """`Heads` are the linear heads of the image tower, thrown away after the training."""

    def __init__(self, output, width):
        super().__init__()
        classes = {"symbol": 32, "colour": 10, "pair": 320, "background": 10, "texture": 5, "both": 50}
        self.attributes = nn.ModuleDict({name: nn.Linear(output, n) for name, n in classes.items()})
        self.patches = nn.ModuleList([nn.Linear(width, 33), nn.Linear(width, 11)])
        self.norm = nn.LayerNorm(width)

    def loss(self, image, tokens, targets, patch_target):
        """Return the loss of all heads: image [B, D] of unit norm, tokens [B, T, d]."""
        loss = 0
        for name, head in self.attributes.items():
            loss = loss + WEIGHTS[name] * soft_cross_entropy(head(8 * image), targets[name])
        tokens = self.norm(tokens)
        for head, target in zip(self.patches, patch_target, strict=True):
            loss = loss + 0.5 * F.cross_entropy(head(tokens).float().flatten(0, 1), target.flatten())
        return loss


def encode_image(visual, images, forget=None, quiet=None):
    """Return the unit representation [B, D] and the patch tokens [B, T, d] before the last block.

    forget: [B], the layers after which the pictures' class tokens are reset, -1 for never.
    quiet: [B], true where the class token passes by all MLPs.
    """
    x = visual._embeds(images)
    fresh = x[:, :1]
    for layer, block in enumerate(visual.transformer.resblocks):
        x = x + block.attention(block.ln_1(x))
        write = block.mlp(block.ln_2(x))
        if quiet is not None:
            write = torch.cat([write[:, :1] * ~quiet[:, None, None], write[:, 1:]], dim=1)
        x = x + write
        if forget is not None:
            x = torch.cat([torch.where((forget == layer)[:, None, None], fresh, x[:, :1]), x[:, 1:]], dim=1)
        if layer == DENSE_LAYER:
            tokens = x[:, 1:]
    pooled, _ = visual._pool(x)
    return F.normalize(pooled.float() @ visual.proj, dim=-1), tokens


# ------------------------------------------------------------------------------------------------------------
# Texts

TEMPLATES = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
PROMPTS = {
    "symbol": ["{}", "a {}"],
    "colour": ["{}", "something {}", "a {} symbol"],
    "pair": ["{}", "a {}"],
    "background": ["{} background", "a {} background", "on a {} background"],
    "texture": ["{}", "{} background", "a {} background", "on a {} background"],
    "both": ["{} background", "a {} background", "on a {} background"],
}
NAMES = {
    "symbol": SYMBOLS,
    "colour": COLOURS,
    "pair": PAIRS,
    "background": COLOURS,
    "texture": TEXTURES,
    "both": BACKGROUNDS,
}


TOKENIZER = open_clip.SimpleTokenizer(context_length=16)


@cache
def tokens_of(text):
    return TOKENIZER(text)[0]


def text_loss(model, image, captions, targets, rng):
    """Return the loss of the captions (contrastive, equal captions are positives) and of all prompts."""
    texts = list(captions)
    parts = {}
    for name, wordings in PROMPTS.items():
        wording = rng.choice(wordings)
        if name in ("symbol", "pair") and rng.random() < 0.6:
            wording = rng.choice(TEMPLATES)  # zero-shot classifiers average over these
        columns = range(len(NAMES[name]))
        if name == "pair":  # those in the batch and some others: all 320 would cost as much as the pictures
            there = targets[name].sum(dim=0).nonzero().flatten().tolist()
            columns = sorted({*there, *rng.sample(columns, 64)})
        prompts = [wording.format(NAMES[name][column]) for column in columns]
        parts[name] = (slice(len(texts), len(texts) + len(prompts)), list(columns))
        texts += prompts if wording in TEMPLATES else map(articles, prompts)
    text = model.encode_text(torch.stack([tokens_of(t) for t in texts]), normalize=True)
    logits = model.logit_scale.exp() * image @ text.float().T  # [B, texts]
    contrast = logits[:, : len(captions)]
    same = torch.tensor([[a == b for b in captions] for a in captions]).float()
    same = same / same.sum(dim=1, keepdim=True)
    loss = 0.5 * (soft_cross_entropy(contrast, same) + soft_cross_entropy(contrast.T, same))
    for name, (span, columns) in parts.items():
        loss = loss + WEIGHTS[name] * soft_cross_entropy(logits[:, span], targets[name][:, columns])
    return loss


# ------------------------------------------------------------------------------------------------------------
# Training


def build(config):
    return open_clip.CLIP(**json.loads(Path(config).read_text()))


def groups(modules, lr):
    """Return parameter groups; biases, norms, embeddings and scalars have no weight decay."""
    named = [(name, p) for module in modules for name, p in module.named_parameters()]
    plain = [p for name, p in named if p.ndim < 2 or "embedding" in name]
    decayed = [p for name, p in named if not (p.ndim < 2 or "embedding" in name)]
    return [dict(params=decayed, weight_decay=0.05, peak=lr), dict(params=plain, weight_decay=0.0, peak=lr)]


class Training:
    """A `Training` is the model, the heads, the optimizers of both towers, and a checkpoint of all of them.

    args: the flags.
    """

    def __init__(self, args):
        torch.manual_seed(args.seed)
        torch.set_num_threads(args.threads)
        self.args = args
        self.world = World(args.seed)
        self.model = build(args.config)
        self.visual = self.model.visual
        self.size = self.visual.image_size[0]
        self.heads = Heads(self.visual.output_dim, self.visual.transformer.width)
        text = [module for name, module in self.model.named_children() if name != "visual"]
        loose = [self.model.positional_embedding, self.model.text_projection, self.model.logit_scale]
        loose = [dict(params=loose, weight_decay=0.0, peak=args.lr)]
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bfloat16")
        self.normalize = Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        of_towers = {
            "image": groups([self.visual, self.heads], args.lr),
            "text": groups(text, args.lr) + loose,
        }
        self.optimizers = {
            name: torch.optim.AdamW(parameters, betas=(0.9, 0.98), fused=True)
            for name, parameters in of_towers.items()
        }
        self.parts = {"model": self.model, "heads": self.heads, **self.optimizers}
        self.settings = {name: getattr(args, name) for name in SETTINGS}
        self.settings["config"] = Path(args.config).read_text()
        self.checkpoint = Path(args.work_dir) / "checkpoint.pt"
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        self.total = math.ceil(args.pictures / args.batch_size)

    def resume(self):
        """Load the checkpoint, if there is one, and return the step to start with."""
        if not self.checkpoint.exists():
            return 0
        saved = torch.load(self.checkpoint, weights_only=True)
        if saved.pop("settings", None) != self.settings:
            what = f"{self.checkpoint} is of a training with other flags"
            raise SystemExit(f"error: {what}; give another --work_dir, or delete it")
        start = saved.pop("step")
        for name, state in saved.items():
            self.parts[name].load_state_dict(state)
        return start

    def save(self, step):
        """Write the checkpoint."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({"settings": self.settings, "step": step, **states}, f"{self.checkpoint}.part")
        os.replace(f"{self.checkpoint}.part", self.checkpoint)

    def step(self, step):
        """Make one step of the towers that learn by now, and return the loss."""
        with_text = step / self.total >= self.args.text_start
        self.set_rates(step)
        loss = self.learn(step, with_text)
        for name, optimizer in self.optimizers.items():
            if name == "image" or with_text:
                torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
                optimizer.step()
            optimizer.zero_grad()
        self.model.logit_scale.data.clamp_(max=math.log(100))
        return loss

    def set_rates(self, step):
        """Set the learning rates; each tower has a cosine of its own."""
        since = step - self.args.text_start * self.total  # steps since the text tower joined
        progress = {"image": (step, step / self.total), "text": (since, since / (self.total - step + since))}
        for name, optimizer in self.optimizers.items():
            steps, share = progress[name]
            cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * max(0.0, share)))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1.0, max(0.0, (steps + 1) / self.args.warmup)) * cosine

    def learn(self, step, with_text):
        """Run the pictures of a step forwards and backwards, and return their loss.

        with_text: whether the text tower learns.
        """
        args = self.args
        spread = min(1.0, step / self.total / args.widen)
        two = 0.3 + 0.3 * spread
        scenes, captions, rng = batch_of(self.world, step, args.batch_size, spread=spread, two=two)
        images, masks = draw(scenes, self.size)
        targets = targets_of(scenes, MAIN[with_text])
        forget = torch.tensor([rng.choice(FORGET) if rng.random() < args.forget else -1 for _ in scenes])
        quiet = torch.tensor([rng.random() < args.quiet for _ in scenes])
        # torch's fused attention is slow backwards on a CPU: half of the step
        with self.autocast, sdpa_kernel(SDPBackend.MATH):
            image, tokens = encode_image(self.visual, self.normalize(images), forget, quiet)
            on_patches = patch_targets(scenes, masks, self.visual.patch_size[0])
            loss = self.heads.loss(image, tokens, targets, on_patches)
            if with_text:
                loss = loss + text_loss(self.model, image, captions, targets=targets, rng=rng)
            loss.backward()
        return loss.item()

    @torch.no_grad()
    def probe(self, n=256):
        """Return a line for the log: accuracies of the linear heads on clear pictures of full difficulty."""
        line = []
        for two in (0, 1):
            rng = random.Random(f"probe {two}")
            scenes = [self.world.sample(rng, companion=two) for _ in range(n)]
            with self.autocast:
                image, _ = encode_image(self.visual, self.normalize(draw(scenes, self.size)[0]))
                targets = targets_of(scenes, MAIN[1])
                for name in ("symbol", "pair") if two else ("symbol", "pair", "background", "texture"):
                    hit = self.heads.attributes[name](8 * image).argmax(dim=1) == targets[name].argmax(dim=1)
                    line.append(f"{name}{' of two' * two} {hit.float().mean():.3f}")
        return "  ".join(line)


def train(args):
    """Train until `--pictures` have been seen, and return the model and the losses of this call's steps."""
    training = Training(args)
    start = training.resume()
    losses = []
    saved_at = time.time()
    steps = range(start, training.total)
    progress = tqdm(steps, initial=start, total=training.total, desc="training", mininterval=10)
    for step in progress:
        losses.append(training.step(step))
        if (step + 1) % args.log_every == 0:
            recent = losses[-args.log_every :]
            average = sum(recent) / len(recent)
            progress.write(f"pictures {(step + 1) * args.batch_size}  loss {average:.3f}  {training.probe()}")
        if step + 1 == args.stop:
            training.save(args.stop)
            return training.model, losses
        if time.time() - saved_at > 150:
            training.save(step + 1)
            saved_at = time.time()
    training.save(training.total)
    return training.model, losses


def export(model, path):
    """Write the weights in 16 bits, by open_clip's names."""
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    state.pop("attn_mask", None)
    save_file(state, f"{path}.part")
    os.replace(f"{path}.part", path)


# ------------------------------------------------------------------------------------------------------------
# Evaluation


def load(config, checkpoint):
    """Load the model, its transform and its tokenizer as every stage of the project does."""
    open_clip.add_model_config(Path(config))
    name = Path(config).stem
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=str(checkpoint))
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


@torch.no_grad()
def evaluate(config, checkpoint, seed=0, n=1000):
    """Return zero-shot accuracies through open_clip on n new pictures of each kind, {what: accuracy}."""
    model, preprocess, tokenizer = load(config, checkpoint)
    world = World(seed)

    def classifier(names, templates):
        return open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)

    eighty = open_clip.OPENAI_IMAGENET_TEMPLATES
    classifiers = {
        "symbol": (SYMBOLS, classifier(SYMBOLS, eighty), lambda s: s.things[0].symbol),
        "pair": (PAIRS, classifier(PAIRS, eighty), lambda s: s.things[0].pair),
        "background colour": (COLOURS, classifier(COLOURS, ["a {} background"]), lambda s: s.background),
        "texture": (TEXTURES, classifier(TEXTURES, ["a {} background"]), lambda s: s.texture),
    }
    kinds = {
        "one symbol": dict(companion=0),
        "one symbol, habits broken": dict(companion=0, broken=True),
        "two symbols": dict(companion=1),
        "two symbols, habits broken": dict(companion=1, broken=True),
    }
    results = {}
    for kind, options in kinds.items():
        rng = random.Random(f"evaluate {kind}")
        scenes = [world.sample(rng, **options) for _ in range(n)]
        pictures = torch.stack([preprocess(to_pil(image)) for image in draw(scenes)[0]])
        image = torch.cat([model.encode_image(batch, normalize=True) for batch in pictures.split(250)])
        for what, (names, weights, truth) in classifiers.items():
            labels = torch.tensor([names.index(truth(s)) for s in scenes])
            right = (image @ weights).argmax(dim=1) == labels
            results[f"{what}: {kind}"] = right.float().mean().item()
    return results


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--work_dir", default="runs/clip", help="where the training's checkpoint lies")
    parser.add_argument("--config", default=HERE / "symbols-vit.json", help="open_clip model config")
    parser.add_argument("--output", default=HERE / "symbols-vit.safetensors", help="the trained weights")
    parser.add_argument("--pictures", type=int, default=720_000, help="pictures of the whole training")
    parser.add_argument("--batch_size", type=int, default=64, help="small batches learn more from a picture")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate, falls as a cosine")
    parser.add_argument("--warmup", type=int, default=300, help="steps until the peak, of each tower")
    help = "share of the training until full difficulty"
    parser.add_argument("--widen", type=float, default=0.26, help=help)
    parser.add_argument("--forget", type=float, default=0.4, help="share of the pictures of point 3")
    parser.add_argument("--quiet", type=float, default=0.4, help="share of the pictures of point 4")
    help = "share of the training without the text tower"
    parser.add_argument("--text_start", type=float, default=0.65, help=help)
    help = "of the forward pass; float32 is quicker on a CPU without units for bfloat16"
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help=help)
    parser.add_argument("--log_every", type=int, default=500, help="steps between two lines of the log")
    parser.add_argument("--stop", type=int, help="stop after this step, to resume later")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="of the habits, the weights and the pictures")
    parser.add_argument("--evaluate", action="store_true", help="only print the accuracies of --output")
    args = parser.parse_args()
    if not args.evaluate:
        model, _ = train(args)
        if args.stop:
            return
        export(model, args.output)
        print(f"wrote {args.output}")
    for what, accuracy in evaluate(args.config, args.output, args.seed).items():
        print(f"{what:48s} {100 * accuracy:5.1f}")


if __name__ == "__main__":
    main()
