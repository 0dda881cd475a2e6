"""The pages of runs and comparisons, from invented run folders."""

import html
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from eval.analysis.accuracy import accuracy_matrix
from eval.analysis.falls import falls
from eval.analysis.load import load_run
from eval.analysis.matrix import METRICS, acc, learning_curve
from eval.analysis.noise import resample
from eval.analysis.score import score
from eval.analysis.settings import Difference, Pair, Reading, Setting, measure
from eval.report.card import model_card
from eval.report.compare import compare, terminal_summary, write_comparison
from eval.report.drawing import new_figure, svg_of
from eval.report.page import write_report
from eval.report.verdict import headline
from launch.report import main
from pipeline.errors import UserError
from tests.fake_runs import fake_run


class Elements(HTMLParser):
    """Collects tags and attributes, and fails on a tag closed in the wrong order."""

    VOID = ("meta", "br", "link", "img", "hr", "input")

    def __init__(self, page):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def text_of(page):
    """The words of a page, as a reader sees them."""
    words = html.unescape(re.sub(r"(?s)<style[^>]*>.*?</style>|<[^>]+>", " ", page.read_text()))
    return re.sub(r"\s+", " ", words).replace("\u2011", "-")


def change_recipe(run, **changes):
    path = run / "recipe.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def assert_self_contained(page):
    elements = Elements(page.read_text()).seen
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in elements:
        assert tag not in ("script", "link", "img", "iframe")
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import", page.read_text())


def test_page_of_a_finished_run(tmp_path):
    run = fake_run(tmp_path / "demo")
    page = write_report(run)
    assert page == run / "report" / "index.html"
    assert_self_contained(page)
    report = json.loads((page.parent / "report.json").read_text())
    assert report["finished"] is True
    assert report["domains"] == ["prose", "math", "python", "cpp"]  # base first, then stage order
    text = text_of(page)
    for value in [v for row in report["loss"] for v in row]:
        assert f"{value:.3f}" in text
    for key in report["metrics"]:
        assert report["definitions"][key].split(";")[0] in text
    assert f"{report['metrics']['forgotten']:.3f}" in text
    assert report["time"][0]["percents"]["mask"] == pytest.approx(100 * 0.004 / 0.224, rel=0.1)
    assert "deepspeed launch/cpt.py" in text
    assert {p.name for p in page.parent.glob("*.svg")} == {"domain_curves.svg", "training_loss.svg"}


def test_pages_are_the_same_to_the_byte(tmp_path):
    runs = [
        fake_run(tmp_path / "a", heldout="text"),
        fake_run(tmp_path / "b", enabled=False, heldout="text"),
    ]
    for write in (lambda: write_report(runs[0]), lambda: write_comparison(runs, tmp_path / "out")):
        assert write().read_bytes() == write().read_bytes()


@pytest.mark.parametrize("evaluated", [-1, 0, 1])
def test_unfinished_runs_have_a_page(tmp_path, evaluated):
    run = fake_run(tmp_path / "half", evaluated=max(evaluated, 0), overlap=False, unigram=False)
    if evaluated < 0:
        (run / "stages" / "00_base" / "eval.json").unlink()
        (run / "log.jsonl").unlink()
        (run / "environment.json").unlink()
    text = text_of(write_report(run))
    assert "Not yet evaluated" in text
    assert ("nothing has been evaluated" in text) == (evaluated < 0)
    assert ("After 1 of 3 stages" in text) == (evaluated == 1)
    assert "unigram" not in text


def test_damaged_files_are_told_and_survived(tmp_path):
    run = fake_run(tmp_path / "damaged", bad_lines=3)
    (run / "stages" / "02_python" / "eval.json").write_text('{"domains": {"prose"')
    last = run / "stages" / "03_cpp" / "eval.json"
    record = json.loads(last.read_text())
    record["domains"]["math"]["loss"] = float("nan")
    last.write_text(json.dumps(record))
    with (run / "log.jsonl").open("a") as log:
        log.write('{"event": "st')
    text = text_of(write_report(run))
    assert "3 unreadable line(s) of math were skipped, the first in data/math.jsonl, line 7" in text
    assert "02_python/eval.json cannot be read" in text
    assert "The loss on math after stage 3 (cpp) is nan" in text
    assert "1 line(s) of log.jsonl" in text
    assert "Not yet evaluated: stage 2 (python)" in text


