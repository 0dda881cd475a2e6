"""MIGU in somebody's own DeepSpeed loop: `pipeline.attach(engine)`, for every ZeRO stage.

deepspeed docs/examples/deepspeed_loop.py
"""

import argparse

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pipeline
from pipeline.engine.distributed import start_distributed

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=0)
parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
stage = parser.parse_args().stage

start_distributed()  # or deepspeed.init_distributed()
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=128)
)  # fmt: skip
engine, *_ = deepspeed.initialize(
    model=model,
    model_parameters=model.parameters(),
    config={
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True},
        },
    },
)
attached = pipeline.attach(engine, threshold=0.7)

names = [t.name for t in attached.mask.targets]
before = {n: deepspeed.utils.safe_get_full_fp32_param(p).clone() if stage else p.detach().clone()
          for n, p in engine.module.named_parameters()}  # fmt: skip
for _ in range(2):  # two micro-batches: one step
    tokens = torch.randint(0, 256, (4, 32), device=engine.device)
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()

after = dict(engine.module.named_parameters())
for target in attached.mask.targets[:7]:
    p = after[target.name]
    now = deepspeed.utils.safe_get_full_fp32_param(p) if stage else p.detach()
    moved = (now != before[target.name]).any(dim=1)
    print(f"{target.name:<45} rows moved in 1 step: {int(moved.sum()):>3} of {target.rows}")
