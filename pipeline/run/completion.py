"""`migu completion`: a script by which a shell completes programs, options, recipes and keys."""

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

from pipeline.run.recipe_file import RECIPES
from pipeline.run.recipe_keys import recipe_keys


def completion_script(shell: str, programs: list[Path], own: list[str]) -> str:
    """shell: bash or zsh. programs: files whose parsers are asked for their options; own: further
    names that follow `migu`."""
    cases = []
    # Not those of entries of lists and mappings: their names are the user's.
    keys = [f"{key.name}=" for key in recipe_keys() if not set("[<") & set(key.name)]
    for path in programs:
        options, takes_keys = options_of(path)
        words = [*options, *keys] if takes_keys else options
        cases.append(f'    {path.stem}) words="{" ".join(words)}" ;;')
    names = " ".join([*(p.stem for p in programs), *own])
    recipes = " ".join(p.stem for p in sorted(RECIPES.glob("*.yaml")))
    script = SCRIPT.format(names=names, cases="\n".join(cases), recipes=recipes)
    return ("autoload -U bashcompinit && bashcompinit\n" if shell == "zsh" else "") + script


SCRIPT = """\
_migu() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  if [ "$COMP_CWORD" = 1 ]; then
    COMPREPLY=($(compgen -W "{names}" -- "$word")); return
  fi
  if [ "$before" = --recipe ]; then
    COMPREPLY=($(compgen -W "{recipes}" -- "$word") $(compgen -f -- "$word")); return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [[ "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace 2>/dev/null
  return 0
}}
complete -o default -F _migu migu"""


class _Caught(Exception):
    pass


def options_of(program: Path) -> tuple[list[str], bool]:
    """The options of a program in launch/, and whether it takes `key=value` overrides.

    The program is run until it parses its arguments, which is before it does anything else.
    """

    def caught(self: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        raise _Caught(self)

    names = [n for n in dir(argparse.ArgumentParser) if n.startswith("parse_")]
    before = {n: getattr(argparse.ArgumentParser, n) for n in names}, sys.argv, sys.path[:]
    try:
        for name in names:
            setattr(argparse.ArgumentParser, name, caught)
        sys.argv = [str(program)]
        main = runpy.run_path(str(program), run_name="completion")["main"]
        try:
            main()
        except _Caught as error:
            parser = error.args[0]
    finally:
        for name in names:
            setattr(argparse.ArgumentParser, name, before[0][name])
        sys.argv, sys.path[:] = before[1], before[2]
    options: set[str] = set()
    keys = False
    parsers = [parser]
    while parsers:
        for action in parsers.pop()._actions:
            if action.help != argparse.SUPPRESS:
                options |= {o for o in action.option_strings if o.startswith("--")}
                keys |= action.dest == "overrides"
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
                options |= set(action.choices)
    return sorted(options), keys
