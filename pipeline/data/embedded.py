"""Corpora that every Python installation with this project's dependencies already carries.

Four domains for demos and tests (`prose`, `math`, `python`, `cpp`) and three spare ones, read in
place from the standard library, the installed packages' documentation and torch's C++ headers.
Sources are parsed, never imported, and nothing is redistributed: what is extracted lies only in
the user's own cache folder.
"""

import ast
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import re
import sysconfig
import tempfile
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from pipeline.data.instruct import Document, Example
from pipeline.data.toy_tasks import TOY_TASKS, toy_examples
from pipeline.errors import UserError

EMBEDDED: dict[str, str] = {
    "prose": "the Python language reference, package READMEs, standard-library docstrings",
    "math": "sympy's docstrings",
    "python": "standard-library source without comments and docstrings",
    "cpp": "torch's C++ headers without comments",
    "torch_docs": "torch's docstrings",
    "networkx_docs": "networkx's docstrings",
    "numpy_docs": "numpy's docstrings",
    "functions": "instructions: documented functions of the standard library and of packages",
}
INSTRUCTIONS = ("functions",)  # these consist of Examples, the others of texts

VERSION = 2  # raise it when the extraction changes, so that no older cache is read
MAX_BYTES = 2_500_000  # UTF-8 bytes of one corpus
PIECE = 3000  # characters from which a document may end, at an unindented line
MAX_PIECE = 9000  # characters from which it ends at the next blank line

# What a domain reads beside the standard library. For prose: packages whose README is long, and
# which are there because this project or one of its dependencies needs them.
READMES = [
    *("accelerate", "datasets", "deepspeed", "filelock", "fsspec", "huggingface_hub", "jinja2"),
    *("matplotlib", "networkx", "numpy", "omegaconf", "packaging", "peft", "pillow", "psutil"),
    *("pyarrow", "regex", "requests", "safetensors", "sympy", "tokenizers", "torch", "tqdm"),
    "transformers",
]
PACKAGES = {
    "prose": READMES,
    "math": ["sympy"],
    "python": [],
    "cpp": ["torch"],
    "torch_docs": ["torch"],
    "networkx_docs": ["networkx"],
    "numpy_docs": ["numpy"],
    "functions": ["networkx", "sympy", "numpy"],
}

# Not code that people write: tests, generated tables, bundled wheels, the tables of encodings.
# The named modules repeat text of others, so that they would leak from training into held-out.
LEFT_OUT = {
    *("test", "tests", "testing", "benchmarks", "site-packages", "dist-packages", "__pycache__"),
    *("_vendor", "_bundled", "idlelib", "encodings", "pydoc_data", "turtledemo"),
}
LEFT_OUT_FILES = {
    *("html/entities.py", "locale.py", "_pydecimal.py"),
    "torch/csrc/jit/serialization/mobile_bytecode_generated.h",
}


