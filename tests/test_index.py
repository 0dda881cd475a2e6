"""The page of all runs: in a browser, on a phone, for a keyboard and a screen reader; and what it
calls a fall."""

import json
import re
import shutil
import subprocess
import tarfile
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from eval.analysis.falls import falls
from eval.analysis.load import load_run
from eval.report.index import Entry, entry_of, from_json, over_time, write_index
from tests.browser import CHROMIUM, Browser
from tests.fake_runs import fake_run, fake_tuning, many_runs

HOSTILE = "<img src=x onerror=alert(1)>\u202e"
COUNT = 200


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """(folder, entries, seconds of this process that they took) of 200 runs."""
    root = tmp_path_factory.mktemp("many")
    many_runs(root, COUNT)
    start = time.process_time()
    entries = [entry_of(load_run(path), path.name) for path in sorted(root.iterdir())]
    write_index(root, entries, "now", ["a note"])
    seconds = time.process_time() - start
    for i, entry in enumerate(entries):
        entry.page, entry.started = True, f"2026-01-{1 + i % 28:02d}T10:00:00+00:00"
        entry.setting = f"{i % 90}"
    entries[7].name = HOSTILE
    entries[7].state, entries[7].problems = "damaged", [HOSTILE, "differs from its SHA-256"]
    entries.append(Entry("empty folder", "unreadable", ["it is empty"]))
    write_index(root, entries, "2026-11-25 06:00 UTC", [])
    return root, entries, seconds


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def axe(request):
    """The source of axe-core, from npm."""
    npm, folder = shutil.which("npm"), request.config.cache.mkdir("axe-core")
    if npm is None:
        pytest.skip("there is no npm to get axe-core with")
    if not (found := sorted(folder.glob("*.tgz"))):
        got = subprocess.run([npm, "pack", "axe-core@4"], cwd=folder, capture_output=True)
        if got.returncode:
            pytest.skip("axe-core cannot be had from npm here")
        found = sorted(folder.glob("*.tgz"))
    with tarfile.open(found[0]) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


def test_an_index_of_many_runs_is_built_at_once(many):
    _, _, seconds = many
    assert seconds < 12  # 4.4 where nothing else runs; twice that beside other tests


def test_the_page_is_one_file_that_allows_nothing_else(many):
    page = (many[0] / "index.html").read_text()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy.startswith("default-src &#39;none&#39;") or policy.startswith(
        "default-src 'none'"
    )
    assert "unsafe" not in policy
    assert " style=" not in page
    assert not re.search(r"<(link|img|iframe|object)\b|url\(|@import|https?://", page)
    assert "<img" not in page
    assert "\u202e" not in page


