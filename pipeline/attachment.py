"""Add MIGU to somebody else's training loop: a DeepSpeed engine, plain PyTorch, DDP, FSDP2, a
Hugging Face Trainer (with and without DeepSpeed) and what derives from it (TRL's SFTTrainer)."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import is_dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from pipeline.errors import UserError
from pipeline.migu.gradient_mask import GradientMask, ShardedModel
from pipeline.recipe import EIGHT_BIT_DRIFT, Mask, mask_problems
from pipeline.shard import ParameterShards


def _nothing() -> None:
    pass


class Attached:
    """A mask that works in another loop's steps.

    A step's mask is selected from the forwards whose backward runs in it, whatever becomes of the
    step: gradients that are dropped (zeroed, or skipped by a GradScaler) take their magnitudes with
    them. Where the forward gets a 2-D `attention_mask`, only its real tokens count.
    """

    def __init__(self, model: nn.Module, shards: ShardedModel, settings: Mask, seed: int):
        self.mask = GradientMask(model, settings, seed)
        self.steps = 0
        self._shards = shards
        self._applied = False
        self._sums: Tensor | None = None  # of the forwards behind the gradients that are there
        self._backward = -1  # autograd's number of the last backward pass
        # Parameters whose gradients show whether a step was dropped, and whether there were any.
        self._watched: list[nn.Parameter] = []
        self._had_gradients = False
        self._open = ExitStack()
        self._hooks: list[Any] = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, always_call=True),
        ]

    def apply(self) -> None:
        """Mask the gradients of this step now, once.

        Call it before you clip, so that the norm is that of the masked gradient; otherwise it
        happens in the optimizer's step. Under a DeepSpeed engine and a Trainer it always happens
        before the clipping.

        Raises:
            RuntimeError: no backward ran since the last step.
            UserError: a masked weight has a gradient, but its layer's output was not observed.
        """
        if self._applied:
            return
        self._give_magnitudes()
        self.mask.apply(self._shards, self.steps + 1)
        self._applied = True

    def _give_magnitudes(self) -> None:
        if self.mask.recorder and self.mask.selects and self._sums is not None:
            self.mask.recorder.put(self._sums)

    def detach(self) -> None:
        """Take every hook away: training is dense again."""
        for hook in self._hooks:
            hook.remove()
        self.mask.close()

    def _before_forward(self, module: nn.Module, inputs: Any, named: Any) -> None:
        if torch.is_grad_enabled():
            self._open.enter_context(self.mask.recording(*_real_tokens(module, inputs, named)))

    def _after_forward(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._open.close()
        if not torch.is_grad_enabled():
            return
        recorder = self.mask.recorder
        forward = [recorder.take() if recorder else None]

        def backward_begins(_gradient: Tensor) -> None:
            if forward:  # of several outputs the first one says it
                self._count(forward.pop())

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(backward_begins)

    def _count(self, magnitudes: Tensor | None) -> None:
        """A gradient is about to be added to those that are there: that of this forward."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:  # not another forward of the same loss
            self._backward = backward
            if self._applied or self._gradients_are_gone():
                self._forget()
            elif self._sums is not None:
                self._sums = self._sums * self._gradients_are_not_zero()
                if self.mask.selected and not self._sums.any():
                    self._forget()
        if self.mask.selected and self.mask.recorder:
            raise UserError(
                "attach: backward=row_sparse has selected this step's rows from the forward whose "
                "backward came first, and now there is another one. Run one forward and one "
                "backward a step, or set backward=previous or backward=dense"
            )
        if magnitudes is not None:
            self._sums = magnitudes if self._sums is None else self._sums + magnitudes
        if self.mask.defers:
            self._give_magnitudes()
            self.mask.select(self._shards, self.steps + 1)

    def _forget(self) -> None:
        self._sums, self._applied, self._had_gradients = None, False, False
        self.mask.forget(self.steps + 1)

    def _watch(self, parameters: list[nn.Parameter]) -> None:
        """Look at these for gradients that were dropped."""

        def gradient_came(_parameter: Tensor) -> None:
            self._had_gradients = True

        self._watched = parameters
        self._hooks += [p.register_post_accumulate_grad_hook(gradient_came) for p in parameters]

    def _gradients_are_gone(self) -> bool:
        """Whether there were gradients, and all were set to None. (FSDP2 has none yet between
        micro-batches that it does not reduce.)"""
        return self._had_gradients and all(p.grad is None for p in self._watched)

    def _gradients_are_not_zero(self) -> Tensor | float:
        """1.0, or 0.0 where they were zeroed in place; without waiting for the device."""
        found = [p.grad for p in self._watched if p.grad is not None]
        local = [g.to_local() if isinstance(g, DTensor) else g for g in found]
        local = [g for g in local if g.numel()]
        if not local:
            return 1.0
        norms = torch.stack([n.float() for n in torch._foreach_norm(local, float("inf"))])
        return (norms != 0).any().float()

    def _wrap(
        self,
        owner: Any,
        name: str,
        before: Callable[[], None] = _nothing,
        around: Callable[[], AbstractContextManager] = nullcontext,
        after: Callable[[], None] = _nothing,
    ) -> None:
        """Replace a method of one object by one that does something more, until `detach`."""
        method = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before()
            with around():
                result = method(*args, **kwargs)
            after()
            return result

        setattr(owner, name, wrapped)
        self._hooks.append(_Restore(owner, name, method))

    def _after_step(self, *_: Any) -> None:
        self.steps += 1
        self._forget()


