"""How much of the KL to the teacher the anchor's cache sees: k likeliest tokens, the rest as one.

    python benchmarks/anchor_cache.py

A masked or causal model is fine-tuned on embedded text. Meanwhile the mean KL(teacher || model)
over text that the teacher wrote itself is computed over the whole vocabulary, and against what a
cache of several sizes keeps.
"""

import argparse
import copy
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from pipeline.data.embedded import embedded_documents
from pipeline.methods.divergence import summed_kl, summed_kl_top_k, top_k
from pipeline.methods.sampled_text import sample_block

LENGTH, ROWS = 64, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="launch/recipes/demo_base")
    parser.add_argument("--causal", action="store_true", help="the model is a causal one")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 20, 60])
    parser.add_argument("--cache", type=int, nargs="+", default=[16, 64, 256, 1024])
    args = parser.parse_args()
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if args.causal else AutoModelForMaskedLM
    tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
    model = kind.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False)
    teacher = copy.deepcopy(model).eval()
    own, _ = sample_block(teacher, tokenizer, LENGTH, "causal" if args.causal else "masked", 0)
    text = "\n".join(map(str, embedded_documents("python")[:400]))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    new = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)

    def hidden(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(input, where a prediction is made)"""
        if args.causal:
            return rows, torch.arange(LENGTH).expand_as(rows) < LENGTH - 1
        where = torch.rand(rows.shape) < 0.15
        return rows.masked_fill(where, tokenizer.mask_token_id), where

    read, asked = hidden(own[:ROWS])
    with torch.no_grad():
        theirs = teacher(read).logits[asked]
    kept = {k: top_k(theirs, k) for k in args.cache}
    likeliest = {k: float(known[:, :-1].exp().sum(-1).mean()) for k, (_, known) in kept.items()}
    print("share of the teacher's probability in the cache:")
    print(f"{'':16}" + "".join(f"{k:>8}: {p:.3f}" for k, p in likeliest.items()))
    print("KL that the cache sees, over the whole:")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    for step in range(1, max(args.steps) + 1):
        model.train()
        rows = new[torch.randint(len(new), (ROWS,))]
        inputs, where = hidden(rows)
        targets = rows.roll(-1, 1) if args.causal else rows
        F.cross_entropy(model(inputs).logits[where], targets[where]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step not in args.steps:
            continue
        with torch.no_grad():
            ours = model.eval()(read).logits[asked]
        full = float(summed_kl(ours, theirs))
        seen = {k: float(summed_kl_top_k(ours, *cache)) / full for k, cache in kept.items()}
        print(
            f"step {step:4} {full / len(theirs):.4f} "
            + "".join(f"{k:>8}: {share:.3f}" for k, share in seen.items())
        )


if __name__ == "__main__":
    main()
