"""Put any unit that writes into the residual stream in the place of neurons. Beyond the paper.

A unit u has a site of block m, an activation f[i, u] at every token and a vector w_u [d]. Its effect is that
of eq. 11 with f for p and w_u for w_n, but it is centred itself at every LayerNorm, so there is no share of
constants:

    C[k, u] = coefficient / (|rep| sigma_post)  sum_i  a_k[i] / sigma_l[i]  f[i, u]
    B[k, u] = (((w_u - mean w_u) * gamma_l) W_V W_O * gamma_post) P,    columns of gamma_post P centred
    x[i]    = sum_u f[i, u] w_u + b_dec + error[i]                        x: what the site adds to the stream

The decoder's bias and the error are two more units, so that the sum is complete. A neuron-head pair (k, n) is
a unit, too: C[k, n] B[k, n], exactly of rank one. Letters as in `utils.prs`; U units.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch

from utils.first_order import centred_output
from utils.model.attention import double
from utils.model.dictionaries import SITES, random_dictionary
from utils.model.dictionary_files import read_dictionary
from utils.norms import groups_of_layers
from utils.prs import COEFFICIENT, effect, fold, fold_layers
from utils.runtime.errors import UserError
from utils.runtime.layers import parse_layers
from utils.runtime.passes import walk
from utils.runtime.records import NEURONS
from utils.runtime.results import PAIRS, RANDOM, unit_set

GUARD_IMAGES = 256  # on which the share of the variance that units rebuild is measured
LEAST = 0.5  # of it, below which something does not fit
ENCODED = 2**24  # activations that are computed together
ACTS = 20  # images on which a unit must act, at least, to be graded


class Writers:
    """Writers are units of one layer, other than its neurons, as `utils.prs.fold` and `effect` take.

    layer: number of the block that they write in.
    vectors: w, [U, d]; they are centred as they are folded.
    recorded: names of the activations that `activations` is given.
    compute: a function from {name: tensor} of these to f [B, T, U].

    Attribute: acts, whether units have activations of their own.
    """

    acts = True

    def __init__(self, layer, vectors, recorded, compute):
        self.layer = layer
        self.vectors = vectors
        self.recorded = list(dict.fromkeys(recorded))
        self.compute = compute

    @property
    def count(self):
        """The count is U."""
        return len(self.vectors)

    @property
    def added(self):
        """The name of the activation that is added to the stream with what the units write."""
        return f"blocks.{self.layer}.mlp.out"

    def centred(self):
        """Return the vectors without their means, float64 [U, d]."""
        wide = double(self.vectors)
        return wide - wide.mean(dim=1, keepdim=True)

    def activations(self, cache):
        """Return f, [B, T, U]. cache: {name: tensor} of `recorded`."""
        return self.compute(cache)

    def arranged(self, C):
        """Return the coefficients of the units, [B, K, U], from sum_i a_k[i]/sigma_l[i] f[i, u]."""
        return C

    def fold(self, vit):
        """Return the units' `Directions`."""
        return fold(vit, self.layer, self)

    def stored(self, vit):
        """Return the `Directions` whose values and outputs are stored."""
        return self.fold(vit)

    def direct(self, vit):
        """Return w_u through the last norm and P, the direct effect (the logit lens), [U, D]."""
        return self.vectors.to(vit.device, vit.dtype) @ centred_output(vit)

    def sizes(self, vit):
        """Return {letter: size} of what differs from neurons."""
        return {"N": self.count}

    def names_of_sum(self):
        """Return the names of the activations that `activations` and `moved` need."""
        return [*self.recorded, f"blocks.{self.layer + 1}.resid.pre"]

    def moved(self, vit, cache, layer, b, written):
        """Return the residual streams after block `layer` if units write more, [n, T, d].

        Parameters as in `HookedViT.moved`. cache: of `names_of_sum`.
        """
        return cache[f"blocks.{layer + 1}.resid.pre"][b] + written


class HeadPairs(Writers):
    """`HeadPairs` are a layer's neurons, each seen through one later head: unit k N + n is n through head k.

    They share no constants either. Each has one coefficient, K = 1. Stored values are [1, K N, e] with the
    outputs [K, e, D] of all heads; `lines_of_pairs` are B itself.
    """

    acts = False

    def __init__(self, vit, layer):
        name = f"blocks.{layer}.mlp.post"
        super().__init__(layer, None, [name], lambda cache: cache[name])
        self.heads = vit.K(layer)
        self.neurons = vit.N

    @property
    def count(self):
        return self.heads * self.neurons

    def arranged(self, C):
        return C.flatten(1)[:, None]  # [B, 1, K N]

    def fold(self, vit):
        found = self.stored(vit)
        values, outputs = lines_of_pairs(found.values, found.outputs)
        return found._replace(values=values, outputs=outputs)

    def stored(self, vit):
        found = fold(vit, self.layer)
        return found._replace(values=found.values.flatten(0, 1)[None], constants=None, units=self)

    def sizes(self, vit):
        return {"N": self.count, "K": 1}