def attach(target: Any, optimizer: Any = None, *, seed: int = 0, **settings: Any) -> Attached:
    """Mask the gradients of every optimizer step from now on.

    Args:
        target: a DeepSpeed engine; a model (plain, DDP or FSDP2) together with its `optimizer`; or
            a Hugging Face `Trainer`, before `train()` is called.
        optimizer: the torch optimizer that steps the model; only with a model.
        seed: for criterion "random".
        settings: the fields of `recipe.Mask`, e.g. threshold=0.7, components=["ffn"],
            update="strict".

    Returns:
        The attachment; with a Trainer, one that is filled in when training begins.

    Raises:
        UserError: where the mask could not take effect: no linear to mask, weights that the
            optimizer does not step, FSDP1, a wrong setting.
    """
    try:
        mask = TypeAdapter(Mask).validate_python(settings)
    except ValidationError as error:
        wrong = [f"{e['loc'][-1]}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
        raise UserError("attach: " + "; ".join(wrong)) from None
    problems = mask_problems(mask)
    if not mask.enabled:
        problems.append("mask.enabled: attach with a mask that is off has no effect")
    if mask.from_stage != 1:
        problems.append("mask.from_stage: has no effect here; attach when masking is to begin")
    if mask.clusters is not None:
        problems.append("mask.clusters: are made of a run's base, which is not known here")
    if mask.refresh == "stage":
        problems.append("mask.refresh: what a stage is, is not known here; give a number of steps")
    if problems:
        raise UserError("attach: " + "; ".join(problems))
    trainer = _class("transformers", "Trainer")
    if trainer and isinstance(target, trainer):
        if optimizer is not None:
            raise UserError("attach: a Trainer has its own optimizer; do not give one")
        return _TrainerAttachment(target, mask, seed)  # type: ignore[return-value]
    engine = _class("deepspeed", "DeepSpeedEngine")
    if engine and isinstance(target, engine):
        if optimizer is not None:
            raise UserError("attach: a DeepSpeed engine has its own optimizer; do not give one")
        return _attach_engine(target, mask, seed)
    if not isinstance(target, nn.Module):
        raise UserError(
            f"attach: {type(target).__name__} is not a DeepSpeed engine, a model or a Trainer"
        )
    if optimizer is None:
        raise UserError("attach: give the model's optimizer too: attach(model, optimizer)")
    return _attach_model(target, optimizer, mask, seed)


def _attach_engine(engine: Any, mask: Mask, seed: int) -> Attached:
    from pipeline.engine.ds_keys import engine_problems
    from pipeline.engine.zero_shards import ZeroShards

    if not hasattr(engine, "_take_model_step"):
        raise UserError("attach: this version of DeepSpeed is not supported; see constraints.txt")
    if engine.optimizer is None:
        raise UserError("attach: this DeepSpeed engine has no optimizer")
    if problems := engine_problems(engine._config._param_dict):
        raise UserError("attach: " + "; ".join(problems))
    _refuse_8bit(engine.basic_optimizer, mask)
    attached = Attached(engine.module, ZeroShards(engine), mask, seed)
    _require_stepped(attached, engine.module, engine.module.parameters())
    hold = partial(attached.mask.hold, attached._shards)
    attached._wrap(engine.basic_optimizer, "step", around=hold)
    # Called once per step, after the reduction, before clipping and the overflow check.
    attached._wrap(engine, "_take_model_step", attached.apply, after=attached._after_step)
    return attached


def _attach_model(model: nn.Module, optimizer: Any, mask: Mask, seed: int) -> Attached:
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise UserError("attach: FSDP1 flattens its parameters; use fully_shard (FSDP2)")
    if isinstance(model, nn.DataParallel):
        raise UserError(
            "attach: DataParallel runs copies of the model whose outputs cannot be recorded; use "
            "DistributedDataParallel (start the script with torchrun)"
        )
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"attach: {type(optimizer).__name__} is not a torch optimizer")
    _refuse_8bit(optimizer, mask)
    attached = Attached(model, ParameterShards(model), mask, seed)
    names = dict(model.named_parameters())
    attached._watch([names[t.name] for t in attached.mask.targets])
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    _require_stepped(attached, model, stepped)
    _require_whole_rows(attached, model)
    holds = ExitStack()

    def before(*_: Any) -> None:
        attached.apply()
        holds.enter_context(attached.mask.hold(attached._shards))

    def after(*_: Any) -> None:
        holds.close()
        attached._after_step()

    attached._hooks += [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
    ]
    return attached


