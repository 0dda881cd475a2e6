"""What the recipe says of the methods that others have published (docs/methods.md)."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class Das:
    """Soft masks by importance, and a contrast (Ke et al. 2023, arXiv 2302.03241)."""

    sequences: int = 2048  # of a domain's training text, on which importance is measured
    dropout: float = 0.1  # of the two passes whose KL is the proxy for general knowledge
    contrast: float = 1.0  # weight of the contrastive loss; 0: soft masks alone


@dataclass
class Ewc:
    """A quadratic penalty by the Fisher information (Kirkpatrick et al. 2017, arXiv 1612.00796)."""

    weight: float = 5000.0


@dataclass
class Distill:
    """Stay close, on the new text, to a frozen teacher (Hinton et al. 2015, arXiv 1503.02531; Li
    and Hoiem 2016, arXiv 1606.09282)."""

    weight: float = 1.0
    temperature: float = 1.0
    teacher: Literal["previous", "base"] = "previous"  # the model before the stage, or the run


@dataclass
class DerPlusPlus:
    """Replay a few old sequences with what the model said of them then (Buzzega et al. 2020,
    arXiv 2004.07211)."""

    sequences: int = 512  # kept of each stage
    fraction: float = 0.25  # sequences of a step, relative to train.batch_size
    alpha: float = 0.5  # weight of the squared distance to the old hidden states
    beta: float = 0.5  # weight of the loss on the old text


@dataclass
class PublishAverage:
    """Publish each stage's weights interpolated with those it started from (WiSE-FT,
    arXiv 2109.01903)."""

    start: float = 0.3  # share of the stage's start


@dataclass
class Ema:
    """Publish the exponential moving average of each stage's weights."""

    decay: float = 0.99  # a step: about the last 1 / (1 - decay) steps count


@dataclass
class EntropyGate:
    """Count each new token by the entropy of its prediction (EAFT, arXiv 2601.02151)."""

    tokens: int = 20  # likeliest ones, over which the entropy is taken
