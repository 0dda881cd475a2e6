"""Four small tasks on made-up sentences, for demos and tests: nothing is downloaded or shipped.

Every sentence has a kind of subject, a tense, a place and a mood, and each task asks for one of
them. So the tasks share their words, and a model that learns one may forget another.
"""

import random

from pipeline.data.instruct import Example

ROWS = 2000  # of each task
SUBJECTS = {
    "animal": "heron badger trout sparrow goat otter beetle mule lynx toad",
    "plant": "oak fern thistle willow moss cactus lily bramble birch clover",
    "tool": "hammer chisel ladder spade wrench anvil bucket pulley sickle lathe",
    "person": "baker pilot nurse tailor miner painter clerk farmer singer juggler",
}
VERBS = {
    "past": "stood waited leaned lay shook rested",
    "present": "stands waits leans lies shakes rests",
    "future": "will-stand will-wait will-lean will-lie will-shake will-rest",
}
PLACES = {
    "indoors": "in-the-kitchen in-the-attic behind-the-sofa under-the-stairs at-the-counter "
    "in-the-cellar",
    "outdoors": "by-the-river in-the-meadow behind-the-dunes under-the-bridge at-the-harbour "
    "in-the-quarry",
}
MOODS = {
    "happy": "everybody-cheered it-was-a-delight we-laughed-a-lot nobody-could-be-gladder "
    "the-day-was-lovely",
    "sad": "everybody-sighed it-was-a-pity we-wept-a-lot nobody-could-be-gloomier "
    "the-day-was-dreary",
}
ASPECTS = {"toy_subject": SUBJECTS, "toy_tense": VERBS, "toy_place": PLACES, "toy_mood": MOODS}
TOY_TASKS = {name: list(words) for name, words in ASPECTS.items()}  # the labels of each


def toy_examples(name: str) -> list[Example]:
    """Different sentences (the prompt) with their label (the response), always the same ones."""
    draw = random.Random(name)
    found: dict[str, str] = {}
    while len(found) < ROWS:
        chosen = {aspect: draw.choice(list(words)) for aspect, words in ASPECTS.items()}
        subject, verb, place, mood = (
            draw.choice(words[chosen[aspect]].split()).replace("-", " ")
            for aspect, words in ASPECTS.items()
        )
        found[f"The {subject} {verb} {place}, and {mood}."] = chosen[name]
    return [Example(text, "", label) for text, label in found.items()]
