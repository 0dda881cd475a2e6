"""One command for every program: `migu cpt` is `python launch/cpt.py`, and so on.

migu                            what there is
migu cpt --recipe demo          continual pretraining, in this process
migu recipes                    the recipes, with a line each
migu new legal --model FOLDER --data legal.txt
"""

import argparse
import ast
import os
import sys
from pathlib import Path
from typing import NoReturn

# The project's folder instead of this one, whose files would hide libraries of the same names.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p).resolve() != HERE)]

OWN = {
    "recipes": "The recipes that --recipe takes by name, with a line each.",
    "new": "Write a commented recipe for a model and text of your own.",
    "completion": "Print what a shell needs to complete this command: bash, zsh.",
}


def programs() -> dict[str, str]:
    """Name -> the first line of its docstring, of every program in this folder."""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        if path.stem not in ("migu", "__init__"):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = text.split("\n\n")[0].replace("\n", " ")
    return found


def overview() -> str:
    rows = programs() | OWN
    width = max(map(len, rows))
    lines = [f"  migu {name:<{width}}  {line}" for name, line in rows.items()]
    return "\n".join(
        [
            "Continual pretraining and fine-tuning, measured after every stage.",
            "",
            *lines,
            "",
            "Each takes --help. Several GPUs or nodes: the programs are modules for a launcher,",
            "  deepspeed --module launch.cpt --config ds_configs/zero2.json --recipe my.yaml",
            "  torchrun --nproc_per_node 8 -m launch.cpt --recipe my.yaml engine.kind=fsdp",
        ]
    )


def main() -> NoReturn:
    name, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name in programs():
        # Its own process, so that it is the same program in every respect: signals, spawned
        # processes and the printed command line.
        script = str(HERE / f"{name}.py")
        os.execv(sys.executable, [sys.executable, script, *arguments])
    if name in ("-h", "--help", "help"):
        print(overview())
        sys.exit(0)
    from pipeline.run.cli import run_command

    if name not in OWN:
        from pipeline.errors import near

        print(
            f"error: migu {name}: no such command{near(name, [*programs(), *OWN])}; "
            "`migu` lists them",
            file=sys.stderr,
        )
        sys.exit(2)
    run_command(lambda: {"recipes": recipes, "new": new, "completion": completion}[name](arguments))


def recipes(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("migu recipes", description=OWN["recipes"])
    parser.add_argument("--keys", action="store_true", help="every key that a recipe can have")
    if parser.parse_args(arguments).keys:
        from pipeline.run.recipe_keys import recipe_keys

        for key in recipe_keys():
            default = f" = {key.default}" if key.default else ""
            print(f"{key.name}{default}  ({key.type})\n    {key.meaning}".rstrip())
        return

    from pipeline.run.new_recipe import described_recipes

    known = described_recipes()
    width = max(map(len, known))
    for name, line in known.items():
        print(f"{name:<{width}}  {line}")
    print("\nmigu cpt --recipe NAME --dry-run shows one with everything filled in.")


def new(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("migu new", description=OWN["new"])
    parser.add_argument("name", metavar="NAME", help="of the run; the recipe is NAME.yaml")
    parser.add_argument("--model", required=True, metavar="M", help="a folder or a hub id")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="FILES",
        help="one domain each, learned in this order: .txt, .json[l] [.gz, .zst], .parquet; "
        "NAME=FILE[,FILE] names a domain",
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        default=[],
        metavar="FILES",
        help="text that the model knows already: only measured, as what may be forgotten",
    )
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="of a row (default: %(default)s)"
    )
    parser.add_argument(
        "--objective",
        choices=("masked", "causal", "seq2seq"),
        help="default: what the model's configuration says",
    )
    o = parser.parse_args(arguments)

    from pipeline.run.new_recipe import write_recipe

    path = write_recipe(o.name, o.model, o.data, o.keep, o.objective, o.text_field)
    print(
        f"wrote {path}; read it, then\n"
        f"  migu cpt --recipe {path} --dry-run   check it: steps, tokens, memory\n"
        f"  migu cpt --recipe {path}             train and measure; the same again continues\n"
        f"  migu report runs/{path.stem}            its page"
    )


def completion(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("migu completion", description=OWN["completion"])
    parser.add_argument("shell", choices=("bash", "zsh"))
    shell = parser.parse_args(arguments).shell

    from pipeline.run.completion import completion_script

    print(completion_script(shell, [HERE / f"{name}.py" for name in programs()], list(OWN)))


if __name__ == "__main__":
    main()
