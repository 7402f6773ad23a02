"""Accuracy over epochs of distillation: assets/lengths.svg. Needs matplotlib.

    python extras/study/plot.py                                        (of results.json here)
    python extras/study/plot.py runs/study/results.json lengths.svg
"""

import argparse
import sys
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))
import tinymim
from results import load_all, of_seeds, usual_device
from rows import CURVES, LENGTHS

try:
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit(f"matplotlib is not installed here: {sys.executable} -m pip install matplotlib")

COLOURS = "#2563a8", "#e07b16", "#707070"
plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "svg.hashsalt": "tinymim",
                     "axes.spines.top": False, "axes.spines.right": False})

def draw_curve(axes, name, points, color, device):
    """points: {epochs: {seed: result}}. Means, with their deviation where there are more seeds."""
    means = {}
    for epochs, found in points.items():
        tops = [result["top1"] for result in found.values()]
        means[epochs] = mean(tops)
        is_usual = all(result["device"] == device for result in found.values())
        axes.errorbar(epochs, means[epochs], stdev(tops) if len(tops) > 1 else None, color=color,
                      marker="o", markersize=4, capsize=2, mfc=color if is_usual else "white")
    axes.plot(list(means), list(means.values()), color=color, zorder=0)
    axes.annotate(f"{name} ", min(means.items()), (-4, 0), textcoords="offset points", color=color,
                  ha="right", va="center")

def draw(args):
    results = load_all(args.results)
    photos = {result["labels"]: result["photos"] for result in results}
    device = usual_device(results)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axes, labels, title in zip(panels, ("few", "all"), ("{:,} labels", "all {:,} labels")):
        for (name, rows), color in zip(CURVES.items(), COLOURS):
            points = {n: of_seeds(results, row, labels) for n, row in zip(LENGTHS, rows)}
            points = {n: found for n, found in points.items() if found}
            if not points:
                raise tinymim.UserError(f"{args.results} has no row of {name}, {labels} labels "
                                        "(study.py --tables length)")
            draw_curve(axes, name, points, color, device)
        axes.set(title=title.format(photos[labels]), ylabel="top-1 (%)", xscale="log",
                 xlim=(0.4, 36), xlabel="epochs of distillation (MAE: equal compute)")
        axes.set_xticks(LENGTHS, LENGTHS)
        axes.minorticks_off()
    figure.supxlabel("open circles: in part on another device", fontsize=7, color="gray")
    figure.savefig(args.out, metadata={"Date": None})
    print(f"drawn: {args.out}")

def main(argv=None):
    parser = argparse.ArgumentParser("extras/study/plot.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("results", nargs="?", type=Path, default=HERE / "results.json")
    add("out", nargs="?", type=Path, default=ROOT / "assets" / "lengths.svg")
    tinymim.run(parser, draw, parser.parse_args(argv))

if __name__ == "__main__":
    main()
