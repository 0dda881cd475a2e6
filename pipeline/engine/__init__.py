"""Engines: what shards and steps the model. `zero` is DeepSpeed, `fsdp` is PyTorch's FSDP2."""
