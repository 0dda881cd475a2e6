"""The DeepSpeed engine, ZeRO stages 0 to 3."""

import logging
import math
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from pipeline.engine.config import DTYPES, offloads, precision_of, zero_stage
from pipeline.engine.distributed import start_distributed
from pipeline.engine.optimizer import Hold, zero_groups
from pipeline.engine.zero_shards import ZeroShards
from pipeline.errors import BadGradient, TrainingStopped
from pipeline.model.blocks import find_blocks, weights_in
from pipeline.shard import StateShard


class ZeroEngine:
    """A run's model under DeepSpeed: forward, backward, masked step, evaluation, export.

    It serves all stages: `start_stage` forgets what the optimizer knows of the one before.
    """

    def __init__(self, model: nn.Module, ds_config: dict[str, Any], optimizer: Any):
        """
        Args:
            model: on the CPU, in train mode; fp32, in half precision of any dtype.
            ds_config: from `resolve_ds_config`.
            optimizer: has the fields of `recipe.Optimizer`.
        """
        start_distributed()
        self.config = ds_config
        self.stage = zero_stage(ds_config)
        # By shapes that shards do not have.
        groups = zero_groups(model, optimizer.weight_decay, self.stage)
        if self.stage == 3:
            _shard(model, ds_config)
        adam = self._optimizer_class(optimizer.name)
        kwargs: Any = {"lr": optimizer.lr, "betas": tuple(optimizer.betas), "eps": optimizer.eps}
        if adam is torch.optim.AdamW:
            kwargs["fused"] = True  # one pass over the memory: a tenth of the time on a CPU
        inner = adam(groups, **kwargs)
        update = inner.step
        inner.step = lambda *args: self._held(update, *args)
        self._adam: Any = inner
        self._hold: Hold = nullcontext
        self._dropping = False
        self._engine: Any = None
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=inner, config=ds_config)
        self.shards = ZeroShards(self._engine)
        self._parameters = dict(self._engine.module.named_parameters())
        self._gathered: dict[nn.Module, int] = {}
        self._norm = float("nan")
        self.micro_batches: int = ds_config["gradient_accumulation_steps"]  # of a step and rank
        # Its step count and scale change while training, if there is loss scaling.
        self._scaler = _loss_scaler(self._engine.optimizer)
        self._fresh_scaler = dict(vars(self._scaler)) if self._scaler is not None else {}

    def start_stage(self, extra: int = 0) -> None:
        """Forget the optimizer's moments, its step count and the loss scale. The fp32 weights stay
        as they are, to the bit.

        extra: micro-batches that a step has on every rank beside those of its batch.
        """
        self.micro_batches = self.config["gradient_accumulation_steps"] + extra
        size = self._engine.train_micro_batch_size_per_gpu() * self._engine.dp_world_size
        self._engine.set_train_batch_size(size * self.micro_batches)
        self._engine.micro_steps = 0  # a step ends where their sum since the start divides
        self._adam.state.clear()  # made again at the next step
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "gradient_accumulation_steps"):  # its own copy
            optimizer.gradient_accumulation_steps = self.micro_batches
        self._unlink_moments()
        if self._scaler is not None:
            vars(self._scaler).update(self._fresh_scaler)

    def _unlink_moments(self) -> None:
        """ZeRO-1 and 2 keep views of the moments, which are made anew with them."""
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "_hp_optimizer_states_linked"):
            optimizer._hp_optimizer_states_linked = False
            for p in self._parameters.values():
                if getattr(p, "_hp_mapping", None) is not None:
                    p._hp_mapping.optim_fragment = None

    @property
    def scales_loss(self) -> bool:
        """Whether a gradient that is not finite is an overflow, whose step is skipped."""
        return precision_of(self.config) == "fp16"

    def _optimizer_class(self, name: str):
        if name == "adamw8bit":
            # On CPU bitsandbytes says that an optional faster kernel is missing.
            logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit
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
        output = self._engine(**inputs)
        if self.stage == 3 and torch.is_grad_enabled():
            parts = self.module.modules()
            self._gathered = {m: vars(m).get("ds_grads_remaining", 0) for m in parts}
        return output

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate; the `last` micro-batch of a step also reduces the gradient over the ranks.

        loss: this micro-batch's mean; the step's gradient is the mean over micro-batches and ranks.
        """
        # DeepSpeed takes forwards and backwards for alternating. What a forward prepares for its
        # backward is done again here, where the forwards of a whole step may have come first.
        if isinstance(self._engine.optimizer, ZeROOptimizer):
            self._engine.optimizer.clear_backward_seen_flag()  # or ZeRO-3 would not accumulate
        for module, gradients in self._gathered.items():  # after which ZeRO-3 lets weights go
            module.ds_grads_remaining = gradients  # type: ignore[assignment]
        self._engine.backward(loss)
        if not last:
            self._engine.step()  # steps nothing: this is where DeepSpeed counts micro-batches

    def _held(self, update: Callable, *args: Any) -> Any:
        """AdamW's own step. ZeRO copies the fp32 weights to the model's only after it."""
        if self._engine is None:
            # At stage 0 in bf16 or fp16 DeepSpeed steps once at the start, to allocate the state:
            # that would decay the weights and count as a step.
            return None
        if self._dropping:
            return None
        with self._hold(self.shards.names_in(self._adam.param_groups)):
            return update(*args)

    def step(self, lr: float, hold: Hold = nullcontext) -> bool:
        """Clip and step with learning rate `lr`; False where fp16 loss scaling skipped the step.

        hold: entered around the update; several times, since ZeRO updates its groups one by one.

        Raises:
            BadGradient: the gradient's norm is not finite; on every rank, before the update.
            TrainingStopped: it is not, and the JSON has switched off the check that would have
                kept it from the weights.
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
            if not math.isfinite(self._norm):
                self.drop_step()
                raise BadGradient(f"the gradient's norm is {self._norm}")
        self._engine.step()
        if self._engine.get_global_grad_norm() is not None:
            self._norm = float(self._engine.get_global_grad_norm())
        applied = self._engine.was_step_applied()
        if not applied and self.scales_loss:
            return False  # the next step has a smaller loss scale
        if not applied:  # DeepSpeed skips such a step without a word, in fp32 and bf16 too
            raise BadGradient(f"the gradient's norm is {self._norm}")
        if not math.isfinite(self._norm):
            # With bf16.check_grad_overflow off ZeRO-1 and 2 go on: their weights are spoilt by now.
            raise TrainingStopped(f"the gradient's norm is {self._norm}")
        return applied

    def drop_step(self) -> None:
        """In place of `step`: forget the gradient; weights, moments and the loss scale stay as they
        are. All ranks call it, between the last backward and what would be the step."""
        scale = dict(vars(self._scaler)) if self._scaler is not None else {}
        self._dropping = True
        try:
            self._engine.step()  # all that belongs to a step but the update: see `_held`
        finally:
            self._dropping = False
        if self._scaler is not None:
            vars(self._scaler).update(scale)
        if not any(self._adam.state.values()):  # the views are of moments that are not made yet
            self._unlink_moments()

    @property
    def gradient_norm(self) -> float:
        """L2 norm of the last step's (masked) gradient, before clipping."""
        return self._norm

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """For forwards without training: no dropout, no gradient. Where weights are sharded, all
        ranks must do the same number of them."""
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()

    def frozen(self, model: nn.Module) -> Callable[..., Any]:
        """The forward of another model, beside this one and never trained: in the precision of
        training, sharded where the weights of this one are."""
        dtype = DTYPES[precision_of(self.config)]
        model = weights_in(dtype, model.eval().requires_grad_(False))
        if self.stage < 3:
            return model.to(self.device)
        keys = ("train_micro_batch_size_per_gpu", "zero_optimization", "bf16", "fp16")
        config = {k: self.config[k] for k in keys if k in self.config}
        zero = {k: v for k, v in config["zero_optimization"].items() if k != "offload_optimizer"}
        frozen, *_ = deepspeed.initialize(model=model, config={**config, "zero_optimization": zero})
        frozen.eval()
        return frozen

    def release(self, frozen: Any) -> None:
        """Free what `frozen` gave: DeepSpeed would hold its shards as long as the process lives."""
        if self.stage == 3:
            frozen.destroy()
            _release(frozen.module, frozen.optimizer)
            frozen.optimizer = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Set the named trained weights, in the optimizer's fp32 and in the model; all ranks call
        it with the same whole tensors (of any dtype and device)."""
        for name, whole in weights:
            for shard in self.shards.master_shards([name]):
                shard.fill(whole)
        self.shards.masters_changed()

    def full_weights(
        self, trained: bool = False, names: Container[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Every (`trained`, or named) parameter whole, in the optimizer's fp32, one at a time; all
        ranks call it."""
        masters = self.shards.stage0_masters()
        for name, p in self._parameters.items():
            if (trained and not p.requires_grad) or (names is not None and name not in names):
                continue
            full = masters.get(id(p))
            if full is None and p.requires_grad:
                full = safe_get_full_fp32_param(p)
            if full is None:
                with deepspeed.zero.GatheredParameters([p], enabled=self.stage == 3):
                    full = p.detach().clone()
            yield name, full.detach().reshape(getattr(p, "ds_shape", p.shape))

    def state_shards(self) -> Iterator[StateShard]:
        """Of every trained weight the local pieces of the optimizer's fp32 and its moments, live;
        the moments are made (zero) where there was no step yet. `state_changed` follows a
        write."""
        trained = [n for n, p in self._parameters.items() if p.requires_grad]
        yield from self.shards.state_shards(trained)

    def state_changed(self) -> None:
        """To be called by every rank after a write into `state_shards`."""
        self.shards.masters_changed()

    def loss_scale(self) -> dict[str, float]:
        """The scale and its counters, where the loss is scaled."""
        if self._scaler is None:
            return {}
        return {k: v for k, v in vars(self._scaler).items() if isinstance(v, int | float)}

    def load_loss_scale(self, state: dict[str, float]) -> None:
        """Set what `loss_scale` gave; what this engine does not have is left out (a run may go on
        in an engine that keeps another kind of scale)."""
        if self._scaler is not None:
            known = self.loss_scale()
            vars(self._scaler).update({k: v for k, v in state.items() if k in known})

    def close(self) -> None:
        """Free the model and all that belongs to it; nothing of the engine works afterwards."""
        module, optimizer = self.module, self._engine.optimizer
        self._engine.destroy()
        if self.stage == 3:
            _release(module, optimizer)
            self._engine.optimizer = None
        else:
            self._adam.state.clear()
        self._hold, self._gathered = nullcontext, {}
        del self._adam, self._engine, self._parameters, self.shards


