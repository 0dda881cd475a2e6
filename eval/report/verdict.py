"""What the numbers of a comparison can bear, said in sentences.

Computed, so that it claims no more than the numbers: a difference smaller than its noise is called
"within the noise", and less learning is never told as a virtue.
"""

import math
from collections.abc import Mapping, Sequence

from eval.analysis.noise import RESAMPLES
from eval.analysis.settings import Difference, Pair, Reading, Setting
from eval.analysis.text import short_float

SHOWN = 6  # comparisons in a headline; the verdict has them all
Told = tuple[str, str, Difference]  # the first setting forgot that much more than the second


def headline(
    settings: Sequence[Setting],
    pairs: Sequence[Pair],
    readings: Sequence[Reading],
    damaged: Sequence[str] = (),
) -> str:
    """What is decided at equal learning, by the reading between learning rates where there is one
    (it compares ends of whole sequences), by the reading along the curves for the others.
    `damaged` are the names of the runs that were left out of all of it."""
    if damaged:
        without = f"No verdict on {', '.join(damaged)}: damaged, see the warnings."
        return f"{without} {headline(settings, pairs, readings)}"
    between = [(r.at, r.method, r.difference) for r in readings if r.difference]
    along = _along(
        settings, pairs, {r.at for r in readings if r.difference}, {m for _, m, _ in between}
    )
    if not between and not along:
        return "No two of these settings can be read at equal learning."
    seeds = ", one seed" if all(len(s.runs) == 1 for s in settings) else ", means over seeds"
    return " ".join(
        _decided(told, f"{how}{seeds}")
        for told, how in (
            (between, "read between learning rates"),
            (along, "read along each run"),
        )
        if told
    )


def _along(
    settings: Sequence[Setting], pairs: Sequence[Pair], read: set[str], methods: set[str]
) -> list[Told]:
    """What is told of the curves along the runs: every pair where nothing was read between the
    learning rates of a method; else each setting that was not, beside the nearest rate of one that
    was read from."""
    told = [(p.second, p.first, p.forgotten_equal) for p in pairs if p.forgotten_equal]
    if not read:
        return told
    told += [(b, a, Difference(-d.value, d.noise)) for a, b, d in told]
    by_name = {s.name: s for s in settings}
    found = []
    for setting in settings:
        if setting.name in read or setting.method in methods:
            continue
        mine = [x for x in told if x[0] == setting.name and by_name[x[1]].method in methods]
        if mine:
            found.append(min(mine, key=lambda x: abs(math.log(by_name[x[1]].lr / setting.lr))))
    return found


def _decided(told: Sequence[Told], how: str) -> str:
    """Which of the differences exceed the noise, and how many do not."""
    known = [(a, b, d) for a, b, d in told if d.noise is not None]
    decided = [(a, b, d) for a, b, d in known if not d.within]
    rest = len(known) - len(decided)
    parts = []
    if decided:
        shown = decided if len(decided) <= SHOWN else sorted(decided, key=_rank)[:SHOWN]
        said = [f"{a} forgot {abs(d.value):.3f} {_word(d)} than {b}" for a, b, d in shown]
        if len(shown) < len(decided):
            said.append(f"and {len(decided) - len(shown)} more, in the verdict on the page")
        parts.append(f"At equal learning ({how}), beyond the noise: {'; '.join(said)}.")
        if rest:
            parts.append(f"{_count(rest, 'other comparison', verb=True)} within the noise.")
    elif rest:
        parts.append(
            f"At equal learning ({how}), no difference in forgetting exceeds the noise "
            f"({_count(rest, 'comparison')})."
        )
    if len(told) > len(known):
        unknown = _count(len(told) - len(known), "comparison", verb=True)
        parts.append(f"{unknown} of unknown noise.")
    return " ".join(parts)


def _rank(told: Told) -> tuple[bool, float]:
    """Those with fine-tuning first, and of them the largest."""
    first, second, found = told
    plain = any(name == "ft" or name.startswith("ft, ") for name in (first, second))
    return not plain, -abs(found.value)


