"""The DeepSpeed engine, ZeRO stages 0 to 3.

Where ZeRO keeps the reduced gradient between the last backward and the step is not public API: it
is read in one place, `ZeroEngine.gradient_shards`, and docs/engines.md says which version that is.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.runtime.zero.utils import get_norm_dtype
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from pipeline.engine.config import offloads, precision_of, zero_stage
from pipeline.engine.optimizer import weight_groups
from pipeline.errors import UserError
from pipeline.migu.shard import Shard

Hold = Callable[[], AbstractContextManager[None]]


def start_distributed() -> None:
    """Join the launcher's process group; without a launcher, make one of a single rank."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
    if deepspeed.get_accelerator().device_name() == "cpu":
        # The op is compiled for two minutes at the first start and used by inference only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        # Other ranks wait in a collective while an evaluation runs: hours, not gloo's 30 minutes.
        deepspeed.init_distributed(verbose=False, timeout=timedelta(hours=12))


class ZeroEngine:
    """One stage's model under DeepSpeed: forward, backward, masked step, export."""

    def __init__(self, model: nn.Module, ds_config: dict[str, Any], optimizer: Any):
        """
        Args:
            model: on the CPU, fp32, in train mode.
            ds_config: from `resolve_ds_config`.
            optimizer: has the fields of `recipe.Optimizer`.
        """
        start_distributed()
        self.config = ds_config
        self.stage = zero_stage(ds_config)
        groups = weight_groups(model, optimizer.weight_decay)
        adam = self._optimizer_class()
        kwargs = {"lr": optimizer.lr, "betas": tuple(optimizer.betas), "eps": optimizer.eps}
        inner = adam(groups, **kwargs)
        update = inner.step
        inner.step = lambda *args: self._held(update, *args)
        self._hold: Hold = nullcontext
        self._engine: Any = None
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=inner, config=ds_config)
        self._parameters = dict(self._engine.module.named_parameters())
        self._norm = float("nan")

    def _optimizer_class(self):
        if deepspeed.get_accelerator().device_name() == "cpu" or not offloads(
            self.config, "optimizer"
        ):
            return torch.optim.AdamW
        return deepspeed.ops.adam.DeepSpeedCPUAdam

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def monitor(self):
        """DeepSpeed's TensorBoard / W&B / Comet / CSV writers, as the JSON asks."""
        return self._engine.monitor

    def forward(self, **inputs: Tensor) -> Any:
        return self._engine(**inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate; the `last` micro-batch of a step also reduces the gradient over the ranks.

        loss: this micro-batch's mean; the step's gradient is the mean over micro-batches and ranks.
        """
        self._engine.backward(loss)
        if not last:
            self._engine.step()  # steps nothing: this is where DeepSpeed counts micro-batches

    def _held(self, update: Callable, *args: Any) -> Any:
        """AdamW's own step. ZeRO copies the fp32 weights to the model's only after it."""
        if self._engine is None:
            # At stage 0 in bf16 or fp16 DeepSpeed steps once at the start, to allocate the state:
            # that would decay the weights and count as a step.
            return None
        with self._hold():
            return update(*args)

    def step(self, lr: float, hold: Hold = nullcontext) -> bool:
        """Clip and step with learning rate `lr`; False where fp16 loss scaling skipped the step.

        hold: makes a context that is entered around the update of the fp32 weights (ZeRO-3 updates
            them in several goes).
        """
        self._hold = hold
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        clip = self._engine.gradient_clipping()
        if self.stage == 0 and precision_of(self.config) == "fp32":
            # DeepSpeed keeps no norm here; clip_grad_norm_ does what its own clipping would do.
            norm = nn.utils.clip_grad_norm_(
                [p for p in self._parameters.values() if p.grad is not None], clip or float("inf")
            )
            self._norm = float(norm)
        self._engine.step()
        if self._engine.get_global_grad_norm() is not None:
            self._norm = float(self._engine.get_global_grad_norm())
        return self._engine.was_step_applied()

    @property
    def gradient_norm(self) -> float:
        """L2 norm of the last step's (masked) gradient, before clipping."""
        return self._norm

    def gradient_shards(self, names: list[str]) -> Iterator[Shard]:
        """The local live pieces of the named weights' reduced gradients.

        To be called between the last backward and `step`. Together the ranks hold every element
        (at stage 0, and where ZeRO-1 accumulates bf16 in fp32, each rank holds all of them). What
        is cached about a gradient (the norms of ZeRO-Offload) is refreshed when the iteration goes
        on, so that clipping sees the masked gradient.
        """
        optimizer = self._engine.optimizer
        if self.stage in (1, 2) and offloads(self.config, "optimizer"):
            optimizer._wait_for_offload_copies()
        if self.stage in (1, 2) and type(optimizer).__name__ != "BF16_Optimizer":
            yield from self._zero12_gradients(names)
            return
        for name in names:
            p = self._parameters[name]
            if self.stage == 3:
                yield from self._zero3_gradient(name, p)
            elif self.stage == 0:
                if p.grad is not None:
                    yield Shard(name, p.grad.view(-1), 0, tuple(p.shape))
            else:  # ZeRO-1 with bf16 weights and fp32 accumulation: whole on every rank
                yield Shard(name, p._hp_grad.view(-1), 0, tuple(p.shape))

    def _zero12_gradients(self, names: list[str]) -> Iterator[Shard]:
        opt = self._engine.optimizer
        group_of = {id(p): g for g, params in enumerate(opt.params_in_partition) for p in params}
        pieces = {g: _pieces_at(opt, g) for g in set(group_of.values())}
        for name in names:
            p = self._parameters[name]
            if id(p) not in group_of:  # nothing of it lives on this rank
                continue
            group, pid = group_of[id(p)], opt.get_param_id(p)
            rank = dist.get_rank(group=opt.real_dp_process_group[group])
            start = int(opt.grad_start_offset[group][rank][pid])  # inside the parameter
            offset = int(opt.grad_partition_insertion_offset[group][rank][pid])  # in the partition
            size = min(p.numel() - start, int(opt.partition_size[group]) - offset)
            piece = pieces[group](offset, size)
            yield Shard(name, piece, start, tuple(p.shape))
            if opt.cpu_offload and pid in opt.norm_for_param_grads:
                opt.norm_for_param_grads[pid] = piece.to(get_norm_dtype()).norm(2)

    def _zero3_gradient(self, name: str, p: Any) -> Iterator[Shard]:
        opt = self._engine.optimizer
        gradient, _ = opt._get_fp32_grad_state_partition(p, release_swap_buffers=True)
        yield from _partition(name, gradient, p, opt._get_param_partition_rank(p))
        pid = opt.get_param_id(p)
        if opt.offload_optimizer and pid in opt.norm_for_param_grads:
            opt.norm_for_param_grads[pid] = opt._constant_buffered_norm2(gradient)

    def weight_shards(self, names: list[str]) -> Iterator[Shard]:
        """The local pieces of the named weights; whole ones where ZeRO does not shard them."""
        for name in names:
            p = self._parameters[name]
            if self.stage == 3:
                rank = self._engine.optimizer._get_param_partition_rank(p)
                yield from _partition(name, p.ds_tensor, p, rank)
            else:
                yield Shard(name, p.detach().view(-1), 0, tuple(p.shape))

    def master_shards(self, names: list[str]) -> Iterator[Shard]:
        """The local live pieces of the fp32 weights that the optimizer updates."""
        opt = self._engine.optimizer
        masters = self._stage0_masters()
        for name in names:
            p: Any = self._parameters[name]
            if self.stage == 3:
                piece, _ = opt._get_fp32_opt_state_partition(p, release_swap_buffers=True)
                yield from _partition(name, piece, p, opt._get_param_partition_rank(p))
            elif self.stage == 0:
                weight = masters.get(id(p), p.detach())
                yield Shard(name, weight.detach().view(-1), 0, tuple(p.shape))
            elif getattr(p, "_hp_mapping", None) is not None:  # ZeRO's own map; absent elsewhere
                at = p._hp_mapping.lp_fragment_address
                piece = p._hp_mapping.hp_fragment.detach()
                yield Shard(name, piece.view(-1), at.start, tuple(p.shape))

    def _stage0_masters(self) -> dict[int, Tensor]:
        """Stage 0 in bf16 or fp16: id of each parameter -> its fp32 copy."""
        if self.stage != 0 or precision_of(self.config) == "fp32":
            return {}
        opt = self._engine.optimizer
        groups = zip(opt.fp16_groups, opt.fp32_groups, strict=True)
        return {id(p): m for low, high in groups for p, m in zip(low, high, strict=True)}

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole, on the CPU, in the optimizer's fp32; all ranks call it."""
        masters = self._stage0_masters()
        for name, p in self._parameters.items():
            full = masters.get(id(p))
            if full is None and p.requires_grad:
                full = safe_get_full_fp32_param(p)
            if full is None:
                with deepspeed.zero.GatheredParameters([p], enabled=self.stage == 3):
                    full = p.detach().clone()
            yield name, full.detach().to("cpu").reshape(getattr(p, "ds_shape", p.shape))

    def close(self) -> None:
        """Free the engine's buffers and hooks."""
        self._engine.destroy()


def _pieces_at(opt: Any, group: int) -> Callable[[int, int], Tensor]:
    """How to get elements [offset, offset + size) of ZeRO-1/2's local gradient partition, live.

    The partition is one flat tensor with offload and with fp32 accumulation; otherwise it is a list
    of tensors whose concatenation is the partition.
    """
    if opt.cpu_offload:
        flat = opt.single_partition_of_fp32_groups[group].grad.view(-1)
        return lambda offset, size: flat.narrow(0, offset, size)
    gradients = opt.averaged_gradients[group]
    if hasattr(gradients, "flat_partition"):
        flat = gradients.flat_partition.view(-1)
        return lambda offset, size: flat.narrow(0, offset, size)
    tensors, at = {}, 0
    for tensor in gradients:
        tensors[at] = tensor
        at += tensor.numel()

    def piece(offset: int, size: int) -> Tensor:
        tensor = tensors.get(offset)
        if tensor is None or tensor.numel() != size or not tensor.is_contiguous():
            raise UserError(
                f"DeepSpeed {deepspeed.__version__} lays ZeRO gradients out in another way than "
                "the tested version; install the versions in constraints.txt"
            )
        return tensor.view(-1)

    return piece


def _partition(name: str, tensor: Tensor, p: Any, rank: int) -> Iterator[Shard]:
    """ZeRO-3: rank r holds elements [r * n, (r + 1) * n); the last partition is padded."""
    size = p.partition_numel()
    start = rank * size
    length = min(size, p.ds_numel - start)
    if length > 0:
        yield Shard(name, tensor.view(-1)[:length], start, tuple(p.ds_shape))
