"""What a command needs of the machine: UTF-8, and folders for caches that can be written.

Called before anything heavy is imported: libraries read these settings when they are imported.
"""

import io
import locale
import os
import sys
import tempfile
from pathlib import Path


def read_and_write_utf8() -> None:
    """Start this command again in Python's UTF-8 mode where the locale has another encoding.

    Names of files and fields, configurations and templates are UTF-8 whatever the locale, also for
    the libraries that open them without saying so. Processes that this one starts inherit it.
    """
    if not sys.flags.utf8_mode and locale.getpreferredencoding(False).lower() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may have its own encoding


def use_caches_that_exist() -> None:
    """Where a cache folder cannot be made, take one among the temporary files, and say so.

    A folder that is there but cannot be written is still read; what libraries must write goes to
    the temporary one then.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = Path(os.environ.get("HF_HOME") or f"{home}/huggingface").expanduser()
    written = ("HF_DATASETS_CACHE", "HF_MODULES_CACHE") if hub.is_dir() else ("HF_HOME",)
    ours = Path(os.environ.get("MIGU_CACHE") or f"{home}/migu").expanduser()
    for folder, variables in ((hub, written), (ours, ("MIGU_CACHE",))):
        missing = [v for v in variables if v in ("HF_HOME", "MIGU_CACHE") or v not in os.environ]
        if missing and not _writable(folder):
            instead = _temporary()
            os.environ.update({v: str(instead / v.lower()) for v in missing})
            if int(os.environ.get("RANK", 0)) == 0:
                print(f"{folder}: no cache can be written there; using {instead} (set "
                      f"{', '.join(missing)} to choose another)", file=sys.stderr)  # fmt: skip


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _temporary() -> Path:
    """The same folder for all the ranks of this machine, and nobody else's."""
    folder = Path(tempfile.gettempdir()) / f"migu-cache-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid == os.getuid() and folder.is_dir() and not folder.is_symlink():
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="migu-cache-"))