def test_a_resumed_stage_counts_its_steps_once(tmp_path):
    run = fake_run(tmp_path / "resumed", steps=10)
    log = run / "log.jsonl"
    log.write_text(
        "".join(line + "\n" for line in log.read_text().splitlines()[:8]) + log.read_text()
    )
    write_report(run)
    report = json.loads((run / "report" / "report.json").read_text())
    assert [time["steps"] for time in report["time"]] == [10, 10, 10]
    assert [time["tokens"] for time in report["time"]] == [40960] * 3


def test_names_are_escaped_and_mixtures_read(tmp_path):
    run = fake_run(tmp_path / "mixed", trained=("a<b", "math"))
    stages = [{"domain": ["a<b", "math"], "steps": 60}, {"domain": "math", "steps": 60}]
    change_recipe(run, stages=stages, name="<script>alert(1)</script>")
    page = write_report(run)
    assert_self_contained(page)
    report = json.loads((page.parent / "report.json").read_text())
    assert report["trained"] == {"a<b": 1, "math": 1}


def test_domains_of_a_stage_and_what_preparing_left_out_are_on_the_page(tmp_path):
    run = fake_run(tmp_path / "replay", replayed="prose")
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    left_out = {"broken": 3, "blank": 0, "duplicates": 1234, "contaminated": 56, "refused": 0}
    sizes = {"documents": 4321, "tokens": 98765, "heldout_documents": 222}
    for damaged in ({}, {"left_out": 3}, {"tokens": "many"}):
        record = {"event": "corpus", "domain": "math", **sizes, "left_out": left_out} | damaged
        records.insert(0, record)
    records[-2]["domains"]["prose"]["loss"] = None  # nothing of it was predicted
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = write_report(run)
    assert_self_contained(page)
    figure = (page.parent / "domain_training_loss.svg").read_text()
    assert {"prose", "math", "python", "cpp"} <= set(re.findall(r">(\w+)</text>", figure))
    report = json.loads((page.parent / "report.json").read_text())
    shares = {(s["stage"], s["domain"]): s for s in report["domains_of_stages"]}
    steps = [r for r in records if r["event"] == "step"]
    for stage, domain in enumerate(("math", "python", "cpp"), start=1):
        own, other = shares[stage, domain], shares[stage, "prose"]
        assert (own["tokens"], other["tokens"]) == (60 * 3072, 60 * 1024)
        assert (own["share"], other["share"]) == (0.75, 0.25)
        losses = [s["domains"][domain]["loss"] for s in steps if s["stage"] == stage]
        assert own["last"] == pytest.approx(np.median(losses[-6:]))
        assert other["last"] == 4.02
    text = text_of(page)
    assert "Domain Documents Tokens Held out Broken Duplicates Text of an evaluation" in text
    assert "math 4,321 98,765 222 3 1,234 56" in text
    assert "2 line(s) of log.jsonl cannot be read" in text
    assert "Domains of the stages" not in text_of(write_report(fake_run(tmp_path / "plain")))


def test_comparison_reads_equal_learning_and_names_the_noise(tmp_path):
    runs = [
        fake_run(tmp_path / "ft", enabled=False),
        fake_run(tmp_path / "migu"),
        fake_run(tmp_path / "random", criterion="random"),
    ]
    comparison = compare(runs)
    labels = [row.label for row in comparison.rows]
    assert labels == ["ft, lr 1e-3", "migu T=0.7, lr 1e-3", "random rows T=0.7, lr 1e-3"]
    assert comparison.warnings == []
    assert comparison.level == min(row.learned for row in comparison.rows)
    assert all(row.forgotten_equal is not None for row in comparison.rows)
    # The invented random rows are the invented migu run, number for number.
    assert "one seed" in comparison.verdict[0]
    assert "random rows T=0.7 (both lr 1e-3) learned the same, and forgot the same" in " ".join(
        comparison.verdict
    )
    page = write_comparison(runs, tmp_path / "out")
    assert_self_contained(page)
    assert comparison.headline in text_of(page)
    lines = terminal_summary(comparison).splitlines()
    assert lines[1].split() == [
        "ft", "ft,", "lr", "1e-3",
        *(f"{v:.3f}" for v in (
            comparison.rows[0].learned,
            comparison.rows[0].forgotten,
            comparison.rows[0].forgotten_equal,
        )),
    ]  # fmt: skip


