"""Where DeepSpeed keeps the local pieces of gradients and weights, under ZeRO 0 to 3.

Between the last backward and the step this is not public API. It is read here and nowhere else;
docs/engines.md says which version that is, tests/test_parity.py fails if it moves.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.zero.utils import get_norm_dtype
from torch import Tensor

from pipeline.engine.moments import is_packed, make_state, moments_of, pack
from pipeline.errors import UserError
from pipeline.shard import Shard, StateShard


class ZeroShards:
    """The shards of a DeepSpeed engine's model, whoever made the engine."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine):
        self._engine = engine
        self.stage = int(engine.zero_optimization_stage())
        self._half = engine.bfloat16_enabled() or engine.fp16_enabled()
        self._parameters: dict[str, Any] = dict(engine.module.named_parameters())

    def gradient_shards(self, names: list[str]) -> Iterator[Shard]:
        """The local live pieces of the named weights' reduced gradients.

        To be called between the last backward and `step`. Together the ranks hold every element
        (at stage 0, and where ZeRO-1 accumulates bf16 in fp32, each rank holds all of them). What
        is cached about a gradient (the norms of ZeRO-Offload) is refreshed when the iteration goes
        on, so that clipping sees the masked gradient.
        """
        optimizer = self._engine.optimizer
        if self.stage in (1, 2) and self._engine.zero_use_cpu_optimizer():
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
        for shard, _, _ in self._masters(names):
            yield shard

    def _masters(self, names: list[str]) -> Iterator[tuple[Shard, Tensor, int]]:
        """The same, with the tensor that AdamW steps on and where in it the piece begins."""
        opt = self._engine.optimizer
        masters = self.stage0_masters()
        for name in names:
            p: Any = self._parameters[name]
            if self.stage == 3:
                piece, group = opt._get_fp32_opt_state_partition(p, release_swap_buffers=True)
                offset = opt.grad_position[opt.get_param_id(p)][1]
                for shard in _partition(name, piece, p, opt._get_param_partition_rank(p)):
                    yield shard, opt.fp32_partitioned_groups_flat[group], offset
            elif self.stage == 0:
                weight = masters.get(id(p), p)
                yield Shard(name, weight.detach().view(-1), 0, tuple(p.shape)), weight, 0
            elif (mapped := getattr(p, "_hp_mapping", None)) is not None:  # ZeRO's own map
                start, offset = mapped.lp_fragment_address.start, mapped.hp_fragment_address.start
                piece = mapped.hp_fragment.detach().view(-1)
                flat = self._stepped()[mapped.param_group_index]
                yield Shard(name, piece, start, tuple(p.shape)), flat, offset

    def names_in(self, groups: list[dict[str, Any]]) -> list[str] | None:
        """The weights with a piece in what these of AdamW's groups step on, under ZeRO-1 and 2;
        None: where it is not told which."""
        if self.stage not in (1, 2):
            return None
        now = {id(flat) for group in groups for flat in group["params"]}
        stepped = zip(self._stepped(), self._names_by_group, strict=True)
        return [name for flat, names in stepped if id(flat) in now for name in names]

    @cached_property
    def _names_by_group(self) -> list[list[str]]:
        """Under ZeRO-1 and 2: the weights with a piece in each of what AdamW steps on."""
        names: list[list[str]] = [[] for _ in self._stepped()]
        for name, p in self._parameters.items():
            if (mapped := getattr(p, "_hp_mapping", None)) is not None:
                names[mapped.param_group_index].append(name)
        return names

    def _stepped(self) -> list[Tensor]:
        """What AdamW steps on: flat local partitions, or, at stage 0, the weights in fp32."""
        opt = self._engine.optimizer
        if self.stage == 3:
            return opt.fp32_partitioned_groups_flat
        if self.stage == 0:
            masters = self.stage0_masters()
            trained = (p for p in self._parameters.values() if p.requires_grad)
            return [masters.get(id(p), p) for p in trained]
        return getattr(opt, "fp32_groups_flat_partition", None) or (
            opt.single_partition_of_fp32_groups
        )

    def state_shards(self, names: list[str]) -> Iterator[StateShard]:
        """The local live pieces of the fp32 weights and of AdamW's moments, which are made (zero)
        where there was no step yet. To be gone through to its end: moments of 8 bits are unpacked,
        and packed again if they were written to."""
        adam = self._engine.basic_optimizer
        states = [make_state(adam, flat) for flat in self._stepped()]
        held: dict[int, list[tuple[Shard, int]]] = {id(state): [] for state in states}
        for shard, flat, offset in self._masters(names):
            held[id(adam.state[flat])].append((shard, offset))
        for state in states:
            moments = moments_of(state)
            before = [m._version for m in moments.values()]
            for shard, offset in held[id(state)]:
                size = shard.tensor.numel()
                here = {name: m.narrow(0, offset, size) for name, m in moments.items()}
                yield StateShard(shard, here, state)
            if is_packed(state) and before != [m._version for m in moments.values()]:
                pack(state, moments)

    def masters_changed(self) -> None:
        """To be called by every rank after a write into `master_shards`: the model's own weights
        follow, as after an optimizer step."""
        opt = self._engine.optimizer
        if self.stage == 0:
            low = {id(p): p for p in self._parameters.values()}
            for key, master in self.stage0_masters().items():
                low[key].data.copy_(master)
        elif self.stage == 3:
            opt._partition_all_parameters()
            for group in range(len(opt.fp16_partitioned_groups_flat)):
                opt._reassign_or_swap_out_partitioned_parameters(group)
            if opt.persistent_parameters:
                opt.persistent_parameters[0].all_gather(opt.persistent_parameters)
        else:
            opt.update_lp_params()

    def stage0_masters(self) -> dict[int, Tensor]:
        """Stage 0 in bf16 or fp16: id of each parameter -> its fp32 copy."""
        if self.stage != 0 or not self._half:
            return {}
        opt = self._engine.optimizer
        groups = zip(opt.fp16_groups, opt.fp32_groups, strict=True)
        return {id(p): m for low, high in groups for p, m in zip(low, high, strict=True)}


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
