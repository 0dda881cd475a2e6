"""MIGU in TRL's SFTTrainer, which is a Trainer: `pipeline.attach(trainer)`.

pip install trl
python docs/examples/trl_sft.py
"""

import tempfile

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

import pipeline
from pipeline.data.tokenizer import train_tokenizer

text = "def add(a, b):\n    return a + b\n"
tokenizer = train_tokenizer([text], 300)
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2,
                num_attention_heads=4, intermediate_size=128)
)  # fmt: skip
arguments = SFTConfig(
    output_dir=tempfile.mkdtemp(),
    max_steps=1,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    weight_decay=0.0,
    max_length=32,
    report_to=[],
    save_strategy="no",
    bf16=False,
    use_cpu=not torch.cuda.is_available(),
)
trainer = SFTTrainer(
    model=model,
    args=arguments,
    train_dataset=Dataset.from_dict({"text": [f"{text}# {i}" for i in range(16)]}),
    processing_class=tokenizer,
)
attached = pipeline.attach(trainer, threshold=0.7)

before = {n: p.detach().clone() for n, p in model.named_parameters()}
trainer.train()
for target in attached.mask.targets[:7]:
    moved = (dict(model.named_parameters())[target.name] != before[target.name]).any(dim=1)
    print(f"{target.name:<45} rows moved in 1 step: {int(moved.sum()):>3} of {target.rows}")
