"""What mkdocs makes beside the pages: the first one from README.md, and every key of a recipe."""

import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

KEYS = """\
# Every key of a recipe

Written from the dataclasses of `pipeline/recipe.py`; `migu recipes --keys` prints the same. Any of
them can be overridden on the command line: `optimizer.lr=5e-5`, `stages[0].epochs=2`,
`data.domains.legal.max_documents=1000`. A key that could take no effect beside the others is an
error. [recipes.md](recipes.md) describes the recipes that are here.

"""


def on_config(config):
    """Pages that the navigation does not place come at its end."""
    placed = str(config.nav)
    rest = [p.name for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in placed]
    if rest:
        config.nav.append({"More": rest})
    return config


def on_files(files, config):
    from pipeline.run.recipe_keys import markdown

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=as_page(readme)))
    files.append(File.generated(config, "keys.md", content=KEYS + markdown()))
    return files


def on_page_markdown(markdown, page, config, files):
    """A link to a file of the repository that is no page is its name only."""
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)


def as_page(readme: str) -> str:
    """README.md as it stands in docs/: links into docs/ start there."""

    def moved(link: re.Match) -> str:
        text, target = link[1], link[2]
        if target.startswith("docs/") and re.search(r"\.(md|png|svg|yaml)(#|$)", target):
            return f"[{text}]({target.removeprefix('docs/')})"
        return link[0] if re.match("https?:|#", target) else text

    return re.sub(r"\[([^\]]*)\]\(([^)]*)\)", moved, readme)