def lines_of_pairs(values, outputs):
    """Return B of neuron-head pairs as values [1, K N, D], with outputs [1, D, D] that change nothing.

    values, outputs: as they are stored, [1, K N, e] and [K, e, D].
    """
    heads, e, D = outputs.shape
    B = torch.bmm(values.view(heads, -1, e), outputs)
    return B.flatten(0, 1)[None], torch.eye(D).to(B)[None]


class Site(NamedTuple):
    """A Site is where a dictionary's units write, in a tower."""

    name: str  # of what the units add up to, as `HookedViT.record` knows it
    read: str  # of what their activations are computed from
    prefix: int  # tokens before the patches


def site_of(vit, dictionary):
    """Return the `Site` of a dictionary in a tower. Raises UserError for a tower that has none."""
    layer = dictionary.layer
    names = {"mlp.out": f"blocks.{layer}.mlp.out", "attn.out": f"blocks.{layer}.attn.out"}
    name = names.get(dictionary.site, f"blocks.{layer + 1}.resid.pre")
    read = f"blocks.{layer}.mlp.in" if dictionary.reads == "mlp.in" else name
    if vit.post_norm or vit.pooling.one_layer or not {name, read} <= set(vit.names):
        what = f"this model's tower has no {dictionary.site} of layer {layer} before a LayerNorm"
        raise UserError(f"{what}; a dictionary is for a pre-norm ViT, --units pairs for any tower")
    if dictionary.tokens == "class" and not vit.prefix:
        raise UserError("the dictionary is of class tokens, and this model's tower has none; use another")
    return Site(name, read, vit.prefix)


