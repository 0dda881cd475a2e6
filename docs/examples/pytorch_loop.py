"""MIGU in a plain PyTorch loop: one line, `pipeline.attach(model, optimizer)`.

    python docs/examples/pytorch_loop.py

Also for DistributedDataParallel and for FSDP2 (`fully_shard`): attach after wrapping the model and
making the optimizer.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pipeline

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=128)
)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
attached = pipeline.attach(model, optimizer, threshold=0.7, update="strict")

before = {n: p.detach().clone() for n, p in model.named_parameters()}
tokens = torch.randint(0, 256, (8, 32))
for _ in range(3):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    attached.apply()  # before clipping, so that the norm is that of the masked gradient
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

for target in attached.mask.targets[:7]:
    moved = (dict(model.named_parameters())[target.name] != before[target.name]).any(dim=1)
    print(f"{target.name:<45} rows moved in 3 steps: {int(moved.sum()):>3} of {target.rows}")