def test_what_the_noise_swallows_is_not_called_a_difference(tmp_path):
    def headline(stderr):
        folder = tmp_path / str(stderr)
        ft = fake_run(folder / "ft", enabled=False, stderr=stderr)
        return compare([ft, fake_run(folder / "migu", stderr=stderr)]).headline

    assert "beyond the noise: migu" in headline(0.001)
    assert "no difference in forgetting exceeds the noise" in headline(1.0)
    assert "unknown noise" in headline(None)


def test_the_headline_tells_of_a_method_outside_the_rates_of_the_others():
    """It is read along the runs, beside the nearest rate of the method that the others are read
    from."""
    settings = [
        Setting("ft, lr 1e-3", "ft", 1e-3, [0]),
        Setting("ft, lr 5e-4", "ft", 5e-4, [1]),
        Setting("migu", "migu", 1e-3, [2]),
        Setting("anchor", "anchor", 1e-3, [3]),
    ]
    far, unknown = Difference(0.4, 0.01), Difference(0.1, None)
    pairs = [
        Pair("ft, lr 1e-3", "ft, lr 5e-4", far, far, far),
        Pair("ft, lr 1e-3", "migu", far, far, far),
        Pair("anchor", "ft, lr 1e-3", far, far, far),
        Pair("anchor", "ft, lr 5e-4", far, far, unknown),
    ]
    readings = [
        Reading("ft", "migu", 0.7, 0.4, 0.5, Difference(0.1, 0.01)),
        Reading("ft", "anchor", 0.8, None, 0.2, None, "outside"),
    ]
    told = headline(settings, pairs, readings)
    assert "between learning rates, one seed), beyond the noise: migu forgot 0.100 more" in told
    assert (
        "along each run, one seed), beyond the noise: anchor forgot 0.400 less than ft, lr" in told
    )
    assert "unknown" not in told
    assert "lr 5e-4" not in told


def test_a_headline_of_many_settings_has_the_largest_differences_from_fine_tuning():
    readings = [
        Reading("ft", f"m{i}", 0.7, 0.4, 0.5, Difference(0.1 * i, 0.01)) for i in range(1, 9)
    ]
    others = [Reading("m1", f"m{i}", 0.7, 0.4, 0.5, Difference(2.0, 0.01)) for i in range(2, 9)]
    told = headline([Setting("ft", "ft", 1e-3, [0])], [], [*others, *readings])
    said = [f"{name} forgot" in told for name in ("m8", "m7", "m3")]
    assert said == [True] * 3
    assert "m2 forgot" not in told
    assert "2.000" not in told
    assert "and 9 more, in the verdict on the page" in told


