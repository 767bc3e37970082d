"""Make semantic adversarial images (section 5.1): pictures of one class that CLIP takes for another.

words.py mines words from neurons and drops those too close to class_0. drawings.py writes descriptions of
class_1 with the rest and draws them. judging.py classifies the drawings: CLIP should take them for class_0,
which no description names. run.py keeps the results of all steps in one folder; generators.py loads the
outside models. The classes are any two texts.
"""
