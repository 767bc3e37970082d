"""Say an answer in sentences, for the terminal and the page."""

from applications.explain.known import SIDES

CLEARLY = 2  # times what random neurons cost, that chosen ones have to cost
HEADLINE = 10  # neurons, at most, whose deletion the first sentences tell
SOURCES = {
    "contribution": "by contribution",
    "second_order": "by second-order effect",
    "activation_norm": "by activation times norm",
    "random": "random",
}
SIGNED = ("score", "contribution", "second_order", "deleted", "effect", "share", "low", "high")
SIGNED += ("positive", "negative", "other_tokens")


def towards_winner(answer, texts):
    """Return an answer as seen from the text that has won: where that is --against, all signs are turned."""
    return turned(answer) if len(texts) == 2 and answer["score"] < 0 else answer


def winner_first(answer, texts):
    """Return the texts of a question, the one that has won first."""
    return texts[::-1] if len(texts) == 2 and answer["score"] < 0 else texts


def turned(item):
    """Return a part of an answer with the signs of all numbers of SIGNED turned."""
    if isinstance(item, list):
        return [turned(part) for part in item]
    if not isinstance(item, dict):
        return item
    found = {}
    for name, value in item.items():
        found[name] = -value if name in SIGNED and not isinstance(value, list) else turned(value)
    ends = {"low": "high", "high": "low", "positive": "negative", "negative": "positive"}
    found = {ends.get(name, name): value for name, value in found.items()}
    if "positive_on" in found:
        found["positive_on"] = 1 - found["positive_on"]
    if "patches" in found:
        found["patches"] = [[-x for x in row] for row in found["patches"]]
    return found


def sentences(answer, texts, total):
    """Return what brought the score about and how sure it is, a list of (kind, sentence).

    answer: of `Explainer.picture` or `Explainer.folder`, towards the winner.
    texts: the winner, and the other text where there is one.
    total: number of neurons.
    """
    found = [("score", of_score(answer, texts))]
    proof = answer["proof"]
    counts = [row["count"] for row in proof["delete"]["contribution"]]
    if counts and answer["neurons"]:
        place = max([i for i, count in enumerate(counts) if count <= HEADLINE], default=0)
        rows = {source: of[place] for source, of in proof["delete"].items()}
        found += of_deletion(answer, rows, total)
    if "nothing" in proof:
        found.append(("keep", of_keeping(proof)))
    if answer["neurons"]:
        found.append(("naming", answer["naming"]["verdict"]))
    return found


def of_score(answer, texts):
    """Return the sentence about the score."""
    mean = f"mean of {answer['pictures']:,} pictures, " if "pictures" in answer else ""
    predicted = f" The classifier says “{answer['prediction']}”." if answer.get("prediction") else ""
    if len(texts) == 1:
        return f"Score of “{texts[0]}”: {answer['score']:.2f} ({mean}100 x cosine).{predicted}"
    won, lost = sorted(answer["scores"], reverse=True)
    by = f"by {answer['score']:.2f} points ({mean}100 x cosine: {won:.2f} to {lost:.2f})"
    if answer.get("prediction") == texts[0]:
        predicted = ""
    return f"“{texts[0]}” wins over “{texts[1]}” {by}.{predicted}"


def of_deletion(answer, rows, total):
    """Return the sentences about taking the first neurons away. rows: {source: a row of the proof}."""
    own, random = rows["contribution"], rows["random"]
    before = answer["proof"].get("score", answer["score"])
    count = own["count"]
    one = answer.get("one", "neuron")
    what = f"the first {one}" if count == 1 else f"the first {count} {one}s"
    measure = "margin" if "left" in own else "score"
    part = f"Without {what}, of {total:,}, the {measure} goes from {before:.2f} to {own['score']:.2f}"
    part += f"{left_of(own)}{changed_of(own)}"
    without = f"{random['low']:.2f} to {random['high']:.2f}"
    part += f"; without {count} random ones it is {without}."
    lost = before - own["score"]
    of_chance = max(abs(before - random["low"]), abs(before - random["high"]))
    if lost <= CLEARLY * of_chance:
        sure = f"Not sure: to take these {one}s away does hardly more than to take random ones."
        return [("deletion", part), ("unsure", f"{sure}{alone_of(answer)}")]
    decide = not stands(own)
    sure = f"These {one}s decide it" if decide else f"These {one}s matter, but do not decide it alone"
    costs = f": to take them away costs {lost:.2f}, random ones {of_chance:.2f} at most."
    return [("deletion", part), ("sure", f"{sure}{costs}{alone_of(answer)}")]


def alone_of(answer):
    """Say what the shown neurons that speak for the score cost one by one, and what contributions say."""
    if "deleted" not in answer["neurons"][0]:
        return ""
    truly = sum(item["deleted"] for item in answer["neurons"])
    said = sum(item["contribution"] for item in answer["neurons"])
    number = len(answer["neurons"])
    return f" One by one, the {number} below cost {truly:.2f} in all; their contributions say {said:.2f}."


def of_keeping(proof):
    """Return the sentence about keeping only the first neurons."""
    row = proof["keep"]["contribution"][-1]
    nothing = proof["nothing"]
    kept = f"With only the first {row['count']} at work and all others taken away, it is {row['score']:.2f}"
    rest = f"with none at work {nothing['score']:.2f}"
    verdict = ""
    if nothing.get("left") is not None and stands(nothing):
        verdict = " It stands without any of them."
    elif row.get("left") is not None:
        verdict = " They are enough." if stands(row) else " Alone they are not enough."
    return f"{kept}{left_of(row)}{changed_of(row)}; {rest}.{verdict}"


def stands(row):
    """Return whether a decision stands: the prediction stays, and half of the margin where there is one."""
    left = row.get("left")
    return row.get("changed", 0) < 0.5 and (left is None or left >= 0.5)


def left_of(row):
    """Return the share of the margin that is left, in brackets."""
    if row.get("left") is None:
        return ""
    return f" ({100 * row['left']:.0f} % left)" if row["left"] > 0 else " (nothing left)"


def changed_of(row):
    """Say whether the prediction changes."""
    if "prediction" in row:
        return f", and the prediction becomes “{row['prediction']}”" if row["changed"] else ""
    return f", and {100 * row['changed']:.0f} % of the predictions change" if "changed" in row else ""


def known_of(item):
    """Return what is known of a neuron, a list of (side, texts, grade): the grade beside that of noise."""
    lines = []
    for side, of in item["known"].items():
        texts = ", ".join(f"{'' if c > 0 else '− '}{text}" for text, c in of["texts"])
        grade = of["verdict"]
        if of["texts"] and of["grade"] is not None:
            grade = f"{of['grade']:.2f}, noise {of['control']:.2f}"
        lines.append((SIDES[side], texts or "no text", grade))
    return lines


def name_of_head(head, layers):
    """Return a head's name. layers: of the model; a head of layer `layers` pools the tokens."""
    return f"pool.{head['head']}" if head["layer"] == layers else f"{head['layer']}.{head['head']}"


def cells(rows, whole):
    """Return the cells of a row of the proof, one for each number of neurons.

    whole: what the rows are of: a single picture's `changed` is whether its prediction has changed.
    """
    found = []
    for row in rows:
        text = f"{row['score']:.2f}"
        if row.get("left") is not None:
            text += f" ({100 * row['left']:.0f} %)"
        if row.get("changed"):
            text += " *" if whole else f" *{100 * row['changed']:.0f} %"
        found.append(text)
    return found
