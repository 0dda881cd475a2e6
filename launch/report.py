"""Write the page of a run, or the comparison of several; or all that is due in a folder of runs.

python launch/report.py runs/demo
python launch/report.py runs/ft runs/migu runs/random --out comparison
python launch/report.py due --root runs --budget 2h
"""

import argparse
import sys
from pathlib import Path

# The project's folder instead of this one, whose files would hide libraries of the same names.
HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [str(Path(HERE).parent), *(p for p in sys.path if str(Path(p).resolve()) != HERE)]

from eval.analysis.load import load_run
from eval.report.compare import compare, terminal_summary, write_comparison
from eval.report.page import write_report
from pipeline.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0; 1 where a run is damaged, so that there is a page but no verdict
    on it; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(
        prog="launch/report.py",
        description="Write the report page of one run, or a page that compares several runs at "
        "equal learning.",
        epilog="One run: RUN/report/index.html. Several: a comparison, in the order given; speeds "
        "are relative to the first run, so name the baseline first. Runs may be unfinished. The "
        "pages are single files that need no network. `due`: evaluate what is not evaluated yet of "
        "all runs of a folder, and write their pages and the index over them; for a schedule, as "
        "often as one likes (docs/reports.md).",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder, e.g. runs/demo; or: due"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the comparison (default: 'comparison' beside the first run)",
    )
    due = parser.add_argument_group("report.py due")
    add = due.add_argument
    add("--root", type=Path, metavar="DIR", help="the folder of the runs (default: runs)")
    add("--budget", metavar="TIME", help="evaluate for so long, e.g. 2h (default: no limit)")
    add("--every", metavar="TIME", help="stay alive and do it every so often, e.g. 6h")
    add("--notify", type=Path, metavar="YAML", help="whom to tell of what")
    options = parser.parse_args(arguments)
    if options.runs == [Path("due")]:
        if options.out:
            parser.error("--out is for comparisons")
        return _due(options)
    for name in ("root", "budget", "every", "notify"):
        if getattr(options, name) is not None:
            parser.error(f"--{name} is for `report.py due`")
    try:
        if len(options.runs) == 1:
            if options.out:
                parser.error("--out is for comparisons; the page of one run lies in its folder")
            page = write_report(options.runs[0])
            damage = load_run(options.runs[0]).damage
            for text in damage:
                print(f"warning: {text}", file=sys.stderr)
        else:
            out = options.out or options.runs[0].resolve().parent / "comparison"
            page = write_comparison(options.runs, out)
            comparison = compare(options.runs)
            damage = comparison.damaged
            print(terminal_summary(comparison))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write the report: {error}", file=sys.stderr)
        return 2
    print(f"page: {page}")
    return 1 if damage else 0


def _due(options: argparse.Namespace) -> int:
    from eval.due.command import due_command

    try:
        due_command(options.root or Path("runs"), options.budget, options.every, options.notify)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the next call goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
