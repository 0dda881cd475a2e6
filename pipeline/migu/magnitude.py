"""Record the L1 magnitude of every output feature (paper, Eq. 2 and section 3.3)."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.migu.targets import Target
from pipeline.model.stacked_experts import look_away, observe

CACHED = 2**18  # magnitudes that a CPU still has in its cache when it adds them up


class RowScores:
    """A number for every row of the targets, summed over what is seen, in one flat fp32 buffer.

    The flat layout (targets in order, `rows` entries each) lets one all-reduce and a batched
    selection serve the whole model. `observed` says of which parts of the targets any rank has seen
    something: bool [parts].
    """

    def __init__(self, targets: list[Target]):
        device = targets[0].weight.device
        self.sizes = [t.rows for t in targets]
        self.part_counts = [len(t.parts) for t in targets]
        # One tensor, so that one all-reduce serves both.
        self._sums = torch.zeros(sum(self.sizes) + sum(self.part_counts), device=device)
        self.scores, self.seen = self._sums.split([sum(self.sizes), sum(self.part_counts)])
        self.observed = torch.ones(sum(self.part_counts), dtype=torch.bool, device=device)

    def take(self) -> Tensor:
        """What this rank has recorded since the last time, to be given to `put`; resets."""
        taken = self._sums.clone()
        self._sums.zero_()
        return taken

    def put(self, taken: Tensor) -> None:
        """As if only what is in `taken` (a sum of results of `take`) had been recorded."""
        self._sums.copy_(taken)

    def reduce(self) -> Tensor:
        """The scores of all ranks, fp32 [sum of rows]; resets.

        Every rank gets the same bits, so every rank selects the same rows.
        """
        total = self.take()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
        scores, seen = total.split([len(self.scores), len(self.seen)])
        self.observed = seen > 0
        return scores


class MagnitudeRecorder(RowScores):
    """Sums abs(output) of each target over the real tokens of a step.

    Outputs are observed only inside `recording()`, which the loop opens around the forward: an
    activation-checkpoint recompute runs in backward, so it is not counted twice. A module that is
    called several times in one forward adds up.
    """

    def __init__(self, targets: list[Target], normalize: Literal["none", "token"] = "none"):
        """normalize: "token" divides each token's output vector by its own L1 norm first."""
        super().__init__(targets)
        self._normalize = normalize == "token"
        self._open = False
        self._real: dict[str, Tensor | None] = {}
        self._hooks = []
        self._experts: dict[nn.Module, dict[str, tuple[Target, Tensor, Tensor]]] = defaultdict(dict)
        views = self.scores.split(self.sizes), self.seen.split(self.part_counts)
        for target, view, calls in zip(targets, *views, strict=True):
            if target.experts:
                name = target.name.rsplit(".", 1)[-1]
                self._experts[target.observed][name] = target, view, calls
                continue
            hook = self._hook(target, view, calls)
            self._hooks.append(target.observed.register_forward_hook(hook))
        for module, places in self._experts.items():
            observe(module, partial(self._see, places))

    def _hook(self, target: Target, view: Tensor, calls: Tensor):
        def see(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            if self._open:
                real = self._real.get(target.tokens)
                tokens = output.numel() // target.rows
                self._add(view, output.detach(), _places(target, tokens, real))
                if output.numel():  # an expert may be called without a token
                    calls.add_(1)

        return see

    @torch.no_grad()
    def _see(
        self,
        places: dict[str, tuple[Target, Tensor, Tensor]],
        name: str,
        output: Tensor,
        counts: Tensor,
        token: Tensor,
        tokens: int,
    ) -> None:
        """Of stacked experts; see `stacked_experts.See`."""
        if not self._open or name not in places:
            return
        target, view, calls = places[name]
        real = _places(target, tokens, self._real.get(target.tokens))
        output = self._counted(output.detach(), None if real is None else real[token])
        sums = torch.segment_reduce(
            output.abs().float(), "sum", lengths=counts, axis=0, unsafe=True
        )  # [experts, rows of one]
        view += sums.reshape(-1)
        calls.view(target.experts, -1).add_(sums.any(1, keepdim=True))

    def _counted(self, output: Tensor, real: Tensor | None) -> Tensor:
        """[tokens, rows] with zeros for what is not real, and normalized."""
        if real is not None:
            output = output.masked_fill(~real[:, None], 0)
        if self._normalize:
            total = output.abs().sum(dim=1, dtype=torch.float32, keepdim=True)
            output = output / total.clamp_min(torch.finfo(torch.float32).tiny)
        return output

    @torch.no_grad()
    def _add(self, view: Tensor, output: Tensor, real: Tensor | None) -> None:
        """output: [..., rows] of any float type; summed over the real tokens in fp32."""
        outputs = output.reshape(-1, view.numel())
        size = max(1, CACHED // view.numel())
        if output.is_cuda or torch.compiler.is_compiling():
            size = len(outputs)
        kept = outputs.split(size) if real is None else real.split(size)
        for part, those in zip(outputs.split(size), kept, strict=True):
            view += _absolute_sums(self._counted(part, None if real is None else those))

    @contextmanager
    def recording(
        self, real: Tensor | None = None, decoder: Tensor | None = None
    ) -> Iterator[None]:
        """Observe the forward of one micro-batch.

        Args:
            real: bool or 0/1 [batch, length]: which of the input's tokens are no padding; None: all
            decoder: the same for what the decoder of an encoder-decoder reads.
        """
        self._real = {
            "input": None if real is None else real.bool(),
            "decoder": None if decoder is None else decoder.bool(),
        }
        self._open = True
        try:
            yield
        finally:
            self._open, self._real = False, {}

    def close(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()
        for module in self._experts:
            look_away(module)


def _absolute_sums(x: Tensor) -> Tensor:
    """fp32 [columns]: of each column of [tokens, columns], the sum of |.| in fp32."""
    if x.is_cuda:
        return compiled_as_is(x) if torch.compiler.is_compiling() else _in_one_pass(x)
    return x.abs().sum(dim=0, dtype=torch.float32)


def _in_one_pass(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, ord=1, dim=0, dtype=torch.float32)


# With what a compiler makes of abs and sum the mask costs half as much again: docs/performance.md.
compiled_as_is = torch.library.custom_op("migu::absolute_sums", _in_one_pass, mutates_args=())


@compiled_as_is.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)


def _places(target: Target, tokens: int, real: Tensor | None) -> Tensor | None:
    """real, flattened as the `tokens` that a layer sees are; None: all of them count.

    Raises:
        UserError: the layer sees some of the tokens only, and which are padding is not known.
    """
    if real is None:
        return None
    count = real.numel()
    if tokens == count:
        return real.reshape(-1)
    if tokens == (found := int(real.sum())) or found == count:
        return None  # the model has dropped the padding, or there is none
    raise UserError(
        f"mask: {target.name} sees {tokens} of the {count} tokens of a batch with padding, so its "
        "magnitudes cannot leave the padding out. Leave the layer out with mask.components."
    )
