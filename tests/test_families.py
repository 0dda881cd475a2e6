"""Which linears of a model are masked, and the parts of fused ones."""

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from pipeline.errors import UserError
from pipeline.migu.gradient_mask import GradientMask
from pipeline.migu.mask import kept_count
from pipeline.migu.targets import count_rows, find_targets
from pipeline.recipe import Mask
from tests.families import FAMILIES, MIXTURE, family
from tests.reference import MODELS, masked_linears
from tests.test_mask import Plain


@pytest.mark.parametrize("name", MODELS)
def test_all_linears_of_the_blocks_are_targets(name):
    model = MODELS[name]()
    targets = find_targets(model)
    assert [t.name for t in targets] == [f"{n}.weight" for n in masked_linears(name, model)]
    assert all(t.component != "other" for t in targets)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_of_a_known_family_has_a_component(name):
    targets = find_targets(family(name))
    _, _, components, linears = FAMILIES[name]
    assert {t.component for t in targets} == components
    assert len(targets) == linears


@pytest.mark.parametrize(
    ("name", "qkv", "ffn_in"),
    [
        ("gpt2", (8, 8, 8), (32,)),
        ("phi3", (8, 4, 4), (20, 20)),
        ("modernbert", (8, 8, 8), (20, 20)),
    ],
)
def test_the_parts_of_a_fused_linear_are_where_the_model_cuts_it(name, qkv, ffn_in):
    model = family(name)
    targets = {t.component: t for t in find_targets(model, split_fused=True)}
    parts = {component: t.parts for component, t in targets.items()}
    assert parts == {"qkv": qkv, "o": (8,), "ffn_in": ffn_in, "ffn_out": (8,)}
    entered = {}
    for component in ("o", "ffn_out"):
        targets[component].observed.register_forward_pre_hook(
            lambda _module, inputs, component=component: entered.update({component: inputs[0]})
        )

    def without(component, part):
        """What enters the linear that follows, with one part's rows set to zero."""
        target = targets[component]
        before = target.weight.detach().clone()
        with torch.no_grad():
            target.weight.split(target.parts, dim=target.output_dim)[part].zero_()
            model(input_ids=torch.arange(5, 15)[None])
            target.weight.copy_(before)
        return entered["o" if component == "qkv" else "ffn_out"]

    assert not without("qkv", 2).any()  # attention over values that are zero
    q, k = without("qkv", 0), without("qkv", 1)  # without q or without k: the same mean of values
    assert q.any()
    torch.testing.assert_close(q, k)
    if len(ffn_in) == 2:  # a product: zero without the gate and without the other
        assert not without("ffn_in", 0).any()
        assert not without("ffn_in", 1).any()


def test_split_fused_selects_in_each_part():
    model = family("phi3")
    mask = GradientMask(model, Mask(split_fused=True), seed=0)
    with mask.recording():
        model(input_ids=torch.arange(5, 15)[None]).logits.square().sum().backward()
    magnitudes = mask.recorder.scores.clone()
    mask.apply(Plain(model), 1)
    at = 0
    for target in mask.targets:
        keep, _ = mask.rows_by_name(mask.keep)[target.name]
        assert torch.equal(target.weight.grad.abs().sum(1) > 0, keep)
        for part in target.parts:
            best = magnitudes[at : at + part].topk(kept_count(part, 0.7)).indices
            assert set(mask.keep[at : at + part].nonzero().flatten().tolist()) == set(best.tolist())
            at += part
    counts = count_rows(mask.targets, 0.7, "exact")
    assert counts["qkv"] == {"linears": 1, "rows": 16, "kept": 3 + 2 + 2}  # jointly 5
    assert sum(c["kept"] for c in counts.values()) == int(mask.keep.sum())


def test_of_a_fused_lora_layer_only_b_has_parts():
    model = peft.get_peft_model(
        family("gpt2"), peft.LoraConfig(r=6, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    assert [t.parts for t in find_targets(model, split_fused=True)] == [(6,), (8, 8, 8)]


def test_split_fused_is_refused_where_it_cannot_work():
    for name, layer in (
        ("bloom", r"transformer\.h\.0\.self_attention\.query_key_value"),
        ("gpt_neox", r"gpt_neox\.layers\.0\.attention\.query_key_value"),
    ):
        with pytest.raises(UserError, match=layer):
            find_targets(family(name), split_fused=True)
    for name, components in (("llama", None), ("gpt2", ["ffn"]), ("bloom", ["ffn"])):
        with pytest.raises(UserError, match="split_fused: has no effect"):
            find_targets(family(name), components, split_fused=True)
    unknown = family("phi3")
    unknown.config.model_type = "phi30"
    with pytest.raises(UserError, match=r"qkv_proj.*'phi30'"):
        find_targets(unknown, split_fused=True)


def test_components_choose_among_the_linears():
    model = MODELS["llama"]()
    assert {t.component for t in find_targets(model, ["attention", "ffn_out"])} == {
        "q",
        "k",
        "v",
        "o",
        "ffn_out",
    }
    head = find_targets(model, ["head"])
    assert [t.name for t in head] == ["lm_head.weight"]
    with pytest.raises(UserError, match="unknown component 'qq'"):
        find_targets(model, ["qq"])
    with pytest.raises(UserError, match="shares its weight with the embeddings"):
        find_targets(MODELS["roberta"](), ["head"])


def test_conv1d_counts_its_columns_as_outputs():
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    targets = find_targets(GPT2LMHeadModel(GPT2Config(**sizes)))
    assert {(t.component, t.rows, t.output_dim) for t in targets} == {
        ("qkv", 24, 1),
        ("o", 8, 1),
        ("ffn_in", 32, 1),
        ("ffn_out", 8, 1),
    }


def test_models_that_cannot_be_masked_are_refused():
    with pytest.raises(UserError, match="nothing to mask"):
        find_targets(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)))
    config = AutoConfig.for_model("llama4_text", **MIXTURE, intermediate_size_mlp=8)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"layers\.0\S*experts.*in a way of their own"):
        find_targets(model)
    assert {t.component for t in find_targets(model, ["attention"])} == {"q", "k", "v", "o"}
    found = find_targets(model, partly=True)
    assert "experts.gate_up_proj" not in {t.name for t in found}


def test_a_weight_of_two_linears_is_refused_by_name():
    model = MODELS["roberta"]()
    layers = model.roberta.encoder.layer
    layers[1].attention.self.query.weight = layers[0].attention.self.query.weight
    with pytest.raises(
        UserError, match=r"layer\.1\S*query\.weight and \S*layer\.0\S*query\.weight are"
    ):
        find_targets(model)
    assert find_targets(model, ["k"])


def test_mamba_has_no_experts():
    sizes = {"vocab_size": 29, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))
    assert len(find_targets(mamba)) == 4  # in_proj, x_proj, dt_proj, out_proj
