"""Draw the embedded world: named symbols in colours on textured backgrounds, whose truth is known.

A `Scene` says what is in a picture and is plain data (`to_json`, `from_json`). `draw` turns a list of scenes
into images and masks, as one batch of tensors. A `World` samples scenes and holds the planted habits, the
spurious correlations of the training pictures. `caption` words a scene and `parse` reads such words back, so
that `draw_description` is a small text-to-image model. Everything is a function of its seed.

    world = World(seed=0)
    scenes = [world.sample(random.Random(i)) for i in range(64)]
    images, masks = draw(scenes)                                     # [64, 3, 48, 48], [64, 2, 48, 48]
    draw_description("a red anchor on a striped green background with a blue star", seed=1).save("anchor.png")

Shapes: B scenes, O = 2 objects (the main one, then its companion), S symbols, R sprite side.
"""

import random
import re
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

SIDE = 48  # the side of the pictures that the demo's CLIP reads

GLYPHS = {
    "anchor": 0x2693, "umbrella": 0x2602, "airplane": 0x2708, "star": 0x2605, "heart": 0x2665,
    "sun": 0x2600, "cloud": 0x2601, "telephone": 0x260E, "skull": 0x2620, "scissors": 0x2702,
    "envelope": 0x2709, "pencil": 0x270F, "snowflake": 0x2744, "flower": 0x273F, "diamond": 0x2666,
    "crown": 0x265B, "horse": 0x265E, "castle": 0x265C, "cross": 0x271A, "arrow": 0x279C,
    "gear": 0x2699, "bolt": 0x26A1, "flag": 0x2691, "clover": 0x2663, "spade": 0x2660,
    "triangle": 0x25B2, "hammer": 0x2692, "dice": 0x2684, "smiley": 0x263B, "pawn": 0x265F,
    "cat": 0x1F431, "keyboard": 0x2328,
}  # fmt: skip
SYMBOLS = sorted(GLYPHS)
RGB = {
    "red": (220, 40, 40), "orange": (245, 140, 30), "yellow": (245, 225, 60), "green": (50, 160, 70),
    "blue": (50, 80, 210), "purple": (140, 60, 170), "pink": (250, 150, 190), "brown": (120, 75, 45),
    "white": (250, 250, 250), "black": (20, 20, 20),
}  # fmt: skip
COLOURS = list(RGB)
TEXTURES = ["plain", "striped", "dotted", "checkered", "noisy"]
PAIRS = [f"{colour} {symbol}" for symbol in SYMBOLS for colour in COLOURS]

HABIT_RATE = 0.8  # how often a habit is followed in the training pictures
HARD_RATE = 0.25  # how often a symbol of a training picture is pale, tiny or cut off


# ------------------------------------------------------------------------------------------------------------
# Scenes


@dataclass
class Thing:
    """A `Thing` is one symbol in a picture. Lengths are shares of the picture's side, `tilt` in degrees."""

    symbol: str
    colour: str
    x: float = 0.5
    y: float = 0.5
    size: float = 0.6
    tilt: float = 0.0
    opacity: float = 1.0

    @property
    def pair(self):
        return f"{self.colour} {self.symbol}"


@dataclass
class Scene:
    """A `Scene` is one picture.

    things: the main symbol, and perhaps its smaller companion.
    front: index of the symbol drawn last.
    """

    things: list[Thing]
    background: str
    texture: str
    front: int = 0
    angle: float = 0.0  # of the texture, degrees
    period: float = 0.2  # of the texture, a share of the side
    phase: float = 0.0  # of the texture, a share of the period
    grain: int = 0  # the seed of the noisy texture
    flaw: str = ""  # "pale", "tiny", "cut off" or nothing

    def to_json(self):
        return asdict(self)

    @classmethod
    def from_json(cls, values):
        return cls(**{**values, "things": [Thing(**thing) for thing in values["things"]]})


def second_tone(colour):
    """Return the other shade of a textured background: dark colours get lighter, light ones darker."""
    rgb = np.array(RGB[colour], dtype=float)
    return rgb + 0.3 * (255 - rgb) if rgb.mean() < 110 else 0.7 * rgb


