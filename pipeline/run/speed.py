"""How fast a stage trains, and where its time goes (docs/performance.md has the formulas)."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn

from pipeline.migu.targets import CROSSES
from pipeline.model.blocks import find_blocks
from pipeline.ranks import world_size
from pipeline.recipe import Recipe

# Dense half-precision TFLOPS of a GPU, by words of its name, the first that are there; from the
# vendors' data sheets.
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "A100": 312,
         "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A40": 150, "A10G": 70, "A10": 125,
         "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65}  # fmt: skip
PARTS = ("data", "forward", "backward", "mask", "step")


class Stopwatch:
    """Seconds of a step by part; on a GPU measured by events on the stream, not by the host."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = {}
        self._begun: Any = None

    def begin(self) -> None:
        self._spans = {}
        self._begun = self._now()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Around some of the work of a part, which may come several times in a step."""
        start = self._now()
        yield
        self._spans.setdefault(part, []).append((start, self._now()))

    def end(self) -> None:
        self._spans["all"] = [(self._begun, self._now())]

    def seconds(self) -> dict[str, float]:
        """Of the whole step ("all") and of its PARTS; waits for the device."""
        found = self._spans
        return {part: sum(map(self._seconds, found.get(part, []))) for part in ("all", *PARTS)}

    def _seconds(self, span: tuple[Any, Any]) -> float:
        start, stop = span
        if not self._cuda:
            return stop - start
        stop.synchronize()
        return start.elapsed_time(stop) / 1000

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Speed:
    """What a step's seconds come to."""

    def __init__(self, module: nn.Module, recipe: Recipe, device: torch.device):
        self._flops = training_flops(module, recipe)
        self._peak = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            name = torch.cuda.get_device_name(device)
            self._peak = peak_of(name)
        self._device = device

    def numbers(self, tokens: int, predicted: int, seconds: float) -> dict[str, float]:
        """tokens, predicted: of the step, over all ranks. `mfu` only where the peak is known."""
        per_token, per_prediction = self._flops
        flops = per_token * tokens + per_prediction * predicted
        tflops = flops / seconds / world_size() / 1e12
        found = {"tokens_per_second": tokens / seconds, "tflops": tflops}
        if self._peak is not None:
            found["mfu"] = tflops / self._peak
        return {**found, "peak_memory_gb": peak_memory(self._device) / 1e9}


def peak_of(gpu: str) -> float | None:
    """TFLOPS of a GPU by its name, as the driver gives it; None: not known."""
    words = f" {gpu.replace('-', ' ')} "
    return next((peak for name, peak in PEAKS.items() if f" {name} " in words), None)


def peak_memory(device: torch.device) -> int:
    """Bytes at the process's peak: on the GPU since the stage began, on a CPU since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def predictions(recipe: Recipe, tokens: int) -> int:
    """How many of so many tokens of text a model predicts."""
    return round(tokens * (1 if recipe.model.objective == "causal" else recipe.data.masking))


def training_flops(module: nn.Module, recipe: Recipe) -> tuple[float, float]:
    """(for each token, and for each prediction on top) of a dense training step: a product forward,
    one for the input's gradient and, of trained weights, one for their own; of a mixture the
    experts that a token is sent to; attention over whole rows; the head where there is a
    prediction. An encoder-decoder's decoder reads what it predicts, and the rest is read by its
    encoder. Recomputed activations and what a mask spares do not count, so that modes compare."""
    config: Any = module.config
    config = config.get_text_config()
    hidden, width = getattr(config, "hidden_size", 0), getattr(config, "vocab_size", 0)
    blocks = find_blocks(module)
    inside = tuple(f"{name}." for name in blocks)
    attention = 12 * hidden * recipe.data.sequence_length
    flops = {False: 0.0, True: 0.0}  # of a token of the input, and of the decoder
    for name in blocks:
        flops[_of_decoder(module, name)] += attention
    looked_up = {m.weight for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, p in module.named_parameters():
        shape = _shape(p)
        if name.startswith(inside) and len(shape) in (2, 3) and p not in looked_up:
            frozen = not p.requires_grad and not name.endswith(".rest")
            chosen = 1 if len(shape) == 2 else getattr(config, "num_experts_per_tok", 0)
            flops[_of_decoder(module, name)] += (4 if frozen else 6) * chosen * prod(shape[-2:])
    head = 6 * hidden * width
    if not config.is_encoder_decoder:
        return flops[False], head
    return flops[False], flops[True] - flops[False] + head


def _of_decoder(module: Any, name: str) -> bool:
    """Whether a part of the blocks computes for the decoder's tokens."""
    path = name.split(".")
    if not module.config.is_encoder_decoder or "decoder" not in path:
        return False
    return not (CROSSES & set(path) and {"k", "v", "k_proj", "v_proj", "key", "value"} & set(path))


def _shape(p: Any) -> Any:
    """Of the whole weight, which ZeRO-3 shards and bitsandbytes packs."""
    packed = getattr(p, "quant_state", None)
    return getattr(p, "ds_shape", p.shape) if packed is None else packed.shape