def test_noise_is_paired_over_the_sequences_of_a_common_text(tmp_path):
    runs = [
        fake_run(tmp_path / "ft", enabled=False, heldout="text"),
        fake_run(tmp_path / "migu", heldout="text"),
        fake_run(tmp_path / "other", criterion="random", lr=8e-4, heldout="other text"),
    ]
    paired = compare(runs[:2])
    (pair,) = paired.pairs
    # By hand: the ratio estimator, linearised, on what each sequence adds to the difference.
    variance = 0.0
    for stage, domain in enumerate(("math", "python", "cpp"), start=1):
        total = 0.0
        for run, sign in zip(runs[:2], (-1, 1), strict=True):
            for row, folder in ((0, "00_base"), (stage, f"{stage:02d}_{domain}")):
                with np.load(run / "stages" / folder / "sequences.npz") as arrays:
                    loss, tokens = arrays[f"loss/{domain}"], arrays[f"tokens/{domain}"]
                residual = loss - loss.sum() / tokens.sum() * tokens
                total = total + sign * (-1 if row else 1) * residual / 3
        variance += (total**2).sum() / tokens.sum() ** 2
    assert pair.learned.noise == pytest.approx(2 * variance**0.5, rel=0.1)
    one = load_run(runs[0])
    for point in one.points:
        point.sequences = {name: values[:1] for name, values in point.sequences.items()}
    assert resample(one) is None  # nobody knows how far one sequence is from others
    assert "paired on their common held-out text" in paired.noise
    assert "not of the seed" in text_of(write_comparison(runs[:2], tmp_path / "out"))

    apart = {p.second: p for p in compare([runs[0], runs[2]]).pairs}
    for path in runs[1].glob("stages/*/sequences.npz"):
        path.unlink()
    missing = compare(runs)
    assert "Against migu, without sequences.npz, every evaluation" in missing.noise
    assert "migu: losses by sequence (sequences.npz) are missing" in " ".join(missing.warnings)
    unpaired = math.hypot(*[0.02 * 6**0.5 / 3] * 2)  # from the standard errors of eval.json
    for one in (missing.pairs[0], apart["random rows T=0.7, lr 8e-4"]):
        assert one.learned.noise == pytest.approx(2 * unpaired)
    assert pair.learned.noise < 0.5 * missing.pairs[0].learned.noise


def test_seeds_are_averaged(tmp_path):
    runs = [
        fake_run(tmp_path / f"{enabled}-{seed}", enabled=enabled, seed=seed)
        for enabled in (False, True)
        for seed in (0, 1)
    ]
    comparison = compare(runs)
    ft, migu = comparison.settings
    pair = [row.learned for row in comparison.rows[:2]]
    assert (ft.runs, migu.runs) == ([0, 1], [2, 3])
    assert ft.learned == pytest.approx(sum(pair) / 2)
    assert ft.spread["learned"] == pytest.approx(abs(pair[0] - pair[1]) / 2**0.5)
    assert comparison.rows[1].label == "ft, lr 1e-3, seed 1"
    text = text_of(write_comparison(runs, tmp_path / "out"))
    assert f"± {ft.spread['forgotten']:.3f}" in text
    assert "Each setting was run with 2 seeds" in text
    seeds = math.hypot(ft.spread["learned"], migu.spread["learned"]) / 2**0.5
    assert comparison.pairs[0].learned.noise > 2 * seeds


def test_methods_are_read_between_their_learning_rates(tmp_path):
    runs = [fake_run(tmp_path / f"ft-{lr}", enabled=False, lr=lr) for lr in (2e-4, 5e-4, 1e-3)] + [
        fake_run(tmp_path / "migu", lr=5e-4)
    ]
    comparison = compare(runs)
    (reading,) = comparison.readings  # migu has one rate: it cannot be read at ft's learning
    assert (reading.method, reading.at) == ("ft", "migu T=0.7, lr 5e-4")
    assert reading.difference.value == reading.forgotten_measured - reading.forgotten_read
    low, high = sorted(r.forgotten for r in comparison.rows[:2])
    assert low < reading.forgotten_read < high
    assert "Read between learning rates" in text_of(write_comparison(runs, tmp_path / "out"))


def test_a_method_is_not_read_beyond_the_rate_that_learns_most():
    """Between 1e-3 and 2e-3, where it learns less again, the first would seem to forget 0.39."""
    ends = [(0.405, 0.429), (0.39, 0.15), (0.445, 0.257), (0.413, 0.207)]
    settings = [
        Setting(f"{method}, lr {lr}", method, lr, [place])
        for place, (method, lr) in enumerate(
            [("ft", 2e-3), ("ft", 5e-4), ("ft", 1e-3), ("a", 1e-3)]
        )
    ]
    numbers = measure([[(0.0, 0.0), end] for end in ends], settings, range(4))
    read = numbers["between", "ft", "a, lr 0.001"]
    assert read == pytest.approx(0.15 + (0.413 - 0.39) / (0.445 - 0.39) * (0.257 - 0.15))


