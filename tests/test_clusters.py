"""`mask.clusters`: rows that are kept or masked together."""

import pytest
import torch

from pipeline.errors import UserError
from pipeline.methods.domain_text import domain_batches
from pipeline.methods.method import Start, Teacher
from pipeline.migu.clusters import group_means, grouped, k_means, random_groups
from pipeline.migu.gradient_mask import GradientMask
from pipeline.migu.targets import find_targets
from pipeline.model.lora import add_adapter
from pipeline.recipe import Lora, Mask, Stage
from pipeline.run.recipe_file import load_recipe
from pipeline.run.row_groups import STREAM, row_groups
from pipeline.shard import ParameterShards
from tests.reference import MODELS
from tests.test_anchor import tokenizer_of
from tests.test_baselines import texts
from tests.test_finetune import RECIPE
from tests.test_parity import recipe_for


def test_k_means_finds_what_lies_apart_and_random_groups_are_of_one_size():
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    known = torch.arange(60) % 3
    groups = k_means(centres[known] + 0.1 * torch.randn(60, 2), 3, seed=3)
    assert len({(int(a), int(b)) for a, b in zip(known, groups, strict=True)}) == 3
    assert random_groups(12, 4, seed=1).bincount().tolist() == [3, 3, 3, 3]
    assert not torch.equal(random_groups(12, 4, seed=1), random_groups(12, 4, seed=2))


@pytest.mark.parametrize("adapted", [False, True])
def test_rows_have_the_mean_score_of_their_group(adapted):
    net = MODELS["roberta"]().train()
    generator = torch.Generator().manual_seed(0)
    plain = find_targets(net)
    groups = {t.name: torch.randint(3, (t.rows,), generator=generator) for t in plain}
    if adapted:
        add_adapter(net, Lora(r=4, dropout=0.0), None, None, None, seed=1)
    mask = GradientMask(net, Mask(threshold=0.5, clusters=3), 0, groups)
    ids = torch.randint(5, 53, (2, 10), generator=generator)
    outputs = {}
    for t in mask.targets:
        t.observed.register_forward_hook(
            lambda _m, _i, out, n=t.name: outputs.__setitem__(n, out.detach())
        )
    with mask.recording():
        net(input_ids=ids, labels=ids).loss.backward()
    mask.apply(ParameterShards(net), 1)
    rows = mask.rows_by_name(mask.keep)
    for target in mask.targets:
        scores = outputs[target.name].abs().flatten(0, -2).sum(0)
        if ".lora_A." not in target.name:  # a rank has no weights yet: each by itself
            layer = target.name.split(".lora_B.")[0].removesuffix(".weight") + ".weight"
            own = groups[layer]
            scores = torch.stack([scores[own == g].mean() for g in own])
        kept = rows[target.name][0]
        assert int(kept.sum()) == target.rows - target.rows // 2  # as many as without groups
        assert scores[kept].min() >= scores[~kept].max() * (1 - 1e-5)
    assert torch.equal(group_means(torch.arange(4.0), torch.tensor([0, 1, 0, 1])),
                       torch.tensor([1.0, 2.0, 1.0, 2.0]))  # fmt: skip
    assert len(grouped(mask.targets, groups)) == len(mask.keep)


def test_rows_that_are_large_in_the_same_texts_are_a_group(tmp_path):
    net = MODELS["roberta"]().eval()
    recipe = recipe_for("roberta", 4)
    recipe.stages, recipe.model.objective = [Stage("x", steps=1)], "masked"
    found = {}
    for by in ("weight", "magnitude", "random"):
        recipe.mask = Mask(clusters=2, cluster_by=by)
        start = Start(
            0, recipe, tokenizer_of("roberta"), lambda _: Teacher(lambda: net, dict),
            lambda _, count: iter(texts(12)[:count]), tmp_path / by, tmp_path,
        )  # fmt: skip
        found[by] = row_groups(start)
        again = row_groups(start)  # as it was kept
        assert all(torch.equal(g, again[n]) for n, g in found[by].items())
    targets = find_targets(net.requires_grad_(True))
    assert all(b.keys() == {t.name for t in targets} for b in found.values())
    target = targets[0]
    assert torch.equal(found["weight"][target.name], k_means(target.weight.detach(), 2, seed=0))
    outputs = []
    target.observed.register_forward_hook(lambda _m, _i, out: outputs.append(out.detach()))
    for _, batch in domain_batches(start, ["x"], 64, (0, STREAM)):
        for ids in batch["input_ids"]:
            net(input_ids=ids[None])
    profiles = torch.stack([out.abs().sum((0, 1)) for out in outputs], dim=1)
    profiles = profiles / profiles.norm(dim=1, keepdim=True)
    assert torch.equal(found["magnitude"][target.name], k_means(profiles, 2, seed=0))
    sizes = [g.bincount().tolist() for g in found["random"].values()]
    assert all(len(s) == 2 and abs(s[0] - s[1]) <= 1 for s in sizes)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mask.cluster_by=magnitude"], "no effect without mask.clusters"),
        (["mask.clusters=1"], "needs at least 2"),
        (["mask.clusters=4", "mask.criterion=random"], "no effect on random scores"),
        (["mask.clusters=4", "mask.refresh=stage"], "ranked by themselves"),
    ],
)
def test_what_does_not_go_with_groups_is_named(tmp_path, overrides, message):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\n" + RECIPE)
    with pytest.raises(UserError, match=message):
        load_recipe(path, overrides)