def sentences(
    settings: Sequence[Setting],
    pairs: Sequence[Pair],
    readings: Sequence[Reading],
    level: float | None,
    unfinished: bool,
) -> list[str]:
    """The verdict: what the noise is of, then every comparison."""
    if len(settings) < 2:
        return ["Fewer than two of these settings have finished a stage: nothing to compare yet."]
    said = [_about_seeds([len(setting.runs) for setting in settings])]
    if any(pair.learned.noise is None for pair in pairs):
        said.append(
            "Some evaluations carry no standard error, so some differences are stated without "
            "saying whether they exceed the noise."
        )
    if unfinished:
        said.append("Some runs are unfinished: their numbers are those of the stages so far.")
    by_name = {setting.name: setting for setting in settings}
    said += [_pair(pair, by_name[pair.first], by_name[pair.second], level) for pair in pairs]
    said += [
        f"Between learning rates: at what {r.at} learned ({r.learned:.3f}), {r.method} forgets "
        f"{r.forgotten_read:.3f}, and {r.at} forgot {r.forgotten_measured:.3f}: "
        f"{difference(r.difference)}."
        for r in readings
        if r.difference
    ]
    return said


def about_noise(texts: Mapping[str, str | None], beyond: bool) -> str:
    """What "noise" means on this page. `texts` are the digests that each run can be paired on, by
    its name, and `beyond` is that of `Noise`."""
    alone = [name for name, text in texts.items() if text is None]
    paired = (
        "the runs are paired on their common held-out text: its sequences are drawn again "
        f"{RESAMPLES} times, the same for all runs, and every number is computed anew"
    )
    independent = (
        "every evaluation is taken as independent, which overstates the noise of runs that were "
        "measured on one text"
    )
    if len(alone) == len(texts):
        how = f"{independent}: losses by sequence (sequences.npz) are missing."
    elif alone:
        how = f"{paired}. Against {', '.join(alone)}, without sequences.npz, {independent}."
    elif len(set(texts.values())) > 1:
        how = f"{paired}. Between runs evaluated on different text, {independent}."
    else:
        how = f"{paired}."
    if beyond:
        how += f" Where a reading leaves its range in many resamples, {independent}."
    return (
        f"Noise is twice the standard error of the difference; {how} It is the noise of the "
        "held-out text, not of the seed: what another seed would give is in it only where "
        "settings were repeated."
    )


def difference(difference: Difference) -> str:
    """Its size and direction, and whether that exceeds the noise."""
    size = f"{abs(difference.value):.3f}"
    if float(size) == 0:
        return "the same"
    if difference.noise is None:
        return f"{size} {_word(difference)} (noise unknown)"
    noise = f"±{difference.noise:.3f}"
    if difference.within:
        return f"{size} {_word(difference)}, within the noise of the evaluation ({noise})"
    return f"{size} {_word(difference)} (noise {noise})"


def _about_seeds(counts: Sequence[int]) -> str:
    if max(counts) == 1:
        return (
            "Every setting was run with one seed, so how far these numbers move from seed to seed "
            "is not known; “noise” below is that of the held-out text alone."
        )
    if min(counts) == 1:
        return (
            "Only some settings were repeated with other seeds; for the rest, “noise” below is "
            "that of the held-out text alone."
        )
    low, high = min(counts), max(counts)
    seeds = f"{low}" if low == high else f"{low} to {high}"
    return (
        f"Each setting was run with {seeds} seeds: numbers are means, and “noise” below is that "
        "of held-out text and seeds together."
    )


def _pair(pair: Pair, first: Setting, second: Setting, level: float | None) -> str:
    a, b = first.name, second.name
    if first.lr == second.lr:
        a, b = first.method, f"{second.method} (both lr {short_float(first.lr)})"
    text = (
        f"Against {a}, {b} learned {difference(pair.learned)}, and forgot "
        f"{difference(pair.forgotten)}."
    )
    both = not pair.learned.within and not pair.forgotten.within
    if both and pair.learned.value * pair.forgotten.value > 0:
        size = "smaller" if pair.learned.value < 0 else "larger"
        text += f" A {size} learning rate moves both the same way."
    if pair.forgotten_equal is None:
        return text + " They cannot be read at equal learning."
    return f"{text} At equal learning ({level:.3f}) it forgot {difference(pair.forgotten_equal)}."


def _word(difference: Difference) -> str:
    return "less" if difference.value < 0 else "more"


def _count(number: int, noun: str, verb: bool = False) -> str:
    words = f"{number} {noun}" + ("" if number == 1 else "s")
    return words + (" is" if number == 1 else " are") * verb