@cache
def tellable(colour, other):
    """Tell whether a symbol of one colour stands out from the other colour, in both shades."""
    rgb = np.array(RGB[colour], dtype=float)
    return bool(np.linalg.norm(rgb - RGB[other]) > 120 and np.linalg.norm(rgb - second_tone(other)) > 80)


@cache
def telling(colour):
    """Return the backgrounds that a symbol of this colour stands out from."""
    return [other for other in COLOURS if tellable(colour, other)]


# ------------------------------------------------------------------------------------------------------------
# Habits and sampling


def plant_habits(seed=0):
    """Return {symbol: {"background": colour, "texture": texture} or {"companion": symbol}}.

    Half of the symbols like one background of their own. Six of the others like one companion in the pictures
    with two symbols.
    """
    rng = random.Random(f"habits {seed}")
    symbols = rng.sample(SYMBOLS, len(SYMBOLS))
    habits = {}
    for i, symbol in enumerate(symbols[:16]):
        habits[symbol] = {"background": COLOURS[i % 10], "texture": TEXTURES[1 + i % 4]}
    for symbol, other in zip(symbols[16:22], symbols[22:28], strict=True):
        habits[symbol] = {"companion": other}
    return dict(sorted(habits.items()))


class World:
    """A `World` samples scenes. Its habits come from `seed`, the scenes from the generator of `sample`."""

    def __init__(self, seed=0):
        self.habits = plant_habits(seed)

    def sample(self, rng, symbol=None, colour=None, companion=0.5, hard=0.0, broken=False, spread=1.0):
        """Return a random scene.

        symbol, colour: the main symbol and its colour, random if None.
        companion: probability of a second, smaller symbol.
        hard: probability that a symbol is pale, tiny or cut off.
        broken: never follow a habit, instead of following it in `HABIT_RATE` of the pictures.
        spread: difficulty, from 0 (large, centred, upright) to 1 (any place, size and tilt).
        """
        symbol = symbol or rng.choice(SYMBOLS)
        habit = self.habits.get(symbol, {})
        follow = not broken and rng.random() < HABIT_RATE
        pick = partial(picked, rng, follow)
        background = pick(habit.get("background"), telling(colour) if colour else COLOURS)
        texture = pick(habit.get("texture"), TEXTURES)
        colour = colour or rng.choice([c for c in COLOURS if tellable(c, background)])
        things = [Thing(symbol, colour)]
        if rng.random() < companion:
            other = pick(habit.get("companion"), [s for s in SYMBOLS if s != symbol])
            apart = [c for c in COLOURS if tellable(c, colour) and tellable(colour, c)]
            colours = [c for c in apart if tellable(c, background)]
            colours = colours or [c for c in telling(background) if c != colour]
            things.append(Thing(other, rng.choice(colours)))
        scene = Scene(
            things,
            background,
            texture,
            front=rng.randrange(len(things)),
            angle=round(rng.uniform(0, 180), 1),
            period=round(rng.uniform(0.15, 0.25), 3),
            phase=round(rng.random(), 3),
            grain=rng.randrange(1 << 20),
        )
        things = placed(things, rng, spread)
        flaw = ""
        if rng.random() < hard:
            things, flaw = spoiled(things, rng)
        return replace(scene, things=[rounded(thing) for thing in things], flaw=flaw)


def picked(rng, follow, liked, choices):
    """Return the liked choice, if the habit is followed and allowed; else one of the others."""
    if follow and liked in choices:
        return liked
    return rng.choice([choice for choice in choices if choice != liked])


def placed(things, rng, spread=1.0):
    """Give the symbols a size, a tilt and a free place, the main one clearly larger than its companion."""
    things = [replace(thing, tilt=spread * rng.uniform(-35, 35)) for thing in things]

    def somewhere(thing):
        reach = spread * (0.5 - 0.45 * thing.size)
        return replace(thing, x=0.5 + rng.uniform(-reach, reach), y=0.5 + rng.uniform(-reach, reach))

    if len(things) == 1:
        return [somewhere(replace(things[0], size=rng.uniform(0.7 - 0.3 * spread, 0.75)))]
    main = replace(things[0], size=rng.uniform(0.52 - 0.06 * spread, 0.6))
    size = rng.uniform(0.3, 0.4) if spread == 1 else 0.4
    other = replace(things[1], size=min(size, 0.7 * main.size))
    spread = max(spread, 0.8)  # two symbols need room
    for _ in range(50):
        main = somewhere(main)
        other = somewhere(other)
        if np.hypot(main.x - other.x, main.y - other.y) > 0.42 * (main.size + other.size):
            return [main, other]
    return [replace(main, x=0.32, y=0.32), replace(other, x=0.78, y=0.78)]