class Features(Writers):
    """`Features` are the units of a `Dictionary`.

    A norm of the dictionary is undone at every token by a factor, which belongs to f here.
    """

    def __init__(self, vit, dictionary):
        self.dictionary = dictionary.to(vit.device, vit.dtype)
        self.site = site_of(vit, dictionary)
        super().__init__(dictionary.layer, dictionary.decoder, [self.site.read], self.of_cache)

    def acting(self, f):
        """Put f [B, T, ...] at 0 where the dictionary's units do not act, in place; return it."""
        if self.dictionary.tokens == "class":
            f[:, 1:] = 0
        elif self.dictionary.tokens == "patches":
            f[:, : self.site.prefix] = 0
        return f

    def of_cache(self, cache):
        """Return f, [B, T, U], some images at a time: what the encoder computes before is as large."""
        x = cache[self.site.read]
        f = x.new_empty(*x.shape[:2], self.count)
        together = max(1, ENCODED // (x.shape[1] * self.count))
        for own, some in zip(f.split(together), x.split(together), strict=True):
            own.copy_(self.dictionary.encode(some))
        factor = self.dictionary.factor(x)
        return self.acting(f if factor is None else f.mul_(factor))

    @property
    def added(self):
        return f"blocks.{self.layer}.{'attn' if self.dictionary.site == 'attn.out' else 'mlp'}.out"

    def names_of_sum(self):
        names = super().names_of_sum()
        if self.dictionary.site == "attn.out":
            names += [f"blocks.{self.layer}.resid.pre", f"blocks.{self.layer}.attn.out"]
        return names

    def moved(self, vit, cache, layer, b, written):
        z = super().moved(vit, cache, layer, b, written)
        if self.dictionary.site != "attn.out":
            return z
        middle = (cache[f"blocks.{layer}.resid.pre"] + cache[f"blocks.{layer}.attn.out"])[b]
        return z + vit.mlp(layer, middle + written) - vit.mlp(layer, middle)  # which reads the attention

    def rest(self):
        """Return {"bias", "error", "site"}: `Writers` of the decoder's bias, the error, and the site.

        The cache must have `error` under that name.
        """
        d = self.dictionary.decoder_bias
        basis = torch.eye(len(d), dtype=d.dtype, device=d.device)
        return {
            "bias": Writers(self.layer, d[None], [self.site.read], self._bias),
            "error": Writers(self.layer, basis, ["error"], lambda cache: cache["error"]),
            "site": Writers(self.layer, basis, [self.site.name], lambda cache: cache[self.site.name]),
        }

    def _bias(self, cache):
        x = cache[self.site.read]
        factor = self.dictionary.factor(x)
        return self.acting(torch.ones_like(x[..., :1]) if factor is None else factor)

    def error(self, cache, f):
        """Return what the units and the bias do not rebuild of the site, [B, T, d]. f: of `of_cache`."""
        error = cache[self.site.name] - f @ self.dictionary.decoder
        error -= self._bias(cache) * self.dictionary.decoder_bias
        if self.dictionary.norm == "layer_norm":
            error -= cache[self.site.read].mean(dim=-1, keepdim=True)
        return error


class UnitSet:
    """A UnitSet is what --units names, in a loaded tower.

    name: in the names of files.
    digest: of everything that the units are made of.
    units: {layer: Writers}.
    """

    def __init__(self, name, digest, units):
        self.name = name
        self.digest = digest
        self.units = units

    @property
    def act(self):
        """act is whether the units have activations of their own."""
        return all(units.acts for units in self.units.values())

    def site(self, layer):
        """Return what the units of a layer write, in words."""
        dictionary = getattr(self.units[layer], "dictionary", None)
        return "mlp.out, through one head" if dictionary is None else dictionary.site

    def fold(self, vit, layers):
        """Return the `Directions` of some layers."""
        return [self.units[layer].fold(vit) for layer in layers]

    def stored(self, vit, layers):
        """Return the `Directions` of some layers whose values and outputs are stored."""
        return [self.units[layer].stored(vit) for layer in layers]

    def sizes(self, vit, layer=None):
        """Return {letter: size} of what differs from neurons, of one layer or of all."""
        layers = list(self.units) if layer is None else [layer]
        return self.units[layers[0]].sizes(vit) if len(layers) == 1 else {}


def fold_units(clip, layers):
    """Return the `Directions` of some layers of what a `Clip` looks at: neurons, or other units."""
    return fold_layers(clip.vit, layers) if clip.units is None else clip.units.fold(clip.vit, layers)


def stored_weights(clip, layers):
    """Return the `Directions` of some layers whose values and outputs are stored with all effects."""
    return fold_layers(clip.vit, layers) if clip.units is None else clip.units.stored(clip.vit, layers)


def groups_of(clip, layers, memory):
    """Divide layers into lists that share one pass over the images; other units than neurons do not."""
    return groups_of_layers(clip.vit, layers, memory) if clip.units is None else [[of] for of in layers]


def fires_at(vit, phi, images, units):
    """Return how much some units fire at the patches of some images of a batch, [n, patches].

    A pair fires where its neuron does.

    phi: `SecondOrder`.
    images, units: of every map, int64 [n]; or all images, as a slice, and one unit.
    """
    p = phi.p[images, vit.prefix :, units % phi.p.shape[2]]
    of = phi.directions.units
    return p if of is not None and of.acts else vit.firing(p)


def count_units(clip, layer):
    """Return how many units of a layer are looked at, in words."""
    count = clip.vit.N if clip.units is None else clip.units.units[layer].count
    return f"{count} {kind_of(clip)}"


def name_of(clip, layer, n):
    """Return the name of a neuron, or another unit, of a layer; that of a pair has its neuron and head."""
    if clip.units is None:
        return f"neuron {n}"
    if clip.units.act:
        return f"unit {n} of {clip.units.name}"
    later = clip.vit.later(layer)
    k, neuron = divmod(n, clip.vit.N)
    place, head = divmod(k, clip.vit.K(layer) // len(later))
    of = f"layer {later[place]}" if later[place] < clip.vit.L else "pooling attention"
    return f"pair {n}: neuron {neuron} through {of}, head {head}"


def word_of(clip):
    """Return the word for one of what a `Clip` looks at: neuron, unit or pair."""
    if clip.units is None:
        return "neuron"
    return "pair" if clip.units.name == PAIRS else "unit"


def kind_of(clip):
    """Return what a `Clip` looks at, in words."""
    if clip.units is None:
        return "neurons"
    return "neuron-head pairs" if clip.units.name == PAIRS else f"units of {clip.units.name}"


class Rest:
    """A Rest says what a dictionary's units leave of their site, over batches of images.

    vit: HookedViT. units: `Features`.

    Attributes, after some `effects`: images, how many; acting, units that act, over all tokens; and parts,
    {"units", "bias", "error", "direct"}: sums over images of the norms of effects, over the norm of the
    site's effect (of "direct", the part that needs no attention, over the representation's norm).
    """

    def __init__(self, vit, units):
        self.vit = vit
        self.units = units
        self.folded = {name: part.fold(vit) for name, part in units.rest().items()}
        self.images = 0
        self.sums = self.squares = self.lost = 0
        self.acting = 0
        self.parts = {}
        self.output = centred_output(vit) if vit.pooling.has_first_order else None

    @torch.inference_mode()
    def effects(self, pixels, coefficient=COEFFICIENT):
        """Return {"bias", "error", "site"}: effects [B, D] of one batch, and add to the sums.

        What the site's effect has besides bias and error is the units' sum.
        """
        site = self.units.site
        first = self.units.layer + 1
        with self.vit.record(*self.vit.names_from(first), site.name, site.read) as cache:
            representation = self.vit(pixels)
        self.vit.read_rows(cache)
        scale = coefficient / representation.norm(dim=-1)
        f = self.units.of_cache(cache)
        self.acting += int(f.count_nonzero())
        cache["error"] = self.units.error(cache, f)
        found = {}
        for name, item in self.folded.items():
            found[name] = effect(self.vit, dict(cache), item, scale).sum()
        self._add(cache, found, scale)
        return found

    def _add(self, cache, found, scale):
        """Add a batch to the sums. found: {name: effects [B, D]}. scale: [B]."""
        x = self.units.acting(cache[self.units.site.name].clone()).double()
        lost = self.units.acting(cache["error"].clone()).double()
        self.images += len(x)
        self.sums = self.sums + x.sum(dim=(0, 1))
        self.squares += float(x.square().sum())
        self.lost += float(lost.square().sum())
        size = found["site"].norm(dim=-1).clamp_min(1e-30)
        effects = {"units": found["site"] - found["bias"] - found["error"], **found}
        shares = {name: effects[name].norm(dim=-1) / size for name in ("units", "bias", "error")}
        if self.output is not None:
            direct = self.vit.pool(cache[self.units.site.name], cache) @ self.output
            shares["direct"] = (direct / cache["ln_post.std"][:, None]).norm(dim=-1) * scale / COEFFICIENT
        for name, share in shares.items():
            self.parts[name] = self.parts.get(name, 0.0) + float(share.sum())

    def tokens(self):
        """Return the number of tokens at which the units act, over all images."""
        prefix = self.units.site.prefix
        counts = {"all": self.vit.T, "class": 1, "patches": self.vit.T - prefix}
        return self.images * counts[self.units.dictionary.tokens]

    def rebuilt(self):
        """Return the share of the site's variance, over tokens and images, that units and bias rebuild."""
        variance = self.squares - float(self.sums.square().sum()) / self.tokens()
        return 1 - self.lost / max(variance, 1e-30)


def check_rebuilding(clip, split, path):
    """Print what share of their site the units of a `Clip` rebuild, on the first images of a `Split`.

    path: of the dictionary, for messages. Nothing is said of pairs and neurons.

    Raises UserError, with the likely reasons, where it is less than half.
    """
    found = clip.units and list(clip.units.units.values())[0]
    if not isinstance(found, Features):
        return
    rest = Rest(clip.vit, found)
    pieces = [piece for piece in split.pieces if piece.start < GUARD_IMAGES]
    for _, pixels in walk(pieces, split.pieces.load, "rebuilding"):
        rest.effects(pixels)
    dictionary = found.dictionary
    site = f"{dictionary.site} of layer {dictionary.layer}"
    percent = f"{100 * rest.rebuilt():.1f} %"
    of = f"(first {rest.images} images)"
    print(
        f"{found.count} units of {clip.units.name} write {site}, {rest.acting / rest.tokens():.1f} on a token"
    )
    print(f"they rebuild {percent} of its variance {of}")
    parts = {name: f"{100 * value / rest.images:.0f} %" for name, value in rest.parts.items()}
    told = f"units {parts['units']}, the decoder's bias {parts['bias']}, the error {parts['error']}"
    print(f"of the site's second-order effect, by norms: {told}")
    if "direct" in parts:
        print(f"without any attention the site adds {parts['direct']} of the representation, by norms")
    if dictionary.rebuilds and not rest.rebuilt() >= LEAST:
        likely = "another model, another --site or layer, inputs that were scaled, or transposed weights"
        raise UserError(f"{path} rebuilds only {percent} of the variance of {site} {of}; likely: {likely}")


def look_at(clip, units, layer, site=None):
    """Let a `Clip` look at units of a layer in place of its neurons, as the stages with --units do.

    units: as --units has it; None for neurons. site: as --site.

    Raises UserError as `open_units` does.
    """
    clip.units = None
    open_units(SimpleNamespace(unit_set=units, site=site, mlp_layer=[str(layer)]), clip)


def open_units(args, clip):
    """Open what --units names, as `clip.units`: None for neurons. Sets args.mlp_layer to its layers.

    args: the flags unit_set, site and mlp_layer.
    clip: `Clip`.

    Raises UserError for a file that does not fit the tower, or does not say where it belongs.
    """
    given = getattr(args, "unit_set", None)
    check_flags(given, getattr(args, "site", None))
    if given is None:
        return
    vit = clip.vit
    if given == PAIRS:
        layers = parse_layers(args.mlp_layer, vit)
        clip.units = UnitSet(PAIRS, PAIRS, {layer: HeadPairs(vit, layer) for layer in layers})
        return
    dictionary = read_units(args)
    check_tower(dictionary, given.removeprefix(RANDOM), clip)
    layer = dictionary.layer
    args.mlp_layer = [str(layer)]
    if given.startswith(RANDOM):
        dictionary = random_dictionary(dictionary)
    clip.units = UnitSet(unit_set(given), dictionary.digest(), {layer: Features(vit, dictionary)})


def read_units(args):
    """Read the `Dictionary` that --units names, with its site and layer; args as in `open_units`."""
    path = args.unit_set.removeprefix(RANDOM)
    dictionary = read_dictionary(path)
    place(dictionary, path, args.site, args.mlp_layer)
    return dictionary


def units_record_of(args):
    """Return what records of results about --units say of their units, without a model.

    args: as in `open_units`, which raises the same errors.
    """
    given = getattr(args, "unit_set", None)
    check_flags(given, getattr(args, "site", None))
    if given in (None, PAIRS):
        return {"unit_set": given or NEURONS}
    dictionary = read_units(args)
    if given.startswith(RANDOM):
        dictionary = random_dictionary(dictionary)
    return {"unit_set": dictionary.digest()}


def check_flags(units, site):
    """Raise UserError for a --units that names nothing, and for a --site that nothing needs."""
    if units in ("", RANDOM):
        raise UserError(f"--units {units!r} names no file; give the path of a dictionary, or {PAIRS}")
    if units == RANDOM + PAIRS:
        raise UserError(f"--units {units}: a random control is of a dictionary's file; use --units {PAIRS}")
    if site and units in (None, PAIRS):
        of = "neurons" if units is None else PAIRS
        raise UserError(f"--site {site}: it says what a dictionary's units write, not {of}; leave it out")


def place(dictionary, path, site, layers):
    """Fill in the site and the layer that a dictionary's file does not say.

    path: of the file. site, layers: the flags --site and --mlp_layer, None and ["all"] where not given.

    Raises UserError where the flags contradict the file, or nobody says it.
    """
    if dictionary.site is None and site is None:
        what = f"{path} does not say what its units write"
        raise UserError(f"{what}; add --site {', --site '.join(SITES[:-1])} or --site {SITES[-1]}")
    if site not in (None, dictionary.site or site):
        raise UserError(f"--site {site}: {path} is of {dictionary.site}; leave the flag out")
    dictionary.site = dictionary.site or site
    given = None if layers == ["all"] else layers
    if dictionary.layer is None:
        if given is None or len(given) != 1 or not given[0].isdecimal():
            raise UserError(f"{path} does not say of which layer its units are; add --mlp_layer LAYER")
        dictionary.layer = int(given[0])
    if given not in (None, [str(dictionary.layer)]):
        both = f"--mlp_layer {' '.join(given)}: {path} is of layer {dictionary.layer}"
        raise UserError(f"{both}; leave the flag out")


def check_tower(dictionary, path, clip):
    """Raise UserError where a dictionary is of another width, layer or model than a `Clip`'s tower."""
    vit = clip.vit
    widths = (dictionary.encoder.shape[1], dictionary.decoder.shape[1])
    if widths != (vit.d, vit.d):
        both = (
            f"{path} reads {widths[0]} and writes {widths[1]} numbers, and this model's tower is {vit.d} wide"
        )
        raise UserError(f"{both}; use the model that it was trained on")
    if dictionary.fingerprint not in ("", clip.fingerprint):
        raise UserError(f"{path} was trained on other weights than these; use the model that it names")
    if not 0 <= dictionary.layer <= vit.last:
        reason = f"{path} is of layer {dictionary.layer}"
        raise UserError(f"{reason}, and this model's layers with effects are 0 to {vit.last}; use another")
