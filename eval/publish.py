"""Share a checkpoint of a run: a folder with its model card, and its upload to the hub."""

import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from eval.analysis.load import Run, load_run
from eval.due.whole import check
from eval.report.card import base_id, model_card, shareable
from pipeline.checkpoint import MANIFEST, is_published, publish
from pipeline.errors import UserError


def write_folder(
    folder: Path,
    stage: int | None,
    license_: str,
    language: list[str],
    merge: bool,
    out: Path | None,
) -> Path:
    """Write what is to be shared of the checkpoint after a stage (None: the last); its folder.

    The files of the checkpoint (linked where the file system can, else copied; with `merge`, the
    adapter merged into its base), the model card and the recipe.

    Raises:
        UserError: no such run or checkpoint; it is damaged; nothing to merge.
    """
    run = load_run(folder)
    stage, checkpoint = _checkpoint(run, stage)
    if damage := check(checkpoint):
        raise UserError(damage)
    adapter = (checkpoint / "adapter_config.json").is_file()
    if merge and not adapter:
        raise UserError(f"--merge has no effect: {checkpoint} is no adapter; leave it out")
    if adapter and not merge and base_id(run.recipe) is None:
        raise UserError(
            f"{checkpoint} is an adapter of a model on no hub, so nobody else could load it; "
            "give --merge"
        )
    target = out or folder / "publish" / f"stage_{stage:02d}"
    if target.exists() and not is_published(target) and any(target.iterdir()):
        raise UserError(f"--out {target}: is there and was not written by this; choose another")

    def write(temporary: Path) -> None:
        if merge:
            _merge(run.recipe, checkpoint, temporary)
        else:
            _link(checkpoint, temporary)
        card = model_card(run, stage, license_, language, merge)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        recipe = _yaml(shareable(run.recipe))
        (temporary / "recipe.yaml").write_text(recipe, encoding="utf-8")

    publish(target, write, {"run": run.name, "stage": stage})
    return target


def upload(folder: Path, to: str, private: bool) -> str:
    """Upload a folder to the model repository `to`, made where it is not there; its address.

    Raises:
        UserError: no such name, no token, no permission, no connection.
    """
    check_name(to)
    api = HfApi()
    try:
        made = api.create_repo(to, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Upload")
        return str(made)
    except LocalTokenNotFoundError:
        raise UserError(
            "no token of the hub: log in with `hf auth login`, or set HF_TOKEN"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        help_ = " Is the token there (`hf auth login`), and may it write there?" * (
            status in (401, 403)
        )
        raise UserError(f"--to {to}: {_first_line(error)}{help_} {_kept(folder)}") from None
    except (OSError, RuntimeError, ValueError) as error:  # whatever a network does
        raise UserError(
            f"--to {to}: cannot upload: {_first_line(error)}. {_kept(folder)}"
        ) from None


def check_name(to: str) -> None:
    """Raises UserError where the hub has no repositories of such a name."""
    try:
        validate_repo_id(to)
    except HFValidationError as error:
        raise UserError(f"--to {to}: {_first_line(error)}; write it as owner/name") from None


def _checkpoint(run: Run, stage: int | None) -> tuple[int, Path]:
    found = {
        int(path.parent.name[:2]): path
        for path in sorted((run.path / "stages").glob("[0-9][0-9]_*/checkpoint"))
        if is_published(path)
    }
    found.pop(0, None)  # nothing of the run's
    if not found:
        raise UserError(f"{run.path} has published no checkpoint yet")
    if stage is None:
        stage = max(found)
    if stage not in found:
        raise UserError(f"--stage {stage}: there are checkpoints of the stages {sorted(found)}")
    return stage, found[stage]


def _link(source: Path, target: Path) -> None:
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        if path.name in (MANIFEST, "README.md"):  # PEFT writes a card of its own
            continue
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except OSError:
            shutil.copyfile(path, place)


def _merge(recipe: dict[str, Any], adapter: Path, target: Path) -> None:
    """Merge an adapter into its base, whose weights are loaded whole: a quantized base is not what
    is published."""
    import torch
    from peft import PeftModel

    from pipeline.model.composed_lora import is_composed
    from pipeline.model.load import AUTO, load_config, load_pretrained
    from pipeline.model.lora import base_of
    from pipeline.model.moe_lora import is_moe_lora
    from pipeline.model.prompt import is_prompt
    from pipeline.recipe import Model

    for is_kind, kind in (
        (is_prompt, "a prompt"),
        (is_moe_lora, "experts with a router"),
        (is_composed, "adapters that each text takes in other shares"),
    ):
        if is_kind(adapter):
            raise UserError(
                f"{adapter}: {kind} cannot be merged into the model; publish it as it is"
            )
    base, revision = base_of(adapter)
    model = recipe.get("model") or {}
    options: dict[str, Any] = {"revision": revision}
    if overrides := model.get("overrides"):  # which the base's own files do not have
        trained = Model(path=base, revision=revision, overrides=overrides)
        options["config"] = load_config(trained)
    auto = AUTO[model.get("objective") or "masked"]
    net: Any = load_pretrained(auto, base, dtype=torch.float32, **options)
    merged: Any = PeftModel.from_pretrained(net, adapter).merge_and_unload()
    merged.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                 "chat_template.jinja", "generation_config.json"):  # fmt: skip
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, target / name)


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _kept(folder: Path) -> str:
    return f"What was to be uploaded is in {folder}."
