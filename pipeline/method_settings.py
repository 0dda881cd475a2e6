"""What the recipe says of its methods (docs/methods.md); those of the mask are in `recipe.py`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pydantic

from pipeline.quantity import number


@dataclass
class Anchor:
    """Stay close to a frozen teacher on text that it wrote itself (docs/methods.md)."""

    # self: sampled from the teacher; a domain, which no stage may train on; random: tokens without
    # any sense (a control)
    text: str = "self"
    loss: Literal["kl", "cross_entropy"] = "kl"  # cross_entropy: learn the text itself (a control)
    fraction: float = 0.25  # of the batch: so many sequences a step beside it
    weight: float = 1.0  # of the KL beside the loss of the new text
    teacher: Literal["base", "previous"] = "base"  # previous: what the stage before published
    cache: int = 64  # likeliest tokens of each position that are kept; 0: ask the teacher each step
    tokens: Annotated[int, pydantic.BeforeValidator(number)] = 1_000_000  # of the text
    mask_anchor: bool = True  # false: the mask leaves the gradient of this text as it is


@dataclass
class OLora:
    """Hold a stage's adapter orthogonal to the earlier ones; with model.lora.incremental."""

    weight: float = 0.5  # of the sum of |A_earlier A_new^T|


@dataclass
class Mocl:
    """Draw a stage's key toward its texts (MoCL); with model.lora.composed."""

    weight: float = 1.0  # of 1 - cosine, beside the loss


@dataclass
class L2ToStart:
    """Decay toward the weights that were there at the start (L2-SP)."""

    weight: float = 0.01
    start: Literal["base", "stage"] = "base"  # of the run, or of each stage


@dataclass
class Half:
    """Train a random half of every block's matrices a stage (HFT); it has no settings."""


@dataclass
class Mofo:
    """Move only the entries of a weight whose momentum is largest (MoFO, arXiv 2407.20999)."""

    share: float = 0.15  # of the entries of each weight tensor, in each step


@dataclass
class SourceColumns:
    """Freeze the columns of the weights that source text uses most (SSU)."""

    text: str = "self"  # written by the base; or a domain
    share: float = 0.5  # of the columns
    sequences: int = 512  # of source text


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
class Epi:
    """Let each text find the adapter of its task (Wang et al. 2023)."""

    sequences: int = 512  # of a stage's training text, of whose representations the means are


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
class HatAdapter:
    """Gates over the ranks of one adapter, of which each stage claims some (HAT, Serra et al. 2018,
    arXiv 1801.01423)."""

    lr: float = 0.05  # of the gates, which plain gradient descent trains
    sparsity: float = 0.75  # weight of the share of the free ranks that a stage opens
    steepness: float = 400.0  # of the gates at the end of a stage; at its start one over it


@dataclass
class PseudoReplay:
    """Learn texts of earlier tasks again that the model writes itself (LFPT5, arXiv 2110.07298)."""

    sequences: int = 64  # of each task: read to learn to write them, and written later
    fraction: float = 0.25  # sequences of a step, relative to train.batch_size
    weight: float = 1.0  # of their loss


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