def cache_dir() -> Path:
    """Folder of extracted corpora: $MIGU_CACHE, $XDG_CACHE_HOME/migu, or ~/.cache/migu."""
    if folder := os.environ.get("MIGU_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "migu"


def embedded_documents(name: str) -> list[Document]:
    """The documents of one embedded corpus, at most 2.5 MB, extracted once and then cached.

    A document is a file, or a run of neighbouring definitions or sections of it (3 to 9 kB where
    the file is long enough); in `functions`, one function. The order is fixed and mixed: any
    prefix is a fair sample. Raises UserError for an unknown name and for a package that is not
    installed.
    """
    if name in TOY_TASKS:
        return list(toy_examples(name))
    if name not in EMBEDDED:
        raise UserError(f"no embedded corpus is called {name!r}; choose one of: {choices()}")
    from filelock import FileLock

    path = cache_dir() / f"{name}-{embedded_version(name)}.jsonl.gz"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # one rank extracts, the others wait and read
            documents = _read(path)
            if documents is None:
                documents = _extract(name)
                _write(path, documents)
            return documents
    except OSError:  # the cache folder cannot be written: go on without it
        return _extract(name)


def choices() -> str:
    """The names of the embedded corpora, as one line for messages."""
    return ", ".join([*EMBEDDED, *TOY_TASKS])


def embedded_version(name: str) -> str:
    """Twelve hex digits that change with whatever changes the extracted text."""
    if name in TOY_TASKS:
        return hashlib.sha1(repr(toy_examples(name)).encode()).hexdigest()[:12]
    versions = [f"{package} {_version(package)}" for package in PACKAGES[name]]
    key = f"{VERSION} {name} {platform.python_version()} {versions}"
    return hashlib.sha1(key.encode()).hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> list[Document] | None:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return [row["text"] if "text" in row else Example(**row) for row in rows]
    except (OSError, EOFError, ValueError, TypeError, KeyError):  # absent or damaged: extract again
        return None


def _write(path: Path, documents: list[Document]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as raw, gzip.open(raw, "wt", encoding="utf-8") as file:
            for document in documents:
                row = {"text": document} if isinstance(document, str) else document._asdict()
                file.write(json.dumps(row) + "\n")
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def _extract(name: str) -> list[Document]:
    """Read the sources until the cap is reached; the order of files is fixed by a hash."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    if name == "functions":
        return list(_functions(stdlib))
    texts: Iterable[str]
    if name == "prose":
        docstrings = map(_docstrings, _files(stdlib, ".py"))
        texts = chain(_topics(stdlib), _readmes(READMES), docstrings)
    elif name == "python":
        texts = map(_bare_python, _files(stdlib, ".py"))
    elif name == "cpp":
        # ATen/ops is generated: thousands of headers that differ only in names
        texts = map(_bare_cpp, _files(_package(name) / "include", ".h", left_out={"ops"}))
    else:
        texts = map(_docstrings, _files(_package(name), ".py"))

    documents: list[str] = []
    size = 0
    for document in _without_repeats(piece for text in texts for piece in _pieces(text)):
        size += len(document.encode())
        if size > MAX_BYTES:
            break
        documents.append(document)
    return [*sorted(documents, key=lambda text: hashlib.md5(text.encode()).digest())]


def _package(name: str) -> Path:
    (package,) = PACKAGES[name]
    return _package_folder(name, package)


def _package_folder(name: str, package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        installed = importlib.util.find_spec
        ready = [n for n in EMBEDDED if n == "prose" or all(map(installed, PACKAGES[n]))]
        raise UserError(
            f"the embedded corpus {name!r} is read from the package {package!r}, which is not "
            f"installed: `pip install {package}`, or choose one of: {', '.join(ready)}"
        )
    return Path(spec.submodule_search_locations[0])


def _files(root: Path, suffix: str, left_out: Iterable[str] = ()) -> list[Path]:
    """The source files under `root`, in an order fixed by a hash of their relative paths."""
    skip = LEFT_OUT.union(left_out)
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip]
        paths = (Path(folder, name).relative_to(root).as_posix() for name in names)
        found += [path for path in paths if path.endswith(suffix) and path not in LEFT_OUT_FILES]
    return [root / path for path in sorted(found, key=lambda p: hashlib.md5(p.encode()).digest())]


def _topics(stdlib: Path) -> list[str]:
    """The sections of the language reference that `help()` shows."""
    path = stdlib / "pydoc_data" / "topics.py"
    if not path.exists():  # some distributions leave it out
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (table,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
    return [text for _, text in sorted(ast.literal_eval(table).items())]


def _readmes(packages: list[str]) -> Iterator[str]:
    for package in packages:
        if _version(package):
            fields = importlib.metadata.metadata(package).json
            lines = str(fields.get("description", "")).splitlines()
            # badges, pictures and HTML are not prose
            yield "\n".join(x for x in lines if not re.match(r"\s*(<|\[?!\[)", x))


def _parse(path: Path) -> tuple[str, ast.Module] | None:
    """Source and syntax tree, or None for files that are not Python of this version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            source = path.read_text(encoding="utf-8")
            return source, ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(tree: ast.Module) -> list[Documented]:
    """Module, classes and functions that have a docstring, in the order of the source."""
    nodes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, Documented) and ast.get_docstring(node, clean=False)
    ]
    return sorted(nodes, key=lambda node: node.body[0].lineno)


