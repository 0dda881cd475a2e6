"""A LoRA adapter whose ranks are experts, with a router between them."""

import pytest
import torch
from peft import PeftModel

from pipeline.errors import UserError
from pipeline.model.load import load_for_evaluation
from pipeline.model.lora import add_adapter
from pipeline.model.moe_lora import add_moe_lora, save_moe_lora
from pipeline.recipe import Lora
from pipeline.run.recipe_file import load_recipe
from tests.reference import MODELS
from tests.test_finetune import RECIPE
from tests.test_lora import randomize_b

IDS = torch.arange(5, 25).reshape(2, 10)


def answered(net):
    return net(input_ids=IDS, decoder_input_ids=IDS).logits


def test_each_expert_counts_by_its_share():
    net, plain = MODELS["t5"]().eval(), MODELS["t5"]().eval()
    lora = Lora(r=4, alpha=8, dropout=0.0, experts=2)
    add_moe_lora(net, lora, None, None, "SEQ_2_SEQ_LM", seed=3)
    add_adapter(plain, lora, None, None, "SEQ_2_SEQ_LM", seed=3)
    torch.testing.assert_close(answered(randomize_b(net)), answered(randomize_b(plain)))
    layer = net.encoder.block[0].layer[0].SelfAttention.q
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    a.router.weight.data.normal_()
    x = torch.randn(3, 7, a.in_features)
    shares = (x @ a.router.weight.T).softmax(-1)
    experts = [(x @ a.weight[e * 2 : e * 2 + 2].T) @ b.weight[:, e * 2 : e * 2 + 2].T
               for e in range(2)]  # fmt: skip
    expected = layer.base_layer(x) + 8 / 4 * 2 * sum(
        shares[..., e : e + 1] * experts[e] for e in range(2)
    )
    torch.testing.assert_close(layer(x), expected)
    trained = {n.split(".lora_")[0] for n, p in net.named_parameters() if p.requires_grad}
    routed = {n.split(".lora_")[0] for n, _ in net.named_parameters() if "router" in n}
    assert trained == routed  # every layer has one, and nothing but adapters is trained


def test_what_is_published_is_read_here_and_refused_by_peft(tmp_path):
    base = MODELS["t5"]().eval()
    base.save_pretrained(tmp_path / "base")
    add_moe_lora(base, Lora(r=4, experts=2), str(tmp_path / "base"), None, "SEQ_2_SEQ_LM", seed=1)
    randomize_b(base.eval())
    for name, p in base.named_parameters():
        if name.endswith("router.weight"):
            p.data.normal_()
    weights = [(n, p.detach()) for n, p in base.named_parameters() if ".lora_" in n]
    (tmp_path / "adapter").mkdir()
    save_moe_lora(base, weights, tmp_path / "adapter", torch.float32)
    again = load_for_evaluation(tmp_path / "adapter", "seq2seq", "sdpa")
    torch.testing.assert_close(answered(again), answered(base))
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(MODELS["t5"](), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora={r: 8, experts: 3}"], "cannot share r=8 ranks evenly"),
        (["model.lora={experts: 2, incremental: true}"], "model.lora.incremental works on plain"),
        (["model.lora={experts: 2}", "hat_adapter={}"], "hat_adapter works on plain adapters"),
    ],
)
def test_what_experts_do_not_go_with_is_named(tmp_path, overrides, message):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\n" + RECIPE)
    with pytest.raises(UserError, match=message):
        load_recipe(path, overrides)
