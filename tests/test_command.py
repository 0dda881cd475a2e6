"""`migu`: the same programs under one name, recipes of one's own, completion, the wheel."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers import BertConfig, LlamaConfig, PretrainedConfig, RobertaConfig, T5Config

from launch.migu import OWN, programs
from pipeline.engine.config import DS_CONFIGS, load_ds_config
from pipeline.errors import UserError
from pipeline.recipe import Domain
from pipeline.run.completion import completion_script
from pipeline.run.new_recipe import described_recipes, write_recipe
from pipeline.run.recipe_file import RECIPES, load_recipe
from pipeline.run.recipe_keys import markdown, recipe_keys

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = (ast.Import, ast.ImportFrom)
EVERYTHING = bool(os.environ.get("RUN_EVERYTHING"))
TEXT = "\n\n".join(f"Document {i} has a few words." for i in range(30))


def migu(*arguments: str, script: Path = ROOT / "launch/migu.py", **kwargs):
    return subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, **kwargs
    )


def test_every_program_is_listed_and_is_the_same_program():
    files = {p.stem for p in (ROOT / "launch").glob("*.py")} - {"migu", "__init__"}
    assert set(programs()) == files
    assert all(line.endswith(".") for line in programs().values())
    listed = migu().stdout
    assert all(f"migu {name} " in listed for name in files | set(OWN))
    direct = subprocess.run(
        [sys.executable, "launch/prepare.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert migu("prepare", "--help").stdout == direct.stdout != ""


def test_what_a_program_imports_first_is_no_file_of_its_own_folder():
    first = set()  # before it takes its folder off the path: launch/inspect.py hides `inspect`
    for path in (ROOT / "launch").glob("*.py"):
        above, fixed, _ = path.read_text().partition("\nsys.path[:]")
        if fixed:
            first |= {ast.unparse(n) for n in ast.parse(above).body if isinstance(n, IMPORTS)}
    assert "import sys" in first
    code = "\n".join([*sorted(first), "print([m.__file__ for m in sys.modules.values()"])
    code += " if getattr(m, '__file__', None)])"
    run = [sys.executable, "-c", code]
    launch = str(ROOT / "launch")
    loaded = subprocess.run(
        run, env={**os.environ, "PYTHONPATH": launch}, capture_output=True, text=True, check=True
    )
    assert launch not in loaded.stdout


def test_a_wrong_command_is_one_line_with_a_suggestion():
    result = migu("recipe")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "'recipes'" in result.stderr


def test_who_reads_the_first_lines_only_is_no_fault():
    program = f"{sys.executable} launch/migu.py recipes --keys | head -1"
    done = subprocess.run(["bash", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_every_recipe_is_described():
    described = described_recipes()
    assert set(described) == {p.stem for p in RECIPES.glob("*.yaml")}
    assert all(20 < len(line) < 160 and line[0] != "(" for line in described.values())


def save(config: PretrainedConfig, architecture: str, folder: Path) -> str:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return str(folder)


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "architecture", "objective", "length"),
    [
        (RobertaConfig(max_position_embeddings=66, **SIZES), "RobertaForMaskedLM", "masked", 64),
        (BertConfig(**SIZES), "BertForMaskedLM", "masked", 512),
        (LlamaConfig(intermediate_size=16, **SIZES), "LlamaForCausalLM", "causal", 512),
        (
            T5Config(d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1),
            "T5WithLMHeadModel",
            "seq2seq",
            512,
        ),
    ],
)
def test_a_new_recipe_asks_the_model_and_the_files(
    config, architecture, objective, length, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    names = ("law.txt", "my notes.txt", "no.txt", "old.txt")
    for name in names:
        Path(name).write_text(TEXT, encoding="utf-8")
    model = save(config, architecture, tmp_path / "model")
    data = ["law.txt", "notes=my notes.txt,law.txt", "no.txt"]
    recipe = load_recipe(write_recipe("first.yaml", model, data, ["old.txt"]))
    assert recipe.name == "first"
    fractions = {n: d.heldout_fraction for n, d in recipe.data.domains.items()}
    assert fractions.pop("old") == 0.5  # only measured
    assert set(fractions.values()) == {Domain().heldout_fraction}
    assert [s.domain for s in recipe.stages] == ["law", "notes", "no"]
    assert list(recipe.data.domains) == ["law", "notes", "no", "old"]
    assert recipe.data.domains["notes"].files == ["my notes.txt", "law.txt"]
    assert (recipe.model.objective, recipe.data.sequence_length) == (objective, length)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "a/b"}, "'a/b'"),
        ({"name": "there"}, "there.yaml is there already"),
        ({"data": ["none.txt"]}, "none.txt"),
        ({"data": ["a.txt", "a.txt"]}, "two corpora are called 'a'"),
        ({"data": ["rows.jsonl"]}, "'body'. Set `text_field`"),
        ({"data": ["chats.jsonl"]}, "set `chat_field: messages`"),
        ({"data": ["asked.jsonl"]}, "set `instruction: {prompt: prompt, response: output}`"),
        ({"model": "mute"}, "--objective"),
        ({"model": "nowhere/at/all"}, "--model: no such folder: nowhere/at/all"),
        ({"data": ["law="]}, "law=: write NAME=FILE"),
        ({"data": ["?.txt"]}, "as in news=?.txt"),
    ],
)
def test_a_new_recipe_that_cannot_be_is_said_and_nothing_is_written(
    change, says, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT, encoding="utf-8")
    Path("there.yaml").write_text("mine", encoding="utf-8")
    Path("rows.jsonl").write_text('{"body": "some text"}\n' * 3, encoding="utf-8")
    Path("chats.jsonl").write_text('{"messages": []}\n' * 3, encoding="utf-8")
    Path("asked.jsonl").write_text('{"prompt": "a", "output": "b"}\n' * 3, encoding="utf-8")
    save(RobertaConfig(**SIZES), "RobertaForMaskedLM", tmp_path / "model")
    save(RobertaConfig(**SIZES), "RobertaModel", tmp_path / "mute")
    with pytest.raises(UserError) as error:
        write_recipe(**{"name": "new", "model": "model", "data": ["a.txt"], **change})
    assert says in str(error.value)
    assert Path("there.yaml").read_text(encoding="utf-8") == "mine"
    assert not Path("new.yaml").exists()


def test_a_shell_completes_programs_options_recipes_and_keys(tmp_path):
    script = tmp_path / "completion.bash"
    programs_ = [ROOT / "launch/cpt.py", ROOT / "launch/report.py"]
    script.write_text(completion_script("bash", programs_, list(OWN)), encoding="utf-8")
    # zsh reads the same functions through bashcompinit.
    assert completion_script("zsh", [], []).startswith("autoload")

    def completed(*words: str) -> list[str]:
        line = " ".join(f"'{w}'" for w in words)
        code = (
            f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _migu; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        shell = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        return shell.stdout.split()

    assert completed("migu", "re") == ["report", "recipes"]
    assert completed("migu", "cpt", "--dry") == ["--dry-run"]
    assert completed("migu", "cpt", "--recipe", "roberta_das_f") == ["roberta_das_files"]
    assert completed("migu", "cpt", "optimizer.warm") == ["optimizer.warmup="]
    assert completed("migu", "report", "optimizer.warm") == []


def test_every_key_of_a_recipe_is_listed_as_the_code_has_it():
    keys = {key.name: key for key in recipe_keys()}
    for name in ("mask.threshold", "model.lora.r", "stages[].domain", "data.domains.<name>.files"):
        assert f"| `{name}` |" in markdown()
    assert keys["mask.threshold"].meaning == "T: fraction of the rows that is masked"
    assert keys["model.objective"].type.startswith("masked | causal")
    assert (keys["mask.enabled"].type, keys["mask.enabled"].default) == ("true | false", "true")
    assert (keys["stages[].steps"].type, keys["stages[].steps"].default) == ("int | null", "null")
    listed = migu("recipes", "--keys").stdout
    assert all(f"\n{name}" in f"\n{listed}" for name in keys)


def test_the_projects_deepspeed_files_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = load_ds_config(DS_CONFIGS / "zero3.json")
    for name in ("zero3", "zero3.json", "ds_configs/zero3.json"):
        assert load_ds_config(name) == expected
    for name in ("zero9", "elsewhere/zero3.json", "../zero3.json"):
        with pytest.raises(UserError, match=r"no such file; by name: .*zero3"):
            load_ds_config(name)
    Path("zero3").write_text('{"mine": 1}', encoding="utf-8")
    assert load_ds_config("zero3") == {"mine": 1}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The folder of an unpacked wheel of the files that git knows."""
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    if not names:
        pytest.skip("not a git checkout")
    for name in names:
        if not name.startswith(("tests/", "docs/")) and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--no-index", "--wheel-dir", str(folder), str(folder / "source")],
        check=True,
    )  # fmt: skip
    (path,) = folder.glob("migu-*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_runs_from_another_folder(wheel, tmp_path):
    for room in ("launch/recipes", "launch/cluster", "ds_configs", "eval/report/templates"):
        here = {p.relative_to(ROOT) for p in (ROOT / room).rglob("*") if p.is_file()}
        here = {p for p in here if "__pycache__" not in p.parts}
        assert here <= {p.relative_to(wheel) for p in (wheel / room).rglob("*")}, room
    assert "migu = launch.migu:main" in next(wheel.glob("*/entry_points.txt")).read_text()
    run = ["cpt", "--recipe", "demo", "--config", "zero0", "stages=[{domain: math, steps: 1}]"]
    result = migu(
        *(run if EVERYTHING else ["recipes"]), script=wheel / "launch/migu.py", cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert EVERYTHING or result.stdout == migu("recipes").stdout
    assert not EVERYTHING or (tmp_path / "runs/demo/report/index.html").stat().st_size > 1000
