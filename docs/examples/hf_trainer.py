"""MIGU in a Hugging Face Trainer, plain or with DeepSpeed: `pipeline.attach(trainer)`.

python docs/examples/hf_trainer.py
deepspeed docs/examples/hf_trainer.py --zero 2
"""

import argparse
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import pipeline

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=0)
parser.add_argument("--zero", type=int, help="use DeepSpeed with this ZeRO stage")
zero = parser.parse_args().zero
if zero is not None:
    from pipeline.engine.distributed import start_distributed

    start_distributed()

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=128)
)  # fmt: skip
tokens = torch.randint(0, 256, (16, 32))
rows = [{"input_ids": t, "labels": t} for t in tokens]
ds_config = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": zero},
    "zero_force_ds_cpu_optimizer": False,
}
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    max_steps=1,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    weight_decay=0.0,
    report_to=[],
    save_strategy="no",
    use_cpu=not torch.cuda.is_available(),
    deepspeed=ds_config if zero is not None else None,
)
trainer = Trainer(model=model, args=arguments, train_dataset=rows)
attached = pipeline.attach(trainer, threshold=0.7)

before = {n: p.detach().clone() for n, p in model.named_parameters()}
trainer.train()
for target in attached.mask.targets[:7]:
    moved = (dict(model.named_parameters())[target.name] != before[target.name]).any(dim=1)
    print(f"{target.name:<45} rows moved in 1 step: {int(moved.sum()):>3} of {target.rows}")
