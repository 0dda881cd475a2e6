"""MIGU in a plain FSDP2 loop: shard, make the optimizer, attach.

torchrun --nproc_per_node 2 docs/examples/fsdp2_loop.py
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import pipeline

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=128)
)  # fmt: skip
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
attached = pipeline.attach(model, optimizer, threshold=0.7)

before = {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}
torch.manual_seed(dist.get_rank())
tokens = torch.randint(0, 256, (8, 32))
loss = model(input_ids=tokens, labels=tokens).loss
loss.backward()
attached.apply()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()

after = dict(model.named_parameters())
for target in attached.mask.targets[:7]:
    moved = (after[target.name].full_tensor() != before[target.name]).any(dim=1)
    if dist.get_rank() == 0:
        print(f"{target.name:<45} rows moved in 1 step: {int(moved.sum()):>3} of {target.rows}")
dist.destroy_process_group()
