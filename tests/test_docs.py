"""What the pages say is there: links, programs and their options, recipes, keys, code."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from pipeline.run.completion import options_of
from pipeline.run.recipe_file import RECIPES
from pipeline.run.recipe_keys import recipe_keys

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *RECIPES.rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
GENERATED = {"docs/keys.md"}  # by docs/hooks.py
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every block of code."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """As GitHub and mkdocs name the headings."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", h.lower()).strip() for h in headings]
    return {h.replace(" ", "-") for h in plain}


@each_page
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        name = str(file.relative_to(ROOT))
        assert file.exists() or name in GENERATED, f"{page.name}: {target}"
        if anchor and name not in GENERATED:
            assert anchor in anchors(file), f"{page.name}: {target}"


@each_page
def test_code_is_code(page):
    for language, text in blocks(page):
        if language == "python":
            ast.parse(text)
        if language == "yaml":
            yaml.safe_load(text)


@cache
def known_options(program: str) -> tuple[set[str], bool]:
    options, keys = options_of(ROOT / "launch" / f"{program}.py")
    return set(options), keys


@cache
def known_keys() -> set[str]:
    return {key.name for key in recipe_keys()}


@cache
def free_keys() -> set[str]:
    """Those that hold what has no keys of its own here, as model.config."""
    held = {key.name for key in recipe_keys() if key.type.startswith(("mapping", "list"))}
    return held - {key.rpartition(".")[0] for key in known_keys()}


def is_key(name: str) -> bool:
    """Whether a dotted name is a key, or lies within a mapping whose keys are anything."""
    name = re.sub(r"\[\d*\]", "[]", name)
    for mapping in ("data.domains", "evaluate.benchmarks"):
        name = re.sub(rf"^{re.escape(mapping)}\.[\w+-]+", f"{mapping}.<name>", name)
    if name in known_keys() or name.removesuffix("[]") in known_keys():
        return True
    parents = [name.rpartition(".")[0]]
    while parents[-1]:
        parents.append(parents[-1].rpartition(".")[0])
    return any(p in free_keys() for p in parents if p)


def commands(page: Path) -> list[list[str]]:
    """The words of every command in a block without a language, continued lines joined."""
    found = []
    for language, text in blocks(page):
        if language in ("", "bash", "sh", "console"):
            for line in text.replace("\\\n", " ").splitlines():
                found.append(line.partition(" #")[0].split())
    return [words for words in found if words]


@each_page
def test_commands_name_what_is_there(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page):
        line = " ".join(words)
        if words[0] == "make":
            assert {w for w in words[1:] if "=" not in w} <= targets, line
        at = next((i for i, w in enumerate(words) if re.fullmatch(r"launch/\w+\.py", w)), None)
        program = Path(words[at]).stem if at is not None else None
        if words[0] == "migu" and len(words) > 1 and words[1][0] != "-":
            at, program = 1, words[1]
        if program is None or at is None or program in ("recipes", "new", "completion"):
            continue
        assert (ROOT / "launch" / f"{program}.py").is_file(), line
        options, keys = known_options(program)
        for before, word in zip(words[at:], words[at + 1 :], strict=False):
            word = word.strip("'\"()")
            if word.startswith("--"):
                assert word.partition("=")[0] in options, line
            elif before == "--recipe" and not word.endswith((".yaml", "NAME")):
                assert (RECIPES / f"{word}.yaml").is_file() or (
                    RECIPES / "sweeps" / f"{word}.yaml"
                ).is_file(), line
            elif before == "--config" and word.startswith("ds_configs"):
                assert (ROOT / word).is_file(), line
            elif keys and re.match(r"[a-z_]+[\w.\[\]]*=", word) and before != "--option":
                assert is_key(word.partition("=")[0]), line


DEEPSPEED = {"optimizer.type", "optimizer.params"}  # keys of its JSON


@each_page
def test_keys_that_a_page_names_are_keys(page):
    sections = {key.partition(".")[0].removesuffix("[]") for key in known_keys() if "." in key}
    sections -= {"engine"}  # also an object that pages speak of: engine.shards
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for span in re.findall(r"`([^`\n]+)`", text):
        found = re.match(rf"((?:{'|'.join(sections)})(?:\[\d*\])?\.[a-z][\w.]*)(?:[:= ]|$)", span)
        file = found and re.search(r"\.(py|yaml|jsonl?|md|txt)$", found[1])
        if found and not file and "(" not in span and found[1] not in DEEPSPEED:
            name = re.sub(r"^stages\.", "stages[].", found[1])
            assert is_key(name), f"{page.name}: {span}"


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("material")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert build.returncode == 0, build.stderr
    for page in ("index", "keys", "tutorial", "clusters"):
        path = tmp_path / ("index.html" if page == "index" else f"{page}/index.html")
        text = path.read_text(encoding="utf-8")
        outside = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', text)
        assert not outside
    assert "mask.threshold" in (tmp_path / "keys/index.html").read_text(encoding="utf-8")
