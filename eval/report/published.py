"""Published numbers of systems that are not here, for runs over the paper's own orders of tasks.

They are MIGU's (Table 2): T5-large, accuracy over all tasks at the end, in %.
None was measured by this project, and the page shows them apart from what was.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from eval.analysis.load import Run

ORDERS = {
    1: "dbpedia amazon yahoo agnews",
    2: "dbpedia amazon agnews yahoo",
    3: "yahoo amazon agnews dbpedia",
    4: "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo",
    5: "multirc boolqa wic mnli cb copa qqp rte imdb sst2 dbpedia agnews yelp amazon yahoo",
    6: "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolqa wic",
}
"""Table 7, by the names of the domains of `t5_order1` to `t5_order6`."""
# name: (of orders 1, 2, 3, ...; the mean where an order is not told alone, and of which orders)
SYSTEMS: dict[str, tuple[dict[int, float], str]] = {
    "SAPT-LoRA": (
        {4: 82.0, 5: 82.0, 6: 82.0},
        "Table 2, from Zhao et al. 2024: the mean of orders 4, 5 and 6",
    ),
}


@dataclass(frozen=True)
class Published:
    """accuracy: in %."""

    system: str
    accuracy: float
    source: str


def order_of(runs: Sequence[Run]) -> int | None:
    """Which of ORDERS all the runs have; None where they have another one, or differ."""
    found = {
        " ".join(str(stage.get("domain")) for stage in run.recipe.get("stages") or ())
        for run in runs
    }
    return next((number for number, names in ORDERS.items() if found == {names}), None)


def published(runs: Sequence[Run]) -> list[Published]:
    """What the paper has, of the order of the runs, for systems that are not implemented here."""
    order = order_of(runs)
    return [
        Published(name, numbers[order], source)
        for name, (numbers, source) in SYSTEMS.items()
        if order is not None and order in numbers
    ]