def _release(module: Any, optimizer: Any) -> None:
    """Cut what DeepSpeed leaves of ZeRO-3 in a module, in autograd's hooks, which the garbage
    collector does not see, and in its own globals: the weights would live as long as the process.
    """
    if module in FWD_MODULE_STACK:
        FWD_MODULE_STACK.remove(module)
    for part in module.modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            getattr(part, kind).clear()
    for p in module.parameters():
        p.grad = p.ds_tensor = None
        p.data = p.data.new_empty(0)
    offload = getattr(optimizer, "parameter_offload", optimizer)  # without training, that alone
    inner = [optimizer.optimizer, optimizer] if offload is not optimizer else []
    for owner in (offload.param_coordinator, offload, *inner):
        vars(owner).clear()


def _loss_scaler(optimizer: Any) -> Any:
    """Where DeepSpeed's wrapper keeps the loss scale; None where it has none."""
    return getattr(optimizer, "loss_scaler", getattr(optimizer, "loss_scale_config", None))


def _shard(model: nn.Module, ds_config: dict[str, Any]) -> None:
    """Convert and shard the weights a block at a time, as ZeRO-3 does.

    `deepspeed.initialize` does it too, but converts and moves the whole model to the GPU first.
    """
    dtype = DTYPES[precision_of(ds_config)]
    for part in [*(model.get_submodule(n) for n in find_blocks(model)), model]:
        weights_in(dtype, part)
        deepspeed.zero.Init(module=part, config_dict_or_path=ds_config)
    for b in model.buffers():
        b.data = b.data.to(deepspeed.get_accelerator().current_device_name())
