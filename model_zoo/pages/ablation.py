"""Quality by variant, beside what the study of reconstruction has."""

from __future__ import annotations

from collections.abc import Sequence

from model_zoo.measuring.ablation import BATCH, RATE, VARIANTS
from model_zoo.records import Results, mean_and_deviation, table

NOTE = (
    "obs cuts the network and fxprune.reconstruct refits it, on unlabelled data, with one choice made otherwise. *all "
    f"weights trained*: {VARIANTS['all weights trained'].train} steps of Adam ({RATE:g}, batches of {BATCH}) to the "
    "dense outputs on the same data after the refit, which is no closed form: what there is to be had beyond it."
)


def page(results: Results) -> Sequence[str]:
    known = [record.figures | {"s": sum(record.seconds.values())} for record in results.lines if record.figures]
    rows = []
    for case, ratio, variant in dict.fromkeys((f["case"], f["ratio"], f["variant"]) for f in known):
        own = [f for f in known if (f["case"], f["ratio"], f["variant"]) == (case, ratio, variant)]
        digits = {"dense": 2, "refitted": 3, "error": 4, "s": 0}
        cells = [mean_and_deviation([f[key] for f in own], digits[key]) for key in digits]
        rows.append([f"{case}, {own[0]['unit']}", f"{ratio:g}", variant, str(own[0]["samples"]), *cells])
    numbers = dict.fromkeys(("samples", "dense", "refitted", "error of the outputs", "seconds"), "---:")
    return [NOTE, table({"network": "---", "MACs": "---:", "variant": "---", **numbers}, rows)]