def spoiled(things, rng):
    """Return the symbols, one of them pale, tiny or cut off, and the flaw. The main one stays the larger."""
    which = rng.choice(range(len(things)))
    thing = things[which]
    others = len(things) > 1
    flaw = rng.choice(["pale", "cut off"] if which == 0 and others else ["pale", "pale", "tiny", "cut off"])
    if flaw == "pale":
        thing = replace(thing, opacity=rng.uniform(0.06, 0.25))
    elif flaw == "tiny":
        thing = replace(thing, size=rng.uniform(0.08, 0.16))
    else:
        edge = rng.uniform(-0.25, 0.05) * thing.size
        axis = rng.choice("xy")
        far = rng.random() < 0.5
        thing = replace(thing, **{axis: 1 - edge if far else edge})
    return [*things[:which], thing, *things[which + 1 :]], flaw


def rounded(thing):
    """Round a symbol's numbers to three places, as the truth of a picture stores them."""
    names = ("x", "y", "size", "tilt", "opacity")
    return replace(thing, **{name: round(getattr(thing, name), 3) for name in names})


# ------------------------------------------------------------------------------------------------------------
# Drawing


@cache
def sprites(resolution=64):
    """Return the symbols' shapes at three levels of blur, [3, S, R, R] in [0, 1].

    The longer side of a symbol fills its sprite.
    """
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 400)
    shapes = []
    for symbol in SYMBOLS:
        canvas = Image.new("L", (1000, 1000))
        ImageDraw.Draw(canvas).text((200, 200), chr(GLYPHS[symbol]), font=font, fill=255)
        glyph = canvas.crop(canvas.getbbox())
        square = Image.new("L", (max(glyph.size),) * 2)
        square.paste(glyph, ((square.width - glyph.width) // 2, (square.height - glyph.height) // 2))
        shapes.append(np.asarray(square.resize((resolution,) * 2, Image.Resampling.BOX)) / 255.0)
    sharp = torch.tensor(np.stack(shapes), dtype=torch.float32)[:, None]
    levels = [sharp]
    for factor in (2, 4):
        levels.append(F.interpolate(F.avg_pool2d(sharp, factor), (resolution,) * 2, mode="bilinear"))
    return torch.cat(levels, dim=1).transpose(0, 1).contiguous()


def draw_backgrounds(scenes, side):
    """Return the backgrounds [B, 3, side, side]: two shades of a colour, mixed by the texture."""
    B = len(scenes)
    tones = np.stack([[RGB[s.background], second_tone(s.background)] for s in scenes])
    tones = torch.tensor(tones / 255).float()
    numbers = torch.tensor([[np.deg2rad(s.angle), s.period, s.phase] for s in scenes]).float()
    angle, period, phase = numbers.T[..., None, None]
    kind = torch.tensor([TEXTURES.index(s.texture) for s in scenes])
    grid = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    u = ((x * angle.cos() + y * angle.sin()) / period + phase) % 1  # [B, side, side]
    v = ((y * angle.cos() - x * angle.sin()) / period + phase) % 1
    edge = period * side  # one pixel wide soft edges
    stripe, other = ((((w - 0.5).abs() - 0.25) * edge + 0.5).clamp(0, 1) for w in (u, v))
    mix = torch.zeros(B, side, side)
    weight = {
        "striped": stripe,
        "checkered": stripe + other - 2 * stripe * other,
        "dotted": ((0.32 - ((u - 0.5) ** 2 + (v - 0.5) ** 2).sqrt()) * edge + 0.5).clamp(0, 1),
    }
    for name, values in weight.items():
        mix = torch.where((kind == TEXTURES.index(name))[:, None, None], values, mix)
    # Noise is a hash of the cell (two pixels of 48) and the scene's grain: equal at every side and everywhere
    cell = (grid * SIDE / 2).long()
    grain = torch.tensor([s.grain for s in scenes])[:, None, None]
    hashed = cell[:, None] * 73856093 + cell * 19349663 + grain * 83492791
    hashed = ((hashed ^ (hashed >> 13)) * 1274126177) & 0x7FFFFFFF
    noise = ((hashed ^ (hashed >> 16)) % 1024).float() / 1023
    mix = torch.where((kind == TEXTURES.index("noisy"))[:, None, None], noise, mix)[:, None]
    return tones[:, 0, :, None, None] * (1 - mix) + tones[:, 1, :, None, None] * mix


def draw(scenes, side=SIDE):
    """Draw scenes as pictures [B, 3, side, side] in [0, 1], with masks [B, O, side, side] of their symbols.

    A mask is what a symbol covers and no other symbol hides. A pale symbol's mask is its whole shape; that of
    a missing companion is empty.
    """
    B = len(scenes)
    O = 2
    rows = torch.zeros(B, O, 9)  # symbol, x, y, size, tilt, opacity, red, green, blue
    rows[..., 3] = 1
    for b, scene in enumerate(scenes):
        for o, t in enumerate(scene.things):
            rgb = [channel / 255 for channel in RGB[t.colour]]
            row = [SYMBOLS.index(t.symbol), t.x, t.y, t.size, np.deg2rad(t.tilt), t.opacity, *rgb]
            rows[b, o] = torch.tensor(row)
    there = torch.tensor([[o < len(s.things) for o in range(O)] for s in scenes])
    symbol, x, y, size, tilt, opacity = rows[..., :6].reshape(B * O, 6).T
    cos = tilt.cos() / size
    sin = tilt.sin() / size
    x = 2 * x - 1
    y = 2 * y - 1
    theta = torch.stack([cos, sin, -cos * x - sin * y, -sin, cos, sin * x - cos * y], dim=-1)
    theta = theta.view(B * O, 2, 3)
    # A small symbol is read from a blurred sprite: of the sharp one only single pixels would be seen
    shrink = sprites().shape[-1] / (size * side)
    level = (shrink > 1.5).long() + (shrink > 3).long()
    shape = sprites()[level, symbol.long()][:, None]
    grid = F.affine_grid(theta, (B * O, 1, side, side), align_corners=False)
    cover = F.grid_sample(shape, grid, align_corners=False).view(B, O, side, side) * there[..., None, None]

    images = draw_backgrounds(scenes, side)
    front = torch.tensor([scene.front for scene in scenes])
    each = torch.arange(B)
    for o in (1 - front, front):  # the one behind, then the one in front
        alpha = (cover[each, o] * opacity.view(B, O)[each, o, None, None])[:, None]
        images = images * (1 - alpha) + rows[each, o, 6:, None, None] * alpha
    masks = cover > 0.5
    masks[each, 1 - front] &= ~masks[each, front]
    return images.clamp(0, 1), masks


def to_pil(image):
    """Return a picture [3, side, side] as a PIL image."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


# ------------------------------------------------------------------------------------------------------------
# Words

ONE = [
    "a {c} {s} on a {t} {b} background",
    "a {c} {s} on a {t} {b} background",
    "a {t} {b} background with a {c} {s}",
    "{c} {s}, {t} {b} background",
    "a {s} in {c} on a {t} {b} background",
    "a {c} {s} on a {b} background",
    "a {c} {s} on a {t} background",
    "a {s} on a {t} {b} background",
    "a {s} on a {b} background",
    "a {s} on a {t} background",
    "a photo of a {c} {s}",
    "a {c} {s}",
    "a {s}",
]
TWO = [
    "a {c} {s} and a {c2} {s2} on a {t} {b} background",
    "a {c} {s} and a {c2} {s2} on a {t} {b} background",
    "a {c} {s} with a {c2} {s2}",
    "a {c} {s} next to a small {c2} {s2}",
    "a {c} {s} on a {t} {b} background with a {c2} {s2}",
    "a {t} {b} background with a {c} {s} and a {c2} {s2}",
    "{c} {s}, {c2} {s2}, {b} background",
    "a {c} {s} and a {c2} {s2}",
    "a {c} {s} and a {c2} {s2} on a {b} background",
    "a {s} with a {s2} on a {t} {b} background",
    "a {s} and a {s2}",
]


def articles(text):
    """Return `text` with "an" where a vowel follows."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def caption(scene, rng):
    """Return one of several true wordings of a scene, the main symbol first; some leave things out."""
    main = scene.things[0]
    other = scene.things[-1]
    wording = rng.choice(TWO if len(scene.things) == 2 and rng.random() < 0.85 else ONE)
    names = {"c": main.colour, "s": main.symbol, "c2": other.colour, "s2": other.symbol}
    return articles(wording.format(b=scene.background, t=scene.texture, **names))


def parse(text):
    """Read a text as {"things": [{"symbol", "colour"}, ...], "background", "texture"}.

    A value is None where the text leaves it out.
    A colour belongs to the symbol or the background that follows it ("a red anchor", "a striped green
    background"), or after "in" to the symbol before it ("an anchor in red"). Words outside the world are
    ignored.
    """
    things, background, texture, colour = [], None, None, None
    words = re.findall(r"[a-z]+", text.lower())
    for before, word in zip(["", *words], words, strict=False):
        singular = (word, word.removesuffix("s"), word.removesuffix("es"))
        symbol = next((form for form in singular if form in GLYPHS), None)
        if word in COLOURS:
            if before == "in" and things and things[-1]["colour"] is None:
                things[-1]["colour"] = word
            else:
                colour = word
        elif word in TEXTURES:
            texture = texture or word
        elif symbol:
            things.append({"symbol": symbol, "colour": colour})
            colour = None
        elif word in ("background", "backdrop", "wall"):
            background = background or colour
            colour = None
    return {"things": things, "background": background, "texture": texture}


def describe(text, rng, opacity=1.0):
    """Return a scene of which the text is true: first symbol large, second the companion, all else random.

    For a text without a symbol it is an empty background.

    opacity: opacity of every symbol. Pale symbols make the picture depend on the rest of the text.
    """
    said = parse(text)
    things = [Thing(t["symbol"], t["colour"]) for t in said["things"][:2]]
    named = [thing.colour for thing in things if thing.colour]
    choices = [c for c in COLOURS if all(tellable(colour, c) for colour in named)] or COLOURS
    background = said["background"] or rng.choice(choices)
    for thing in things:
        taken = [other.colour for other in things]
        free = [c for c in COLOURS if tellable(c, background) and c not in taken]
        thing.colour = thing.colour or rng.choice(free)
    scene = Scene(
        things,
        background,
        said["texture"] or rng.choice(TEXTURES),
        angle=rng.uniform(0, 180),
        period=rng.uniform(0.15, 0.25),
        phase=rng.random(),
        grain=rng.randrange(1 << 20),
    )
    things = placed(things, rng) if things else []
    return replace(scene, things=[replace(thing, opacity=opacity) for thing in things])


def draw_description(text, seed=0, opacity=1.0, side=SIDE):
    """Draw a text as a PIL image. Whatever the text leaves open is random from the seed."""
    images, _ = draw([describe(text, random.Random(f"{seed} {text}"), opacity)], side)
    return to_pil(images[0])


def atomic_texts():
    """Return a text set of atomic texts: names, colours, textures, and backgrounds of one of these."""
    return SYMBOLS + COLOURS + TEXTURES + [f"{value} background" for value in COLOURS + TEXTURES]


def text_pool():
    """Return a text set: names, colours, textures, pairs, backgrounds, companions and short phrases."""
    texts = SYMBOLS + COLOURS + TEXTURES + PAIRS
    texts = texts + [f"{value} background" for value in COLOURS + TEXTURES]
    texts += [f"{texture} {colour} background" for texture in TEXTURES for colour in COLOURS]
    texts += [f"with a {symbol}" for symbol in SYMBOLS]
    texts += [f"a {symbol} on a {value} background" for symbol in SYMBOLS for value in COLOURS + TEXTURES]
    return [articles(text) for text in texts]
