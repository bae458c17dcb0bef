"""The HTML of a report: one file that needs nothing beside it, for screens of any width and for paper."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from ddetr_cli.evaluate.metrics import DEFINITIONS, Interval, Numbers
from ddetr_cli.evaluate.report.figures import Plot
from ddetr_cli.evaluate.report.pictures import LEGEND
from ddetr_cli.plots import to_svg
from ddetr_cli.printable import printable

_WIDE = 6.0  # inches; a wider figure is scrolled on a phone, not shrunk until nobody can read it

_STYLE = """
:root { color-scheme: light; --ink: #1a1a1a; --soft: #5a5a5a; --line: #dcdcdc; --found: #0072b2; --missed: #e69f00;
  --wrong: #cc3a8a; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.2rem clamp(.8rem, 3vw, 2rem) 3rem; color: var(--ink);
  background: #fff; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: clamp(1.3rem, 4.5vw, 1.9rem); line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; border-top: 1px solid var(--line); padding-top: 1.2rem; }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
p { margin: .3rem 0; max-width: 46rem; }
.facts, figcaption, .note { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr)); gap: .7rem; margin: 1.1rem 0; }
.tile { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile.first { background: #eef5fa; border-color: #b9d7e8; }
.tile span { color: var(--soft); font-size: .85rem; display: block; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1.4rem 1.6rem; }
figure { margin: 0; }
figure > img { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem .28rem 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
td.words, th.words { text-align: left; white-space: normal; min-width: 14rem; }
.gallery { columns: 21rem; column-gap: 1.6rem; }
.gallery.pairs { columns: 32rem; }
.gallery figure { break-inside: avoid; margin-bottom: 1.2rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; }
@media (min-width: 64rem) { figure.wide { grid-column: span 2; } }
figure.wide .scroll img { min-width: 32rem; width: 100%; height: auto; display: block; }
.better { color: #006b4f; } .worse { color: #a33b00; }
.picture { position: relative; line-height: 0; }
.picture img, .picture .empty { width: 100%; height: auto; display: block; border-radius: .3rem; }
.picture .empty { background: #ececec; }
.picture svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: hidden; }
rect { fill: none; vector-effect: non-scaling-stroke; stroke-width: 2px; }
rect.found { stroke: var(--found); stroke-width: 1.5px; }
rect.missed { stroke: var(--missed); stroke-dasharray: 6 4; stroke-width: 2.5px; }
rect.wrong { stroke: var(--wrong); stroke-width: 2.5px; }
svg text { font-weight: 600; paint-order: stroke; stroke: #fff; stroke-width: .22em; }
svg text.missed { fill: #8a5a00; } svg text.wrong { fill: #a01866; }
.key { display: inline-flex; align-items: center; gap: .4rem; margin-right: 1.2rem; }
.key i { width: 1.6rem; height: 1rem; border: 2px solid var(--found); }
.key i.missed { border: 2.5px dashed var(--missed); } .key i.wrong { border: 2.5px solid var(--wrong); }
details > summary { cursor: pointer; margin: .5rem 0; }
@media print { body { max-width: none; } figure, .tile { break-inside: avoid; } }
"""


def page(title: str, facts: Iterable[str], sections: Iterable[str]) -> str:
    """The whole document; ``facts`` are plain text, ``sections`` HTML."""
    told = " · ".join(escape(fact) for fact in facts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Without it a browser asks for /favicon.ico, which is not there.
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        f'<h1>{escape(title)}</h1>\n<p class="facts">{told}</p>\n' + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str, note: str = "") -> str:
    """A heading, a sentence under it, and what follows."""
    told = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{told}{''.join(parts)}</section>"


def tiles(numbers: Numbers, intervals: dict[str, Interval | None]) -> str:
    """The six precisions and three recalls as big numbers; three digits, because no data set supports more."""
    told = {"AP": "IoU 0.50 to 0.95", "AP50": "IoU 0.50", "AP75": "IoU 0.75"}
    told |= {
        "APs": "small objects",
        "APm": "medium objects",
        "APl": "large objects",
        "AR100": "recall, 100 a picture",
    }
    parts = []
    for name, meaning in told.items():
        interval = intervals.get(name)
        spread = f"<span>{interval[0]:.3f} to {interval[1]:.3f}</span>" if interval else ""
        first = " first" if name == "AP" else ""
        parts.append(
            f'<div class="tile{first}">{name}<b>{digits(numbers[name])}</b><span>{meaning}</span>{spread}</div>'
        )
    return f'<div class="tiles">{"".join(parts)}</div>'


def plots(chosen: Iterable[Plot]) -> str:
    """The figures beside each other where there is room."""
    parts = []
    for plot in chosen:
        data = base64.b64encode(to_svg(plot.figure)).decode()
        image = f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(plot.alt)}">'
        is_wide = plot.figure.get_figwidth() > _WIDE
        kind, image = (' class="wide"', f'<div class="scroll">{image}</div>') if is_wide else ("", image)
        parts.append(
            f"<figure{kind}><h3>{escape(plot.title)}</h3>{image}"
            f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
        )
    return f'<div class="grid">{"".join(parts)}</div>'


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, folded: str = "") -> str:
    """A table whose cells are HTML; ``folded`` is the line to click where it is to be unfolded first."""
    kinds = [' class="words"' if heading in _IN_WORDS else "" for heading in headings]
    head = "".join(f"<th{kind}>{escape(heading)}</th>" for kind, heading in zip(kinds, headings, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    text = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<details><summary>{escape(folded)}</summary>{text}</details>" if folded else text


def gallery(items: Iterable[tuple[str, str]], *, kind: str = "") -> str:
    """(picture, caption), both HTML, beside each other where there is room, under the key to the boxes.

    ``kind`` "pairs" gives each more room, for two pictures.
    """
    keys = "".join(f'<span class="key"><i class="{kind}"></i>{meaning}</span>' for kind, meaning in LEGEND.items())
    figures = "".join(f"<figure>{image}<figcaption>{caption}</figcaption></figure>" for image, caption in items)
    return f'<p>{keys}</p><div class="gallery {kind}">{figures}</div>'


def definition(name: str) -> str:
    """What one of the twelve numbers is, in words."""
    _, iou, size, limit = DEFINITIONS[name]
    return f"IoU {'0.50:0.95' if iou is None else f'{iou:.2f}'}, {size}, {limit} a picture and class"


_IN_WORDS = ("meaning", "measured at")


def digits(value: float | None) -> str:
    """A number as the page shows it."""
    return "n/a" if value is None else f"{value:.3f}"


def escape(text: str) -> str:
    """Text that came from somewhere else, safe in HTML."""
    return html.escape(printable(text), quote=True)
