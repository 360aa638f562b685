"""What a search costs, of what training costs."""

from __future__ import annotations

from collections.abc import Sequence

from model_zoo.records import Record, Results, table


def with_epochs(rules: str, results: Results) -> str:
    """The rules with the epochs that there were in the place of their names."""
    for figures in [record.figures for record in results.lines][:1]:
        whole, tune = (figures[method]["epochs"] for method in ("scratch", "slimming"))
        epochs = {"TRAIN + TUNE": whole, "GATES": figures["gates"], "TRAIN": figures["train"], "TUNE": tune}
        for name, value in epochs.items():
            rules = rules.replace(f"``{name}``", str(value))
    return rules


def page(results: Results) -> Sequence[str]:
    rows = []
    for record in results.lines:
        f, s = record.figures, record.seconds
        for method, searched in (("scratch", f["gates"]), ("slimming", f["train"])):
            of = f[method]
            spent = [str(searched), f"{s[f'{method} wall']:.1f}", f"{s[f'{method} cpu']:.1f}"]
            macs = [searched * f["dense_macs"], of["epochs"] * of["macs"]]
            spent += [f"{f['images'] * part / 1e12:.3g}" for part in (macs[0], sum(macs))]
            found = [f"{of['macs'] / f['dense_macs']:.2%}", str(of["epochs"]), f"{of['accuracy']:.2%}"]
            rows.append([record.name, str(f["images"]), method, *spent, *found])
    numbers = (
        "epochs", "seconds", "processor seconds", "TMACs seen", "to the end", "MACs", "epochs to train", "accuracy",
    )  # fmt: skip
    columns = {"network": "---", "images": "---:", "search": "---", **dict.fromkeys(numbers, "---:")}
    return [table(columns, rows), *map(sentence, results.lines)]


def sentence(record: Record) -> str:
    f = record.figures
    return (
        f"{record.name}: the search of slimming takes {f['times_wall']:.1f} times as long as that of scratch by the "
        f"clock, {f['times_cpu']:.1f} times by processor seconds."
    )