class _TrainerAttachment:
    """Attaches when the Trainer has made its engine or optimizer: when training begins."""

    def __init__(self, trainer: Any, mask: Mask, seed: int):
        from transformers import TrainerCallback

        attachment = self
        self._attached: Attached | None = None

        class Begin(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                attachment._begin(trainer, mask, seed)

        trainer.add_callback(Begin())

    def _begin(self, trainer: Any, mask: Mask, seed: int) -> None:
        if self._attached is not None:
            self._attached.detach()
        engine = _class("deepspeed", "DeepSpeedEngine")
        if engine and isinstance(trainer.model_wrapped, engine):
            self._attached = _attach_engine(trainer.model_wrapped, mask, seed)
            return
        self._attached = _attach_model(trainer.model_wrapped, trainer.optimizer, mask, seed)
        self._attached._wrap(trainer.accelerator, "clip_grad_norm_", before=self._attached.apply)

    def __getattr__(self, name: str) -> Any:
        if self._attached is None:
            raise UserError("attach: the Trainer has not begun to train yet")
        return getattr(self._attached, name)


class _Restore:
    """Puts a wrapped method back; shaped like torch's hook handles."""

    def __init__(self, owner: Any, name: str, method: Any):
        self._owner, self._name, self._method = owner, name, method

    def remove(self) -> None:
        setattr(self._owner, self._name, self._method)


def _require_stepped(attached: Attached, model: nn.Module, stepped: Any) -> None:
    known = {id(p) for p in stepped}
    names = dict(model.named_parameters())
    left_out = [t.name for t in attached.mask.targets if id(names[t.name]) not in known]
    if left_out:
        attached.detach()
        raise UserError(
            f"attach: the optimizer does not step {left_out[0]} and {len(left_out) - 1} more "
            "masked weights; give the optimizer that trains this model"
        )


def _require_whole_rows(attached: Attached, model: nn.Module) -> None:
    """Raises UserError for tensor parallelism: a layer's output is then a part of its features on
    each rank, or a sum that is not added up yet."""
    fsdp = [m for m in model.modules() if isinstance(m, FSDPModule)]
    sharded = {id(p) for module in fsdp for p in module.parameters()}
    names = dict(model.named_parameters())
    for target in attached.mask.targets:
        weight = names[target.name]
        whole = weight.numel() == weight.shape[target.input_dim] * target.rows
        if isinstance(weight, DTensor):
            shards = [p for p in weight.placements if not p.is_replicate()]
            whole &= shards in ([], [Shard(0)]) and (id(weight) in sharded or not shards)
        if not whole:
            attached.detach()
            raise UserError(
                f"attach: {target.name} is split over ranks by tensor parallelism, where a rank "
                "sees a part of the layer's outputs only; use FSDP2, DDP or DeepSpeed ZeRO"
            )


def _refuse_8bit(optimizer: Any, mask: Mask) -> None:
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", 32)  # bitsandbytes
    low = bits == 8 or type(optimizer).__module__.startswith("torchao.")
    if low and mask.update == "gradient":
        raise UserError(f"attach: {type(optimizer).__name__} {EIGHT_BIT_DRIFT}")


def _real_tokens(
    model: nn.Module, inputs: tuple, named: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens of a forward's input, and of its decoder's, are no padding: [batch, length];
    None where nothing says it."""
    inner: Any = model
    while inside := getattr(inner, "module", None) or getattr(inner, "_orig_mod", None):
        inner = inside  # of DDP or torch.compile
    given = dict(zip(signature(inner.forward).parameters, inputs, strict=False)) | named
    real, decoder = given.get("attention_mask"), given.get("decoder_attention_mask")
    encodes = getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
    if encodes and decoder is None and given.get("labels") is not None:
        decoder = given["labels"] != -100  # transformers makes the decoder's input of them
    return tuple(  # type: ignore[return-value]
        m if isinstance(m, Tensor) and m.dim() == 2 else None for m in (real, decoder)
    )


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of what a model's forward returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
    elif is_dataclass(output):
        yield from _tensors(vars(output))


def _class(module: str, name: str) -> Any:
    """A class of a library that the caller has already imported, else None."""
    return getattr(sys.modules.get(module), name, None)
