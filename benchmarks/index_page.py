"""The index over many runs: how long it takes to build, and to open, sort and filter in Chromium.

    python benchmarks/index_page.py --runs 200

The runs are invented (tests/fake_runs.py). Building is reading all of them and writing the index,
as the first `report.py due` does; `--pages` times that whole call too, with the page of every run,
and the call after it. Opening ends when the page is laid out; sorting is a click on a column's
head, filtering a word typed, each until the page is laid out anew.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.analysis.load import load_run
from eval.due.due import due
from eval.report.index import entry_of, write_index
from tests.browser import CHROMIUM, Browser
from tests.fake_runs import many_runs

TIMED = """((work) => { const start = performance.now(); work();
document.body.offsetHeight; return performance.now() - start; })"""
SORT = "document.querySelectorAll('table.runs th button')[4].click()"
FILTER = "filter.value = '{}'; filter.dispatchEvent(new Event('input'))"
OPENED = "document.body.offsetHeight && performance.getEntriesByType('navigation')[0].loadEventEnd"


def build(root: Path) -> None:
    entries = [entry_of(load_run(path), path.name) for path in sorted(root.iterdir())]
    write_index(root, entries, "now", [])


def seconds(name: str, work: Callable[[], object]) -> None:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(f"{name}: {wall:.2f} s, {processor:.2f} s of a core")


def look(page: Path, folder: Path, rounds: int) -> None:
    browser = Browser(folder)
    took: dict[str, list[float]] = {"opened": [], "sorted": [], "filtered": []}
    for i in range(rounds):
        browser.open(page)
        took["opened"].append(browser.run(OPENED))
        took["sorted"].append(browser.run(f"{TIMED}(() => {SORT})"))
        took["filtered"].append(browser.run(f"{TIMED}(() => {{ {FILTER.format(f'tune {i}')} }})"))
    browser.close()
    for name, times in took.items():
        print(f"{name}: {statistics.median(times):.0f} ms (at most {max(times):.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--rounds", type=int, default=5, help="in the browser (default: 5)")
    parser.add_argument("--pages", action="store_true", help="time whole calls of `due` too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "runs"
        many_runs(root, args.runs)
        seconds(f"index of {args.runs} runs", lambda: build(root))
        if args.pages:
            seconds("report.py due, with every run's page", lambda: due(root))
            seconds("report.py due again", lambda: due(root))
        page = root / "index.html"
        print(f"page: {page.stat().st_size / 1e6:.2f} MB")
        if CHROMIUM:
            look(page, Path(folder) / "chromium", args.rounds)
        else:
            print("there is no Chromium to open it in")


if __name__ == "__main__":
    main()
