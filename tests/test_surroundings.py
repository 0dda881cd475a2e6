"""What a machine may lack: locks, flushing, UTF-8, caches, long names. It ends in a message."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import checkpoint
from pipeline.checkpoint import publish, read_manifest, verify
from pipeline.errors import UserError, advice
from pipeline.progress import EventLog
from pipeline.run import lock
from pipeline.run.folder import open_run, stage_folder
from pipeline.run.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
name: été
model: {config: {model_type: roberta}, train_tokenizer: 300}
data: {domains: {a: {embedded: prose}, stream: {embedded: math}}}
stages: [{domain: a, steps: 2}]
"""


def recipe_file(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def raises(code: int):
    def fail(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def write(folder: Path) -> None:
    (folder / "weights").write_bytes(b"1")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_flush_publishes(tmp_path, monkeypatch, code):
    monkeypatch.setattr(checkpoint.os, "fsync", raises(code))
    publish(tmp_path / "checkpoint", write, {"stage": 1})
    verify(tmp_path / "checkpoint")
    assert read_manifest(tmp_path / "checkpoint")["stage"] == 1


@pytest.mark.parametrize(
    ("code", "help_"),
    [(errno.ENOSPC, "Free some space"), (errno.EDQUOT, "quota"), (errno.EACCES, "permission"),
     (errno.EROFS, "only be read"), (errno.ENAMETOOLONG, "shorter"), (errno.ESTALE, None)],
)  # fmt: skip
def test_the_advice_fits_the_error(tmp_path, monkeypatch, code, help_):
    monkeypatch.setattr(checkpoint.os, "replace", raises(code))
    with pytest.raises(UserError) as caught:
        publish(tmp_path / "checkpoint", write, {})
    assert os.strerror(code) in str(caught.value)
    assert ("space" in str(caught.value)) == (code == errno.ENOSPC)
    assert help_ is None or help_ in str(caught.value)
    assert advice(RuntimeError(f"I/O error (os error {code})")) == advice(OSError(code, "x"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EACCES])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys, code):
    monkeypatch.setattr(lock.FileLock, "acquire", raises(code))
    recipe = load_recipe(recipe_file(tmp_path))
    if code == errno.EACCES:
        with (
            pytest.raises(UserError, match=r"cannot lock .*permission"),
            open_run(tmp_path / "run", recipe, {}),
        ):
            pass
        return
    with open_run(tmp_path / "run", recipe, {}):
        pass
    assert "has no locks" in capsys.readouterr().out


def test_stages_of_many_domains_have_folders_of_their_own(tmp_path):
    names = ["+".join(f"domain_with_a_long_name_{i}" for i in range(14)) + end for end in "xy"]
    folders = [stage_folder(tmp_path, 1, name) for name in names]
    for folder in folders:
        folder.mkdir(parents=True)  # 255 bytes at most
    assert len(set(folders)) == 2
    assert stage_folder(tmp_path, 1, "a+b").name == "01_a+b"


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "null", "1", "1.5"])
def test_a_name_that_yaml_does_not_read_as_text_is_to_be_quoted(tmp_path, word):
    with pytest.raises(UserError, match=r"YAML reads a key .* in quotes"):
        load_recipe(recipe_file(tmp_path, RECIPE.replace("{a:", f"{{{word}:")))
    quoted = RECIPE.replace("{a:", f'{{"{word}":').replace("domain: a", f'domain: "{word}"')
    assert load_recipe(recipe_file(tmp_path, quoted)).stages[0].domains == [word]


@pytest.mark.parametrize("name", ["stream", "string", "function-x", "list[x", "a"])
def test_keys_are_named_in_full_whatever_a_domain_is_called(tmp_path, name):
    text = RECIPE.replace("stream:", f'"{name}":').replace("{a: {embedded: prose}, ", "{")
    path = recipe_file(
        tmp_path, text.replace("math}", "math, foo: 1}").replace("domain: a", f'domain: "{name}"')
    )
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert f"data.domains.{name}.foo: unknown key, in {path}" in str(caught.value)


def test_what_the_command_line_gave_is_blamed_on_it(tmp_path):
    path = recipe_file(tmp_path)
    for override, key in (
        ("optimizer={lr: x}", "optimizer.lr"),
        ("stages=[{domain: a, stepps: 1}]", "stages[0].stepps"),
        ("train.batch_size=x", "train.batch_size"),
        ("stages=[", "stages=["),
        ("name=${missing}", "missing"),
    ):
        with pytest.raises(UserError) as caught:
            load_recipe(path, [override])
        line = next(x for x in str(caught.value).splitlines() if x.startswith("  ") and key in x)
        assert f"in {path}" not in line
        assert "command line" in line or "missing" in line


def test_the_log_goes_on_after_half_a_line(tmp_path):
    path = tmp_path / "log.jsonl"
    log = EventLog(path)
    log.write("stage", stage=1)
    log.close()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"event": "stage", "sta')
    log = EventLog(path)
    assert [log.has_stage(stage) for stage in (1, 2)] == [True, False]
    log.write("stage", stage=2)
    assert log.has_stage(2)
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["stage"] == 2


def test_a_command_works_from_elsewhere_in_another_locale_and_without_caches(tmp_path):
    """With what launchers add, and defaults that lie in the project's folder."""
    environment = {
        **os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
        "HF_HOME": "/dev/null/x", "MIGU_CACHE": "/dev/null/y", "TMPDIR": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, ROOT / "launch/cpt.py", "--local-rank=0", "--dry-run", "--recipe",
         recipe_file(tmp_path), "stages=[{domain: a, steps: 2}]", "name=là"],
        cwd=tmp_path, env=environment, capture_output=True, timeout=200,
    )  # fmt: skip
    output = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, output
    assert "name: là" in output
    assert "no cache can be written there; using" in output


def test_no_file_of_launch_hides_a_library_of_its_name():
    names = sorted(p.stem for p in (ROOT / "launch").glob("*.py"))
    code = (
        "import runpy, sys, importlib.util as u\n"
        "for name in sys.argv[2:]:\n"
        "    before = list(sys.path)\n"
        "    sys.path.insert(0, sys.argv[1])\n"
        "    runpy.run_path(f'{sys.argv[1]}/{name}.py', run_name='other')\n"
        "    found = [u.find_spec(n) for n in sys.argv[2:]]\n"
        "    assert not [f for f in found if f and str(f.origin).startswith(sys.argv[1])], name\n"
        "    sys.path[:] = before\n"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT / "launch"), *names], check=True)