def _docstrings(path: Path) -> str:
    parsed = _parse(path)
    if parsed is None:
        return ""
    texts = (ast.get_docstring(node) or "" for node in _documented(parsed[1]))
    return "\n\n".join(text for text in texts if len(text) > 80)


def _bare_python(path: Path) -> str:
    """Source as it is written, without its docstrings and comments."""
    parsed = _parse(path)
    if parsed is None:
        return ""
    source, tree = parsed
    lines = source.splitlines()
    dropped: set[int] = set()
    for node in _documented(tree):
        docstring = node.body[0]
        rows = range(docstring.lineno - 1, docstring.end_lineno or 0)
        dropped.update(rows)
        if len(node.body) == 1 and not isinstance(node, ast.Module):
            lines[rows[0]] = " " * docstring.col_offset + "pass"
            dropped.remove(rows[0])
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.start[0] <= len(lines):
            row, column = token.start[0] - 1, token.start[1]
            lines[row] = lines[row][:column].rstrip()
            if not lines[row]:
                dropped.add(row)
    return "\n".join(line for row, line in enumerate(lines) if row not in dropped)


# strings and characters come first, so that what looks like a comment inside them stays
_CPP = re.compile(
    r'R"(?P<tag>[^\s()\\]*)\(.*?\)(?P=tag)"|"(?:\\.|[^"\\\n])*"|'
    r"'(?:\\.|[^'\\\n])+'|(?P<comment>//(?:\\\n|[^\n])*|/\*.*?\*/)",
    re.DOTALL,
)


def _bare_cpp(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    text = _CPP.sub(lambda match: "" if match["comment"] else match[0], text)
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)


def _pieces(text: str) -> Iterator[str]:
    """Cut a file between paragraphs, where possible before one that is not indented."""
    piece: list[str] = []
    size = 0
    for paragraph in re.split(r"\n\s*\n(?=[ \t]*\S)", text.strip()):
        if size >= (MAX_PIECE if paragraph[:1].isspace() else PIECE):
            yield "\n\n".join(piece)
            piece, size = [], 0
        piece.append(paragraph.rstrip())
        size += len(paragraph) + 2
    yield "\n\n".join(piece)


def _without_repeats(documents: Iterable[str]) -> Iterator[str]:
    """Leave out paragraphs seen before (in any document), then documents with little left."""
    seen: set[str] = set()
    for document in documents:
        kept = []
        for paragraph in document.split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) < 40:  # headings and one-liners may repeat
                kept.append(paragraph)
            elif key not in seen:
                seen.add(key)
                kept.append(paragraph)
        text = "\n\n".join(kept)
        if len(text) >= 300:
            yield text


def _functions(stdlib: Path) -> Iterator[Example]:
    """Write this function, given its signature and what it does; each body once."""
    folders = [stdlib, *(_package_folder("functions", p) for p in PACKAGES["functions"])]
    found: dict[str, Example] = {}
    for folder in folders:
        size = 0
        for path in _files(folder, ".py", left_out=("lib2to3", "distutils")):
            for example in _documented_functions(path):
                found.setdefault(example.response.partition("\n")[2], example)
                size += len(example.prompt) + len(example.response)
            if size > MAX_BYTES / len(folders):
                break
    yield from sorted(found.values(), key=lambda e: hashlib.md5(e.response.encode()).digest())


def _documented_functions(path: Path) -> Iterator[Example]:
    """Functions of a module (no methods) with a docstring, neither trivial nor long."""
    parsed = _parse(path)
    if parsed is None:
        return
    for node in parsed[1].body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        if node.decorator_list or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node) or ""
        description = docstring.partition("\n\n")[0].strip()
        del node.body[0]
        code = ast.unparse(node)  # without comments, in one style
        if 20 <= len(description) <= 400 and 60 <= len(code) <= 1200:
            signature = code.partition("\n")[0].removeprefix("def ").rstrip(":")
            yield Example(f"Write a Python function `{signature}`. {description}", "", code)
