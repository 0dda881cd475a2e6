"""The RoBERTa that benchmarks train on random tokens, and the options that give its size."""

import argparse

import torch
from transformers import RobertaConfig, RobertaForMaskedLM

SIZES = {"hidden": 768, "layers": 4, "vocabulary": 8192, "batch": 8, "length": 128}


def add_sizes(parser: argparse.ArgumentParser, **others: int) -> None:
    """others: where a benchmark's defaults are not SIZES."""
    units = {"batch": "sequences", "length": "tokens"}
    for name, size in {**SIZES, **others}.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=units.get(name))


def roberta(args: argparse.Namespace) -> RobertaForMaskedLM:
    """With the same random weights each time, to be trained."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        intermediate_size=4 * args.hidden,
        max_position_embeddings=args.length + 2,
    )
    return RobertaForMaskedLM(config).train()


def setting(args: argparse.Namespace) -> str:
    return (
        f"{args.layers} layers of {args.hidden}, {args.batch} x {args.length} tokens, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