def test_only_runs_that_differ_in_rate_and_seed_alone_are_one_method(tmp_path):
    rates = (5e-4, 1e-3)
    runs = [
        fake_run(tmp_path / f"{enabled}-{lr}", enabled=enabled, lr=lr)
        for enabled in (False, True)
        for lr in rates
    ]
    alone = compare(runs).at_equal_learning
    other = [fake_run(tmp_path / f"short-{lr}", enabled=False, lr=lr, steps=30) for lr in rates]
    found = compare([*runs, *other]).at_equal_learning
    assert found.reference == "ft (as False-0.0005)"
    assert [m.most for m in found.methods[:2]] == [m.most for m in alone.methods]
    assert found.methods[2].method == "ft (as short-0.0005)"
    # A rate that one seed lacks is not read, and the page says so.
    again = [fake_run(tmp_path / f"again-{on}", enabled=on, seed=1) for on in (False, True)]
    again += [
        fake_run(tmp_path / f"more-{on}", enabled=on, seed=1, lr=2e-3) for on in (False, True)
    ]
    high = [fake_run(tmp_path / f"high-{on}", enabled=on, lr=2e-3) for on in (False, True)]
    page = write_comparison([*runs, *again, *high], tmp_path / "out")
    said = "not every seed has finished them: ft at 5e-4; migu T=0.7 at 5e-4."
    assert said in text_of(page)


def test_a_run_that_cannot_be_read_says_why(tmp_path):
    runs = [fake_run(tmp_path / "a"), fake_run(tmp_path / "new", evaluated=0, enabled=False)]
    comparison = compare(runs)
    assert comparison.rows[1].forgotten_equal is None
    assert comparison.rows[1].reason == "no stage evaluated yet"
    assert comparison.level == comparison.rows[0].learned
    assert "nothing to compare yet" in comparison.verdict[0]
    assert "no stage evaluated yet" in terminal_summary(comparison)
    write_comparison(runs, tmp_path / "out")


def test_runs_that_do_not_compare_are_warned_about(tmp_path):
    ft, migu = fake_run(tmp_path / "ft", enabled=False), fake_run(tmp_path / "migu", seed=5)
    assert compare([ft, migu]).warnings == []
    stages = yaml.safe_load((migu / "recipe.yaml").read_text())["stages"]
    assert len(stages) > 1
    limited = [{**stage, "max_repetitions": 2} for stage in stages]
    change_recipe(migu, data={"sequence_length": 64}, stages=limited)
    path = migu / "stages" / "00_base" / "eval.json"
    base = path.read_text()
    path.write_text(base.replace("4.02", "4.022"))  # another machine's, say
    assert "do not start from the same loss" in " ".join(compare([ft, migu]).warnings)
    assert "At equal learning" in compare([ft, migu]).headline
    path.write_text(base.replace("4.02", "4.12"))
    assert "No verdict: the losses of these runs do not compare" in compare([ft, migu]).headline
    for run in (ft, migu):
        (run / "heldout").mkdir()
        manifest = {"files": {"prose.safetensors": f"digest of {run.name}"}}
        (run / "heldout" / "manifest.json").write_text(json.dumps(manifest))
    warnings = " ".join(compare([ft, migu]).warnings)
    assert "differ in data.sequence_length (ft: 128; migu: 64)" in warnings
    every = ", ".join(str(i + 1) for i in range(len(stages)))  # said once for all of them
    assert f"differ in max_repetitions of stage {every} (ft: not set; migu: 2)" in warnings
    assert "different held-out text" in warnings
    assert "do not start from the same loss on prose (4.120 and 4.020)" in warnings


def test_command_line(tmp_path, capsys):
    runs = [fake_run(tmp_path / "ft", enabled=False), fake_run(tmp_path / "migu")]
    assert main([str(runs[0])]) == 0
    assert (runs[0] / "report" / "index.html").is_file()
    assert main([str(run) for run in runs]) == 0
    assert (tmp_path / "comparison" / "index.html").is_file()
    assert "forgotten at equal learning" in capsys.readouterr().out
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "has no recipe.yaml" in capsys.readouterr().err
    assert main([str(runs[0]), str(runs[0])]) == 2
    (runs[0] / "recipe.yaml").write_text("stages: 3")
    with pytest.raises(UserError, match="not the recipe of a run"):
        write_report(runs[0])


