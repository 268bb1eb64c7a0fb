"""Tables and plots of a run, from its JSON files alone: a Markdown file and PNGs a case, and `report.html` with all of it.

`python -m benchmarks report DIR` draws them again. The page needs no network: pictures are inside.
"""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from benchmarks.case import Cell, Plot, Result, Table, read_run

COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#787774", "#cb912f", "#337ea9")
BASELINE_COLOUR = "#37352f"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #24292f; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 0.6rem 0 0.3rem; font-size: 13.5px; font-variant-numeric: tabular-nums }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #d8dee4; text-align: right }
th:first-child, td:first-child { text-align: left }
th { border-bottom: 2px solid #8c959f }
img { max-width: 100%; margin: 0.6rem 0 }
.question { font-size: 17px } .note { color: #57606a; font-size: 13.5px } .failure { color: #b35900 }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem; font-size: 13.5px } dd { margin: 0 }
"""


def show(value: Cell) -> str:
    """A number with three digits that count, thousands apart; text as it is."""
    if isinstance(value, bool) or isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 4
        return f"{value:,.{digits}f}"
    return f"{value:.2e}"


def as_markdown(table: Table) -> str:
    """The table under its title."""
    lines = [f"**{table.title}**", "", "| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(map(show, row)) + " |" for row in table.rows]
    return "\n".join([*lines, *(["", table.note] if table.note else [])])


def draw(plot: Plot, path: Path) -> None:
    """Write the plot as a PNG. ImportError without matplotlib (pip install idm-fast[bench])."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: list[Cell] = list(dict.fromkeys(x for points in plot.lines.values() for x, _ in points))
    listed = plot.bars and 1 in (len(plot.lines), len(groups))
    height = 1.2 + 0.29 * max(len(groups), len(plot.lines)) if listed else 4.6
    wide = plot.bars and not listed and len(groups) > 12
    figure, axes = pyplot.subplots(figsize=(11 if wide else 8, height), dpi=110)
    axes.set_axisbelow(True)
    axes.grid(axis="x" if listed else "y", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    if listed:
        _list_bars(axes, plot)
    else:
        _draw_points(axes, plot, groups)
    axes.set_title(plot.title, loc="left", fontsize=11, wrap=True)
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def _list_bars(axes: Any, plot: Plot) -> None:
    """Bars below each other, each named on the axis: for one line or one group of bars."""
    entries = [(name if len(plot.lines) > 1 else str(x), y) for name, points in plot.lines.items() for x, y in points]
    colours = [BASELINE_COLOUR if name == plot.baseline else COLOURS[0] for name, _ in entries]
    names = [f"{name} (baseline)" if name == plot.baseline else name for name, _ in entries]
    bars = axes.barh(range(len(entries)), [y for _, y in entries], 0.75, color=colours)
    axes.bar_label(bars, [f"{y:.3g}" for _, y in entries], fontsize=8, padding=3)
    axes.set_yticks(range(len(entries)), names, fontsize=8.5)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.02)
    shared = {str(x) for points in plot.lines.values() for x, _ in points} if len(plot.lines) > 1 else set()
    axes.set_xlabel("; ".join([plot.y_label, *shared]))
    if plot.log_y:
        _label_logarithmic(axes, axes.xaxis, "x", [y for _, y in entries])


def _draw_points(axes: Any, plot: Plot, groups: list[Cell]) -> None:
    """Lines through points, or bars beside each other in groups; a legend names them."""
    from matplotlib import ticker

    colours = iter(COLOURS * (1 + len(plot.lines) // len(COLOURS)))
    width = 0.8 / max(len(plot.lines), 1)
    for k, (name, points) in enumerate(plot.lines.items()):
        base = name == plot.baseline
        label = f"{name} (baseline)" if base else name
        colour = BASELINE_COLOUR if base else next(colours)
        if plot.bars:
            places = [groups.index(x) + (k - (len(plot.lines) - 1) / 2) * width for x, _ in points]
            bars = axes.bar(places, [y for _, y in points], 0.92 * width, label=label, color=colour)
            if len(groups) * len(plot.lines) <= 40:
                axes.bar_label(bars, [f"{y:.3g}" for _, y in points], fontsize=7.5, padding=1)
        else:
            style = {"color": colour, "marker": "o", "markersize": 4, "linestyle": "--" if base else "-"}
            axes.plot([x for x, _ in points], [y for _, y in points], label=label, **style)
    values = [y for points in plot.lines.values() for _, y in points]
    if plot.bars:
        crowded = {"rotation": 40, "ha": "right", "fontsize": 8} if len("".join(map(str, groups))) > 60 else {}
        axes.set_xticks(range(len(groups)), [str(group) for group in groups], **crowded)
    elif plot.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    elif all(isinstance(x, int) for x in groups):
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    if plot.log_y:
        _label_logarithmic(axes, axes.yaxis, "y", values)
    elif not plot.bars or all(y >= 0 for y in values):
        axes.set_ylim(bottom=0)
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    if len(plot.lines) > 1:
        axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _label_logarithmic(axes: Any, axis: Any, which: str, values: list[float]) -> None:
    """A logarithmic axis with plain numbers on it, also between powers of ten where there are few of those."""
    from matplotlib import ticker

    axes.set(**{f"{which}scale": "log"})
    span = max(values) / min(values)
    steps = (1.0,) if span > 1000 else (1.0, 2.0, 5.0) if span > 6 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(ticker.LogLocator(subs=steps, numticks=20))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())


def write_case(folder: Path, data: dict[str, Any]) -> None:
    """Markdown and PNGs of one case's JSON."""
    result, name = Result.from_json(data["result"]), data["case"]
    pictures = _draw_all(folder, name, result)
    lines = [f"# {name}", "", data["question"], "", machine_line(data["machine"]) + (", `--quick`" if data["quick"] else "")]
    for table in result.tables:
        lines += ["", as_markdown(table)]
    for plot, picture in zip(result.plots, pictures, strict=False):
        lines += ["", f"![{plot.title}]({picture.name})"]
    lines += [line for note in result.notes for line in ("", note)]
    lines += [line for failure in result.failures for line in ("", f"Did not work: {failure}")]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _draw_all(folder: Path, name: str, result: Result) -> list[Path]:
    pictures = [folder / (f"{name}.png" if len(result.plots) == 1 else f"{name}_{k}.png") for k in range(len(result.plots))]
    try:
        for plot, picture in zip(result.plots, pictures, strict=True):
            draw(plot, picture)
    except ImportError as error:
        print(f"no plots: {error}; pip install 'idm-fast[bench]'")
        return []
    return pictures


def machine_line(machine: dict[str, Any]) -> str:
    """One line: device, threads or compute capability, versions, commit."""
    parts = [machine["device_name"]]
    if machine["device"] == "cuda":
        parts.append(f"driver {machine['driver']}, CUDA {machine['cuda']}")
    else:
        parts.append(f"{machine['threads']} of {machine['cores']} cores")
    parts.append(f"torch {machine['torch']}, Triton {machine['triton']}, Python {machine['python']}")
    return ", ".join([*parts, f"commit {machine['commit']}"])


def write_page(folder: Path) -> Path:
    """`report.html` from every JSON of the folder, in the order of the cases."""
    from benchmarks.cases import ORDER

    found = read_run(folder)
    found.sort(key=lambda data: ORDER.index(data["case"]) if data["case"] in ORDER else len(ORDER))
    parts = ["<h1>idm-fast: benchmark report</h1>"]
    if sentence := differences(found):
        parts.append(f'<p class="failure">{html.escape(sentence)}</p>')
    first, *others = [data["machine"] for data in found] or [{}]
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    parts += ["<dl>", *(f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in shared.items())]
    entries = [f'<li><a href="#{d["case"]}">{d["case"]}</a>: {html.escape(d["question"])}</li>' for d in found]
    parts += ["</dl><ul>", *entries, "</ul>"]
    for data in found:
        parts += _section(folder, data)
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>idm-fast benchmarks</title><style>{STYLE}</style>'
    path = folder / "report.html"
    path.write_text(page + "\n".join(parts) + "</html>\n", encoding="utf-8")
    return path


def differences(found: list[dict[str, Any]]) -> str:
    """A sentence about what the cases, each the JSON of one, do not have in common; empty for cases of one run."""
    values = {
        "commits": [data["machine"]["commit"] for data in found],
        "machines": [data["machine"]["device_name"] for data in found],
        "threads": [str(data["machine"]["threads"]) for data in found],
        "runs": ["quick" if data["quick"] else "full" for data in found],
    }
    texts = [f"{what}: {', '.join(dict.fromkeys(of_each))}" for what, of_each in values.items() if len(set(of_each)) > 1]
    return f"These cases were not measured alike ({'; '.join(texts)}). Each says below how it was." if texts else ""


def _section(folder: Path, data: dict[str, Any]) -> list[str]:
    result, name = Result.from_json(data["result"]), data["case"]
    how = html.escape(f"{data['seconds']:.0f} s{', quick' if data['quick'] else ''}, {machine_line(data['machine'])}")
    parts = [f'<h2 id="{name}">{name}</h2><p class="question">{html.escape(data["question"])}</p><p class="note">{how}</p>']
    parts += [f'<p class="failure">Did not work: {html.escape(failure)}</p>' for failure in result.failures]
    for k, plot in enumerate(result.plots):
        picture = folder / (f"{name}.png" if len(result.plots) == 1 else f"{name}_{k}.png")
        if picture.is_file():
            content = base64.b64encode(picture.read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(plot.title)}" src="data:image/png;base64,{content}">')
    for table in result.tables:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(show(cell))}</td>" for cell in row) + "</tr>" for row in table.rows)
        parts.append(f"<h3>{html.escape(table.title)}</h3><table><tr>{head}</tr>{rows}</table>")
        parts += [f'<p class="note">{html.escape(table.note)}</p>'] if table.note else []
    return parts + [f'<p class="note">{html.escape(note)}</p>' for note in result.notes]
