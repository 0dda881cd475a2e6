"""The FSDP2 engine: PyTorch's own `fully_shard`, with HSDP as replicas of the sharded model."""

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pipeline.engine.config import precision_of
from pipeline.engine.distributed import start_distributed
from pipeline.engine.optimizer import Hold, weight_groups
from pipeline.errors import BadGradient
from pipeline.model.blocks import find_blocks, weights_in
from pipeline.shard import MOMENTS, ParameterShards, StateShard


class FsdpEngine:
    """A run's model under FSDP2; the interface is that of `ZeroEngine`.

    Every weight is cut into rows over the ranks of a replica; the shards are fp32, so they are the
    master weights of bf16 training too. The blocks are gathered one at a time.
    """

    def __init__(self, model: nn.Module, config: dict[str, Any], optimizer: Any):
        """
        Args:
            model: on the CPU, of any dtype, in train mode; alike on every rank.
            config: from `resolve_fsdp_config`.
            optimizer: has the fields of `recipe.Optimizer`.
        """
        start_distributed()
        self.config = config
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
        mesh = _mesh(self.device.type, config["fsdp"]["replicas"])
        self._shard_group = mesh.get_group("shard")
        policy = MixedPrecisionPolicy()
        if precision_of(config) == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        self._shard = partial(fully_shard, mesh=mesh, mp_policy=policy)
        reshard = config["fsdp"]["reshard_after_forward"]
        for name in find_blocks(model):
            block = model.get_submodule(name)
            self._shard(_in_fp32(block), reshard_after_forward=reshard)
        # Backward begins with what is left for the root: it would be gathered again at once.
        self._module: Any = self._shard(_in_fp32(model), reshard_after_forward=False)
        self._parameters: dict[str, Any] = dict(model.named_parameters())
        self.shards = ParameterShards(model)
        self._optimizer = torch.optim.AdamW(
            weight_groups(model, optimizer.weight_decay),
            lr=optimizer.lr,
            betas=tuple(optimizer.betas),
            eps=optimizer.eps,
            fused=True,
        )
        self.micro_batches: int = config["gradient_accumulation_steps"]  # of a step and rank
        self._clip: float = config["gradient_clipping"]
        self._norm = float("nan")

    @property
    def module(self) -> nn.Module:
        return self._module

    scales_loss = False

    def start_stage(self, extra: int = 0) -> None:
        """Forget the optimizer's moments and its step count. The weights stay as they are.

        extra: micro-batches that a step has on every rank beside those of its batch.
        """
        self.micro_batches = self.config["gradient_accumulation_steps"] + extra
        self._optimizer.state.clear()  # made again at the next step

    @property
    def monitor(self) -> SimpleNamespace:
        """Off: the metric writers are DeepSpeed's."""
        return SimpleNamespace(enabled=False)

    def forward(self, **inputs: Tensor) -> Any:
        return self._module(**inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate; the `last` micro-batch of a step also reduces the gradient over the ranks.

        loss: this micro-batch's mean; the step's gradient is the mean over micro-batches and ranks.
        """
        self._module.set_requires_gradient_sync(last)
        (loss / self.micro_batches).backward()

    @torch.no_grad()
    def step(self, lr: float, hold: Hold = nullcontext) -> bool:
        """Clip and step with learning rate `lr`; True, as no step is skipped without loss scaling.

        hold: entered around the update.

        Raises:
            BadGradient: the gradient's norm is not finite; on every rank, before the update.
        """
        gradients = [p.grad.to_local() for p in self._parameters.values() if p.grad is not None]
        square = nn.utils.get_total_norm(gradients).to(self.device) ** 2
        dist.all_reduce(square, group=self._shard_group)
        norm = square.sqrt()
        self._norm = norm.item()
        if not norm.isfinite():
            self.drop_step()
            raise BadGradient(f"the gradient's norm is {self._norm}")
        if self._clip:
            torch._foreach_mul_(gradients, (self._clip / (norm + 1e-6)).clamp(max=1.0))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        with hold(None):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return True

    def drop_step(self) -> None:
        """In place of `step`: forget the gradient; weights and moments stay as they are."""
        self._optimizer.zero_grad()

    @property
    def gradient_norm(self) -> float:
        """L2 norm of the last step's (masked) gradient, before clipping."""
        return self._norm

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """For forwards without training: no dropout, no gradient. All ranks must do the same
        number of them."""
        self._module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._module.train()
            self._reshard()

    def frozen(self, model: nn.Module) -> Callable[..., Any]:
        """The forward of another model, beside this one and never trained, sharded as this one."""
        model = model.eval().requires_grad_(False)
        if precision_of(self.config) == "bf16":
            weights_in(torch.bfloat16, model)
        for name in find_blocks(model):
            self._shard(model.get_submodule(name), reshard_after_forward=True)
        sharded: Any = self._shard(model, reshard_after_forward=True)
        return sharded

    def release(self, frozen: Any) -> None:
        """Nothing else holds what `frozen` gave."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Set the named weights; every rank gives the same whole tensors (any dtype, device)."""
        for name, whole in weights:
            for shard in self.shards.master_shards([name]):
                shard.fill(whole)
        self.state_changed()

    def _reshard(self) -> None:
        """Give up what a forward has left gathered, in every block: the next one would compute with
        it, whatever the shards are by then."""
        for module in self._module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def full_weights(
        self, trained: bool = False, names: Container[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Every (`trained`, or named) parameter whole, in fp32, one at a time; all ranks call
        it."""
        for name, p in self._parameters.items():
            if (p.requires_grad or not trained) and (names is None or name in names):
                yield name, p.detach().full_tensor()

    def state_shards(self) -> Iterator[StateShard]:
        """Of every trained weight this rank's fp32 rows and their moments, live; the moments are
        made (zero) where there was no step yet. `state_changed` follows a write."""
        for name, p in self._parameters.items():
            if not p.requires_grad:
                continue
            adam = self._optimizer.state[p]
            if not adam:
                adam["step"] = torch.zeros((), device=p.device)
                for moment in MOMENTS:
                    adam[moment] = torch.zeros_like(p)
            for shard in self.shards.master_shards([name]):
                moments = {m: adam[m].to_local().view(-1) for m in MOMENTS}
                yield StateShard(shard, moments, adam)

    def state_changed(self) -> None:
        """To be called by every rank after a write into `state_shards`."""
        self.shards.masters_changed()
        self._reshard()

    def loss_scale(self) -> dict[str, float]:
        """Nothing: no loss is scaled."""
        return {}

    def load_loss_scale(self, state: dict[str, float]) -> None:
        """As of `ZeroEngine`."""

    def close(self) -> None:
        """Free the model and all that belongs to it; nothing of the engine works afterwards."""
        self._optimizer.zero_grad()
        self._optimizer.state.clear()
        del self._module, self._parameters, self._optimizer, self.shards


def _in_fp32(module: nn.Module) -> nn.Module:
    """Convert what is not sharded yet: a block at a time, so that no rank holds the model twice."""
    for p in module.parameters():
        if not isinstance(p, DTensor):
            p.data = p.data.float()
    return module


@cache  # its process groups live as long as the process
def _mesh(device: str, replicas: int) -> DeviceMesh:
    ranks = dist.get_world_size()
    if replicas == 1:
        return init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(
        device, (replicas, ranks // replicas), mesh_dim_names=("replica", "shard")
    )