def test_the_page_opens_by_itself_sorts_and_filters(browser, many):
    root, entries, _ = many
    browser.open(root / "index.html")
    assert [e for e in browser.seen if e["method"] in ("Runtime.exceptionThrown",
            "Log.entryAdded")] == []  # fmt: skip
    requests = [e["params"]["request"]["url"] for e in browser.seen
                if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert all(url.startswith("file:") and url.endswith("index.html") for url in requests)
    browser.run(
        """window.table = document.querySelector("table.runs");
        window.column = (name) => [...table.tHead.rows[0].cells].find(
          (c) => c.textContent.startsWith(name));
        window.visible = () => [...table.tBodies[0].rows].filter((r) => !r.hidden); 0"""
    )
    known = sorted((e.learned for e in entries if e.learned is not None), reverse=True)
    for sign in (1, -1):  # a second click turns the order around
        browser.run("column('Learned').querySelector('button').click()")
        values = browser.run("visible().map((r) => r.cells[column('Learned').cellIndex].dataset.v)")
        numbers = [float(value) for value in values if value]
        assert numbers == pytest.approx(known[::-sign])
        assert not any(values[len(numbers) :])  # what has none comes last
    assert browser.run("column('Learned').getAttribute('aria-sort')") == "descending"
    browser.run("filter.value = 'TUNE 1'; filter.dispatchEvent(new Event('input'))")
    texts = ["".join((e.name, e.folder, e.method, e.model)) for e in entries]
    wanted = [text for text in texts if "tune" in text and "1" in text]
    assert browser.run("visible().length") == len(wanted)
    assert str(len(wanted)) in browser.run("document.getElementById('shown').textContent")
    browser.run("filter.value = ''; document.getElementById('state').value = 'damaged'; "
                "document.getElementById('state').dispatchEvent(new Event('change'))")  # fmt: skip
    assert browser.run("visible().length") == 1


def test_the_keyboard_sorts(browser, many):
    browser.open(many[0] / "index.html")
    browser.run("document.querySelector('table.runs th:nth-child(5) button').focus()")
    browser.key("Enter", 13)
    browser.key("Enter", 13)
    assert browser.run("document.querySelector('[aria-sort]').ariaSort") == "descending"


@pytest.mark.parametrize(("phone", "dark"), [(False, False), (True, True)], ids=["desk", "phone"])
def test_the_page_is_accessible_and_fits(browser, many, axe, phone, dark):
    browser.open(many[0] / "index.html", phone, dark)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == dark
    browser.run(axe + "; 0")
    # Every 16th row: all are of one template, and the checker looks at each pixel of each.
    browser.run("document.querySelectorAll('table.runs tbody tr').forEach("
                "(row, i) => { if (i % 16) row.remove(); })")  # fmt: skip
    found = browser.run("axe.run().then((r) => JSON.stringify(r.violations.map("
                        "(v) => [v.id, v.help, v.nodes[0].html.slice(0, 200)])))")  # fmt: skip
    assert json.loads(found) == []


def test_entries_survive_their_json(many):
    for entry in many[1][::20]:
        assert json.dumps(asdict(from_json(json.loads(json.dumps(asdict(entry)))))) == (
            json.dumps(asdict(entry))
        )


@pytest.mark.parametrize("damage", [-0.03, 0.25])
def test_a_score_has_fallen_where_it_is_beyond_the_noise(tmp_path, damage):
    run = load_run(fake_tuning(tmp_path / "run", damage=damage, limit=400, every=8))
    fallen = [fall for fall in falls(run) if fall.kind == "score"]
    assert {fall.what for fall in fallen} == (
        {"hellaswag", "arc_challenge", "winogrande"} if damage > 0 else set()
    )
    for fall in fallen:
        before, after = (p.scores[fall.what].value for p in run.points if p.stage in (0, 1))
        assert fall.change == pytest.approx(after - before)
        assert -fall.change > fall.noise > 0


def test_a_slow_fall_is_held_against_the_model_before_training(tmp_path):
    run = fake_tuning(tmp_path / "run", trained=("code", "law"), damage=0.0, every=8, limit=400)
    for stage, value in enumerate((0.50, 0.48, 0.46)):
        path = next((run / "stages").glob(f"{stage:02d}_*")) / "benchmarks.json"
        record = json.loads(path.read_text())
        record["benchmarks"] = {"piqa": {"value": value, "stderr": 0.012}}
        path.write_text(json.dumps(record))
    (fall,) = [fall for fall in falls(load_run(run)) if fall.what == "piqa"]
    assert (fall.stage, fall.since) == (2, 0)


def test_losses_count_where_they_could_be_forgotten(tmp_path):
    """Paired over the sequences the noise is a part of what it is for independent texts."""
    paired, alone = (
        falls(load_run(fake_run(tmp_path / name, heldout=text, stderr=0.05)))
        for name, text in (("paired", "text"), ("alone", None))
    )
    assert {fall.what for fall in paired} == {"prose", "math", "python"}
    for fall in paired:
        assert fall.kind == "loss"
        assert fall.change > fall.noise
        for other in alone:
            if (other.what, other.stage, other.since) == (fall.what, fall.stage, fall.since):
                assert fall.noise < 0.5 * other.noise


def test_runs_of_one_recipe_are_read_over_time(tmp_path):
    entries = []
    for i, (value, day) in enumerate([(0.5, "01"), (0.4, "03"), (0.51, "02")]):
        run = fake_tuning(tmp_path / f"r{i}", seed=i, damage=0.0, every=8)
        entry = entry_of(load_run(run), run.name)
        entry.started = f"2026-01-{day}T00:00:00+00:00"
        entry.scores = {"piqa": [(0, 0.5, 0.02), (1, value, 0.02)]}
        entries.append(entry)
    other = entry_of(load_run(fake_run(tmp_path / "other")), "other")
    broken = entry_of(load_run(fake_tuning(tmp_path / "clock", every=8)), "clock")
    broken.started, broken.scores = "not a date", {"piqa": [(1, 0.5, None)]}
    failed = entry_of(load_run(fake_tuning(tmp_path / "failed", every=8)), "failed")
    failed.scores = {"piqa": [(0, 0.5, 0.02)]}  # not measured at the end, which is what is read
    series = {s.what: s for s in over_time([*entries, other, broken, failed])}
    assert series["piqa"].runs == ["clock", "r0", "r2", "r1"]
    assert series["piqa"].worse == [False, False, False, True]
    assert series["piqa"].change == pytest.approx(-0.11)


def test_an_index_of_nothing_is_a_page(tmp_path):
    assert "0 folders" in Path(write_index(tmp_path, [], "now", [])).read_text()