FILES = (
    "environment.json", "heldout/manifest.json", "log.jsonl", "stages/02_python/eval.json",
    "stages/02_python/sequences.npz", "stages/03_cpp/eval.json",
)  # fmt: skip
KINDS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "wrong type": lambda path: path.write_text("[1, 2]\n"),
    "absent": lambda path: path.unlink(),
}
LOSSES = {"text": "4.2", "null": None, "list": [4.2], "infinite": math.inf}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three whole runs, and what a comparison without the second of them says."""
    folder = tmp_path_factory.mktemp("three")
    runs = [
        fake_run(folder / "ft", enabled=False, heldout="text"),
        fake_run(folder / "migu", heldout="text"),
        fake_run(folder / "random", criterion="random", heldout="text", seed=1),
    ]
    return runs, compare(runs), compare([runs[0], runs[2]])


def assert_told(three, folder, said, damages_losses):
    """A comparison with a damaged second run names what is damaged, on page and terminal alike, and
    judges the others as if it were not there; or, if no number rests on what is damaged, judges
    all of them as before."""
    (ft, _, random), whole, without = three
    damaged = compare([ft, folder, random])
    expected = without if damages_losses else whole
    assert damaged.damaged == (["migu"] if damages_losses else [])
    assert damaged.headline.endswith(expected.headline)
    assert damaged.headline.startswith("No verdict on migu") == damages_losses
    assert damaged.pairs == expected.pairs
    assert re.search(rf"migu: [^|]*{said}", "|".join(damaged.warnings)), damaged.warnings
    shown = " ".join(terminal_summary(damaged).split())
    for text in (damaged.headline, *damaged.warnings):
        assert text in shown


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_told_and_decides_nothing(three, tmp_path, file, kind):
    folder = shutil.copytree(three[0][1], tmp_path / "migu")
    KINDS[kind](folder / file)
    # The last half of a log that is cut holds the end of the run.
    losses = not file.endswith(("environment.json", "log.jsonl"))
    assert_told(three, folder, Path(file).name, losses)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_that_is_no_number_is_told_and_decides_nothing(three, tmp_path, kind):
    folder = shutil.copytree(three[0][1], tmp_path / "migu")
    path = folder / "stages" / "02_python" / "eval.json"
    record = json.loads(path.read_text())
    record["domains"]["math"]["loss"] = LOSSES[kind]
    path.write_text(json.dumps(record))
    said = "the run diverged" if kind == "infinite" else "it is damaged"
    assert_told(three, folder, f"The loss on math after stage 2 .*{said}", True)
    text = text_of(write_report(folder))
    assert said in text
    assert ("diverged" in text) == (kind == "infinite")


def test_pages_and_exit_codes_of_damaged_runs(three, tmp_path, capsys):
    (ft, _, _), _, _ = three
    folder = shutil.copytree(three[0][1], tmp_path / "migu")
    for path in folder.glob("stages/*/eval.json"):
        path.write_text("{")
    assert main([str(ft), str(folder), "--out", str(tmp_path / "out")]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    page = text_of(tmp_path / "out" / "index.html")
    for said in ("No verdict on migu", "02_python/eval.json cannot be read"):
        assert said in printed
        assert said in page
    assert main([str(folder)]) == 1
    assert "02_python/eval.json cannot be read" in capsys.readouterr().err
    text = text_of(folder / "report" / "index.html")
    assert "nothing evaluated yet" in text
    assert "-1" not in text.split("Time")[0].replace("1e-", "")
    (folder / "recipe.yaml").write_text("stages: [{domain: 3}]\n")
    assert main([str(folder)]) == 2
    assert "recipe.yaml is not the recipe of a run: a stage names no domain" in (
        capsys.readouterr().err
    )


def test_a_run_that_stopped_says_where_and_why(tmp_path):
    run = fake_run(tmp_path / "stopped", evaluated=1)
    stopped = {"event": "stopped", "stage": 2, "step": 31, "reason": "the loss is no number"}
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps(stopped) + "\n")
    said = "The run stopped at step 31 of stage 2 (python): the loss is no number."
    assert text_of(write_report(run)).count(said) == 2  # in the summary, and as a warning
    assert said in " ".join(compare([run, fake_run(tmp_path / "ft", enabled=False)]).warnings)
    with (run / "log.jsonl").open("a") as log:  # it was resumed
        log.write(json.dumps({"event": "step", "stage": 2, "step": 31, "loss": 4.0}) + "\n")
    assert said not in text_of(write_report(run))


def test_a_measured_run_is_finished_whatever_its_log_lacks(tmp_path):
    run = fake_run(tmp_path / "whole")
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["event"] == "stage"
    (run / "log.jsonl").write_text("".join(lines[:-1]))
    assert "under way" not in text_of(write_report(run))
    assert load_run(run).finished
    assert load_run(run).damage == []


@pytest.mark.parametrize("asked", [["prose", "math"], ["prose"]])
def test_a_trained_domain_whose_loss_was_not_asked_for_is_no_damage(tmp_path, asked):
    runs = []
    for rate in (5e-4, 1e-3):
        folder = fake_run(tmp_path / str(rate), lr=rate)
        path = folder / "recipe.yaml"
        recipe = yaml.safe_load(path.read_text())
        recipe.setdefault("evaluate", {})["domains"] = asked
        path.write_text(yaml.safe_dump(recipe))
        for found in folder.glob("stages/*/eval.json"):
            record = json.loads(found.read_text())
            record["domains"] = {d: r for d, r in record["domains"].items() if d in asked}
            found.write_text(json.dumps(record))
        runs.append(folder)
    run = load_run(runs[0])
    assert run.damage == []
    assert run.matrix.domains == asked
    assert list(run.trained) == ["math", "python", "cpp"]
    assert any("were not asked for (evaluate.domains)" in w for w in run.warnings)
    assert write_report(runs[0]).is_file()
    assert write_comparison(runs, tmp_path / "out").is_file()


@pytest.mark.parametrize(
    ("settings", "own"),
    [({"start_from": "base"}, True), ({"start_from": "base", "epi": {}}, False), ({}, False)],
)
def test_stages_that_are_models_of_their_own_forget_nothing(tmp_path, settings, own):
    folder = fake_run(tmp_path / "run", trained=("mood", "place"))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **settings}))
    for stage, scores in {"01_mood": (0.9, 0.1), "02_place": (0.1, 0.7)}.items():
        tasks = dict(zip(("mood", "place"), ({"value": v} for v in scores), strict=True))
        (folder / "stages" / stage / "tasks.json").write_text(json.dumps({"tasks": tasks}))
    run = load_run(folder)
    alone = "start_from" in settings
    assert (
        acc(run.matrix)
        == pytest.approx(np.mean([run.matrix.values[1][1], run.matrix.values[2][2]]))
    ) == alone
    for metric in ("bwt", "forgetting", "fwt"):
        assert (METRICS[metric](run.matrix) is None) == alone
    learned, forgotten = learning_curve(run.matrix)[-1]
    prose = run.matrix.values[2][0] - run.matrix.values[0][0]  # which each may forget
    assert METRICS["base_retention"](run.matrix) == pytest.approx(-prose)
    assert (forgotten == pytest.approx(prose)) == alone
    assert learned > 0
    assert not alone or {fall.what for fall in falls(run)} <= {"prose"}
    answered = accuracy_matrix(run)
    assert acc(answered) == pytest.approx(0.8 if own else 0.4)
    assert score(run) == acc(answered)
    assert (METRICS["bwt"](answered) is None) == own
    text = write_report(folder).read_text()
    lost = text.partition("what the model could forget")[2].partition(")")[0]
    assert "prose" in lost
    assert ("mood" in lost) != alone
    assert ("Each stage has a model of its own" in text) == alone
    card = model_card(run, 2, "mit", [], False)
    assert ("as one of several models of their own" in card) == own
    assert ("Trained continually" in card) != own
    other = fake_run(tmp_path / "other", trained=("mood", "place"), enabled=False)
    assert write_comparison([folder, other], tmp_path / "out").is_file()


def test_a_figures_title_is_text():
    svg = svg_of(new_figure(2, 1), "f", 'x"><img src=q onerror=alert(1)>')
    assert "<img" not in svg
    assert 'aria-label="x&quot;&gt;&lt;img' in svg
