"""Record the L1 magnitude of every output feature (paper, Eq. 2 and section 3.3)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.migu.targets import Target


class MagnitudeRecorder:
    """Sums abs(output) of each target over the tokens of a step into one flat fp32 buffer.

    The flat layout (targets in order, `rows` entries each) lets one all-reduce and a batched
    selection serve the whole model. Outputs are observed only inside `recording()`, which the loop
    opens around the forward: an activation-checkpoint recompute runs in backward, so it is not
    counted twice. A module that is called several times in one forward adds up.
    """

    def __init__(self, targets: list[Target], normalize: Literal["none", "token"] = "none"):
        """normalize: "token" divides each token's output vector by its own L1 norm first."""
        device = targets[0].weight.device
        self.magnitudes = torch.zeros(sum(t.rows for t in targets), device=device)
        self._normalize = normalize == "token"
        self._open = False
        self._hooks = []
        for target, view in zip(
            targets, self.magnitudes.split([t.rows for t in targets]), strict=True
        ):
            self._hooks.append(target.observed.register_forward_hook(self._hook(view)))

    def _hook(self, view: Tensor):
        def observe(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            if self._open:
                self._add(view, output.detach())

        return observe

    @torch.no_grad()
    def _add(self, view: Tensor, output: Tensor) -> None:
        """output: [..., rows] of any float type; summed over the tokens in fp32."""
        magnitudes = output.reshape(-1, view.numel()).abs()
        if self._normalize:
            total = magnitudes.sum(dim=1, dtype=torch.float32, keepdim=True)
            magnitudes = magnitudes / total.clamp_min(torch.finfo(torch.float32).tiny)
        view += magnitudes.sum(dim=0, dtype=torch.float32)

    @contextmanager
    def recording(self) -> Iterator[None]:
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def reduce(self) -> Tensor:
        """Magnitudes of the whole step (all micro-batches, all ranks), fp32 [sum of rows]; resets.

        Every rank gets the same bits, so every rank selects the same rows.
        """
        total = self.magnitudes.clone()
        self.magnitudes.zero_()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
        return total

    def close(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()
