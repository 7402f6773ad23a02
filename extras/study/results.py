"""Results of the study: a JSON file for each, results.json for all of them, and the tables."""

import json
import os
import sys
from statistics import mean, mode, stdev

from tinymim import UserError

def write(path, text):
    """Whoever reads `path` meanwhile sees all of the old text, or all of this."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text + "\n")
    part.replace(path)

def load(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error

def is_there(path, wanted):
    """Whether this JSON file exists. If it has not what is wanted: an error."""
    if not path.exists():
        return False
    found = load(path)
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(f"{path} has {name} {found.get(name)}, not {value}: use another --out")
    return True

def collect(out):
    """Write OUT/results.json, a line for each file in OUT/results/. Returns its path."""
    found = [json.dumps(load(path)) for path in sorted((out / "results").glob("*.json"))]
    write(out / "results.json", "[\n" + ",\n".join(found) + "\n]")
    return out / "results.json"

def load_all(path):
    """The results in a results.json, which are of one teacher and of the same photos."""
    results = load(path)
    for name in ("teacher", "data"):
        values = {result[name] for result in results}
        if len(values) > 1:
            raise UserError(f"{path} has results with another {name} each: {sorted(values)}")
    return results

def of_seeds(results, row, labels):
    """{seed: result} of a row. Only top-1 and the device may differ."""
    found = {result["seed"]: result for result in results
             if result["row"] == row.key and result["labels"] == labels}
    for seed, result in found.items():
        for name, value in next(iter(found.values())).items():
            if name not in ("seed", "top1", "device") and result[name] != value:
                raise UserError(f"{row.key}: seed {seed} has {name} {result[name]}, not {value}")
    return found

def usual_device(results):
    return mode([result["device"] for result in results] or [""])

def cell(found, first, device):
    """Mean ± deviation of {seed: result}, and the difference to `first` in the seeds of both.
    * if not all are of this device."""
    if not found:
        return ""
    tops = [result["top1"] for result in found.values()]
    text = f"{mean(tops):.1f}" + (f" ± {stdev(tops):.1f}" if len(tops) > 1 else "")
    both = found.keys() & first.keys() if found is not first else ()
    if both:
        difference = mean(found[seed]["top1"] - first[seed]["top1"] for seed in both)
        text += f" ({difference:+.1f})"
    compared = [*found.values(), *(first[seed] for seed in both)]
    return text + " *" * any(result["device"] != device for result in compared)

def paper_cell(row, first):
    if row.paper is None or row is first:
        return f"{row.paper or ''}"
    return f"{row.paper} ({row.paper - first.paper:+.1f})"

def table(rows, results):
    """Markdown, of the rows of one table."""
    columns = {labels: [of_seeds(results, row, labels) for row in rows]
               for labels in ("few", "all")}
    columns = {labels: column for labels, column in columns.items() if any(column)}
    shown = [result for column in columns.values() for found in column for result in found.values()]
    if not shown:
        return f"{rows[0].table}: no results yet"
    photos, device = {result["labels"]: result["photos"] for result in shown}, usual_device(shown)
    lines = [[f"{rows[0].table} (difference to row 1)", "paper",
              *(f"{photos[labels]:,} labels" for labels in columns)]]
    lines.append(["---"] * len(lines[0]))
    for row, *found in zip(rows, *columns.values()):
        cells = [cell(*pair, device) for pair in zip(found, (c[0] for c in columns.values()))]
        lines.append([row.name, paper_cell(row, rows[0]), *cells])
    others = sorted({result["device"] for result in shown} - {device})
    note = f"On {device}." + f" * also or only on {'; '.join(others)}." * bool(others)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}"

def print_tables(results, tables, rows):
    """± is over the seeds: without it there is one."""
    for name in tables:
        text = table([row for row in rows if row.table == name], results)
        encoding = sys.stdout.encoding or "utf-8"  # one without ± and → gets &#177; and the like
        print("\n" + text.encode(encoding, "xmlcharrefreplace").decode(encoding), flush=True)
