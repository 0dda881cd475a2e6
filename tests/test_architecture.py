"""Imports run one way (docs/architecture.md): no room imports one above it, and none is part of a
circle."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# For each room, the rooms of its own package that it may import.
ROOMS = {
    "eval": {
        "sandbox": set(),
        "analysis": set(),
        "measure": {"sandbox"},
        "report": {"analysis"},
        "due": {"sandbox", "analysis", "measure", "report"},
        "": {"sandbox", "analysis", "measure", "report", "due"},  # what assembles them
    },
    "pipeline": {
        "": set(),  # shard, recipe, checkpoint, ranks, ...
        "data": {""},
        "model": {"", "data"},
        "migu": {"", "model"},
        "methods": {"", "data", "model", "migu"},
        "engine": {"", "data", "model", "migu"},
        "run": {"", "data", "model", "migu", "methods", "engine"},
    },
}
ASSEMBLERS = {"pipeline", "pipeline.attachment"}  # above all rooms, beside them in the tree
DEEPEST, LONGEST = 5, 450


def modules(package):
    files = sorted((ROOT / package).rglob("*.py"))
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


ALL = {name: file for package in ROOMS for name, file in modules(package).items()}


@cache
def imports(name, at_load_only=False):
    """The modules of the project that one imports; `at_load_only`: not those within functions, nor
    those for the type checker."""
    found = set()

    def walk(node):
        if at_load_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if at_load_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(inner & set(ALL))
            if not inner <= set(ALL):
                found.add(node.module)
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(ALL[name].read_text(encoding="utf-8")))
    return {other for other in found & set(ALL) if other != name}


def room(name):
    parts = name.split(".")
    return parts[1] if len(parts) > 2 or (ROOT / "/".join(parts[:2])).is_dir() else ""


def below(name, within):
    return {other for other in imports(name, at_load_only=True) if other in within}


def depths(within):
    """How many modules of `within` stand on one another up to each. Raises CycleError."""
    found = {}
    order = TopologicalSorter({name: below(name, within) for name in within}).static_order()
    for name in order:
        found[name] = 1 + max((found[other] for other in below(name, within)), default=0)
    return found


@pytest.mark.parametrize("name", sorted(set(ALL) - ASSEMBLERS))
def test_imports_run_downwards(name):
    package = name.split(".")[0]
    if name == package:
        return
    allowed = ROOMS[package][room(name)] | {room(name)}
    for other in imports(name):
        if other.split(".")[0] == package:
            assert other not in ASSEMBLERS
            assert room(other) in allowed, f"{name} imports {other}"
        else:
            assert package == "eval", f"{name} imports {other}"


def test_no_import_is_part_of_a_circle():
    depths(set(ALL))


@pytest.mark.parametrize("of", [name for name in ROOMS["eval"] if name])
def test_the_rooms_of_eval_are_grasped_at_a_glance(of):
    within = {name for name in ALL if name.startswith(f"eval.{of}.")}
    assert {name: d for name, d in depths(within).items() if d > DEEPEST} == {}
    lines = {name: len(ALL[name].read_text().splitlines()) for name in within}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}
