"""Find the neurons, heads and patches that bring a score about, and take the neurons away.

An answer is a dict, as it stands in the .json. Letters as in `utils.prs`; P pictures.
"""

import numpy as np
import torch

from applications.explain.known import naming
from utils.contributions import Contributions
from utils.data.images import to_pictures

DRAWS = 3  # of random neurons
KEPT_BESIDE = (100, 400)  # numbers of neurons that are kept, besides the last of --counts
HEADS = 3  # of a neuron that are named
OPPOSED = 5  # neurons that speak against, that are shown
PROVED = 32  # pictures of a folder on which neurons are taken away
SIDE = 224  # of a picture on the page, in pixels
DIGITS = 6


class Explainer:
    """An Explainer answers one question about pictures.

    clip: the loaded `Clip`.
    question: `Question`.
    means: {layer: [T, N]}, activations that a neuron has where it is taken away. Other units have one layer.
    classes: `Classes`, or None.
    known: `Known`.
    args: the flags neurons, counts, seed.
    """

    def __init__(self, clip, question, means, classes, known, args):
        self.clip = clip
        self.question = question
        self.classes = classes
        self.known = known
        self.args = args
        self.word = {} if clip.units is None else {"one": "unit"}  # for what is taken away, if not neurons
        units = clip.units and clip.units.units[next(iter(means))]
        self.finder = Contributions(clip.vit, means, question.v, units)
        self.layers = self.finder.layers
        self.N = len(self.finder.w[self.layers[0]])
        self.total = len(self.layers) * self.N
        self.counts = sorted({min(count, self.total) for count in args.counts})
        self.kept = [count for count in (*self.counts[-1:], *KEPT_BESIDE) if count <= self.total]

    # one picture

    def picture(self, pixels):
        """Return the answer about one picture, and the picture as the model sees it, [S, S, 3] in [0, 1].

        pixels: [1, 3, side, side].
        """
        decision = self.finder(pixels)
        values = {name: of[0] for name, of in self.finder.values(decision).items()}
        answer = self.word | self.state(decision.representation)
        sign = self.sign(answer["score"])
        largest, opposed = self.largest(sign * values["contribution"])
        answer["neurons"] = [self.neuron(decision, values, place, n) for place, n in largest]
        answer["against"] = [self.neuron(decision, values, place, n) for place, n in opposed]
        shown = [*answer["neurons"], *answer["against"]]
        answer["naming"] = naming(shown, **self.word)
        self.add_deletions(pixels, shown)
        answer["layers"] = of_layers(self.layers, values["contribution"])
        answer["heads"] = sum_of_heads(shown)
        orders = self.orders(values, sign)
        answer["proof"] = self.prove(pixels, orders, answer)
        answer["map"] = self.map_of(decision, largest + opposed)
        for item in shown:
            item["heads"] = item["heads"][:HEADS]
        return answer, to_pictures(pixels, self.clip.transform, (SIDE, SIDE))[0]

    def state(self, representation):
        """Return score and prediction for representations [1, D]."""
        score = float(self.finder.score(representation)[0])
        unit = torch.nn.functional.normalize(representation, dim=-1)
        towards = (100 * unit @ self.question.vectors.T)[0].tolist()
        scores = [round(value, DIGITS) for value in towards]
        named = self.predictions(representation)
        return {"score": round(score, DIGITS), "scores": scores, "prediction": named and named[0]}

    def sign(self, score):
        """Return -1 where --against has won, so that its neurons brought the score about; else 1."""
        return -1 if len(self.question.texts) == 2 and score < 0 else 1

    def predictions(self, representation):
        """Return what the model takes pictures for, [P] names: a class, or one of two texts; else None."""
        if self.classes:
            logits = representation @ self.classes.classifier.to(representation)
            return [self.classes.names[i] for i in logits.argmax(dim=1).tolist()]
        if len(self.question.texts) == 2:
            first = (self.finder.score(representation) >= 0).tolist()
            return [self.question.texts[0 if of else 1] for of in first]
        return None

    def largest(self, values):
        """Return the places (layer's, neuron) of the largest values, and of the smallest below 0.

        values: [layers, N].
        """
        order = values.flatten().argsort(descending=True, stable=True)
        found = [
            [divmod(i, self.N) for i in some.tolist()]
            for some in (order[: self.args.neurons], order.flip(0)[:OPPOSED])
        ]
        return [[at for at in found[0] if values[at] > 0], [at for at in found[1] if values[at] < 0]]

    def neuron(self, decision, values, place, n):
        """Return what a neuron does to the score of one picture, and what is known of it."""
        layer = self.layers[place]
        of = {name: round(float(values[name][place, n]), DIGITS) for name in ("contribution", "second_order")}
        heads = self.finder.of_heads(decision, layer, n)
        return {"layer": layer, "neuron": n, **of, "heads": shares(heads), "known": self.known.of(layer, n)}

    def add_deletions(self, pixels, shown):
        """Add what truly taking each shown neuron away, alone, costs the score."""
        orders = [[self.layers.index(item["layer"]) * self.N + item["neuron"]] for item in shown]
        sets = [torch.tensor(order) for order in orders]
        if sets:
            scores = self.finder.score(self.without(pixels, sets)[:, 0])
            before = self.finder.score(self.finder.without(pixels, self.mask([])[None]))
            for item, lost in zip(shown, (before - scores).tolist(), strict=True):
                item["deleted"] = round(lost, DIGITS)

    def map_of(self, decision, places):
        """Return the map of the shown neurons: contributions by patch, and those of all other tokens."""
        vit = self.clip.vit
        tokens = sum(self.finder.of_tokens(decision, self.layers[place], n)[0] for place, n in places)
        if not places:
            tokens = torch.zeros(vit.T)
        heat = tokens[vit.prefix :].unflatten(0, vit.grid).cpu().numpy()
        rest = float(tokens[: vit.prefix].sum())
        rows = [[round(float(x), DIGITS) for x in row] for row in heat]
        return {"patches": rows, "other_tokens": round(rest, DIGITS)}

    # the proof

    def orders(self, values, sign):
        """Return {source: a list of orders of all neurons, int64 [layers N] each}: several of random ones.

        values: {source: [layers, N]}.
        sign: of the values that come first; activation times norm has no sign.
        """
        found = {}
        for name, of in values.items():
            towards = of if name == "activation_norm" else sign * of
            found[name] = [towards.flatten().argsort(descending=True, stable=True)]
        drawn = [np.random.default_rng([self.args.seed, i]).permutation(self.total) for i in range(DRAWS)]
        return {**found, "random": [torch.from_numpy(order).to(self.clip.device) for order in drawn]}

    def mask(self, neurons):
        """Return bool [layers, N], True at some neurons."""
        found = torch.zeros(self.total, dtype=torch.bool, device=self.clip.device)
        found[neurons] = True
        return found.view(len(self.layers), self.N)

    def without(self, pixels, sets, keep=False):
        """Return representations [sets, P, D] without each of some sets of neurons, or with nothing else."""
        masks = torch.stack([self.mask(neurons) for neurons in sets]) ^ keep
        found = []
        for some in masks.split(max(1, 64 // len(pixels))):  # masks of many neurons are large
            taken = some.repeat_interleave(len(pixels), dim=0)
            found.append(self.finder.without(pixels.repeat(len(some), 1, 1, 1), taken))
        return torch.cat(found).unflatten(0, (len(sets), len(pixels)))

    def prove(self, pixels, orders, answer):
        """Return what deleting the first neurons by every source does, and what keeping only them does."""
        before = {"score": [answer["score"]], "prediction": [answer["prediction"]]}
        found = {}
        for what, counts in (("delete", self.counts), ("keep", self.kept)):
            found[what] = {}
            for source, several in orders.items():
                several = several if what == "delete" else several[:1]
                sets = [order[:count] for order in several for count in counts]
                of_sets = self.without(pixels, sets, keep=what == "keep")
                of_draws = of_sets.unflatten(0, (len(several), len(counts)))
                rows = [self.row(count, of_draws[:, i], before) for i, count in enumerate(counts)]
                found[what][source] = rows
        nothing = self.without(pixels, [torch.tensor([], dtype=torch.int64)], keep=True)
        found["nothing"] = self.row(0, nothing, before)
        return found

    def row(self, count, representations, before):
        """Return what a number of neurons does: score, what is left of it, and the predictions.

        representations: [draws, P, D].
        before: {"score", "prediction"} of the pictures as they are.
        """
        scores = torch.stack([self.finder.score(of) for of in representations]).cpu().numpy()  # [draws, P]
        found = {"count": count, "score": round(float(scores.mean()), DIGITS)}
        if len(scores) > 1:
            of_draws = scores.mean(axis=1)
            found |= {"low": round(float(of_draws.min()), DIGITS)}
            found |= {"high": round(float(of_draws.max()), DIGITS)}
        if len(self.question.texts) == 2:
            whole = np.array(before["score"])
            safe = np.where(np.abs(whole) < 1e-6, np.nan, whole)
            left = np.nanmedian(scores / safe) if np.isfinite(safe).any() else np.nan
            found["left"] = None if np.isnan(left) else round(float(left), DIGITS)
        if before["prediction"][0] is not None:
            named = [self.predictions(of) for of in representations]
            pairs = [pair for of in named for pair in zip(of, before["prediction"], strict=True)]
            found["changed"] = round(sum(a != b for a, b in pairs) / len(pairs), DIGITS)
            if scores.size == 1:
                found["prediction"] = named[0][0]
        return found

    # a folder

    def folder(self, split):
        """Return the answer about all pictures of a `Split` together: mean contributions.

        The proof is on at most PROVED of them, evenly taken.
        """
        sums = {}
        positive = 0
        states = []
        proved = set(np.linspace(0, len(split) - 1, min(PROVED, len(split))).astype(int).tolist())
        taken = []
        for rows, pixels in split.walk():
            decision = self.finder(pixels)
            for name, of in self.finder.values(decision).items():
                sums[name] = sums.get(name, 0) + of.cpu().double().sum(dim=0)
                if name == "contribution":
                    positive = positive + (of > 0).sum(dim=0).cpu()
            states += [self.state(of[None]) for of in decision.representation]
            taken += [pixels[i - rows.start] for i in range(rows.start, rows.stop) if i in proved]
        values = {name: of / len(split) for name, of in sums.items()}
        score = float(np.mean([state["score"] for state in states]))
        sign = self.sign(score)
        answer = {**self.word, "pictures": len(split), "score": round(score, DIGITS)}
        answer["scores"] = np.mean([state["scores"] for state in states], axis=0).round(DIGITS).tolist()
        for name, places in zip(
            ("neurons", "against"), self.largest(sign * values["contribution"]), strict=True
        ):
            answer[name] = [self.mean_neuron(values, positive / len(split), *place) for place in places]
        answer["naming"] = naming([*answer["neurons"], *answer["against"]], **self.word)
        answer["layers"] = of_layers(self.layers, values["contribution"])
        shown = [states[i] for i in sorted(proved)]
        orders = self.orders(values, sign)
        answer["proof"] = self.prove_on(torch.stack(taken), orders, shown)
        return answer

    def mean_neuron(self, values, positive, place, n):
        """Return a neuron's mean contribution, on what share of the pictures it is above 0, what is known."""
        layer = self.layers[place]
        of = {name: round(float(values[name][place, n]), DIGITS) for name in ("contribution", "second_order")}
        share = round(float(positive[place, n]), DIGITS)
        return {"layer": layer, "neuron": n, **of, "positive_on": share, "known": self.known.of(layer, n)}

    def prove_on(self, pixels, orders, states):
        """Return what deleting the first neurons does on some pictures, as `prove` does."""
        before = {name: [state[name] for state in states] for name in ("score", "prediction")}
        found = {
            "pictures": len(pixels),
            "score": round(float(np.mean(before["score"])), DIGITS),
            "delete": {},
        }
        for source, several in orders.items():
            rows = []
            for count in self.counts:
                of_draws = self.without(pixels, [order[:count] for order in several])
                rows.append(self.row(count, of_draws, before))
            found["delete"][source] = rows
        return found


def shares(heads):
    """Return [{"layer", "head", "effect", "share"}], largest |effect| first; shares of the sum of |effects|.

    heads: {l: [1, H]}.
    """
    found = [(l, h, float(x)) for l, of in heads.items() for h, x in enumerate(of[0].tolist())]
    total = sum(abs(x) for _, _, x in found) or 1.0
    found.sort(key=lambda item: -abs(item[2]))
    return [
        {"layer": l, "head": h, "effect": round(x, DIGITS), "share": round(x / total, DIGITS)}
        for l, h, x in found
    ]


def sum_of_heads(shown):
    """Return as `shares` what heads carry of all shown neurons together."""
    sums = {}
    for item in shown:
        for head in item["heads"]:
            key = head["layer"], head["head"]
            sums[key] = sums.get(key, 0) + head["effect"]
    total = sum(map(abs, sums.values())) or 1.0
    largest = sorted(sums.items(), key=lambda item: -abs(item[1]))[:5]
    return [
        {"layer": l, "head": h, "effect": round(x, DIGITS), "share": round(x / total, DIGITS)}
        for (l, h), x in largest
    ]


def of_layers(layers, values):
    """Return what the neurons of every layer bring, for and against. values: [layers, N]."""
    found = []
    for layer, of in zip(layers, values, strict=True):
        parts = {"positive": of.clamp_min(0).sum(), "negative": of.clamp_max(0).sum()}
        found.append({"layer": layer, **{name: round(float(x), DIGITS) for name, x in parts.items()}})
    return found
