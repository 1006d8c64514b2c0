"""A page of HTML that needs nothing but itself: no network, no script, light and dark, phone to
desk.

Everything that comes from outside passes through `escape`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from openmsa.evaluation import canvas

# colour in a figure: (name on the page, in the light, in the dark); all readable on the paper
COLOURS = {
    canvas.INK: ("ink", "#1f2328", "#e6e9ec"),
    canvas.SOFT: ("soft", "#59636e", "#9aa4af"),
    canvas.GRID: ("line", "#d9dee3", "#343b43"),
    canvas.BLUE: ("blue", "#0072b2", "#4db3e6"),
    canvas.ORANGE: ("orange", "#b87f00", "#f0b533"),
    canvas.GREEN: ("green", "#00805d", "#2fc59b"),
    canvas.VERMILION: ("vermilion", "#c24e00", "#ff8a47"),
    canvas.PURPLE: ("purple", "#ad5285", "#e29cc4"),
    canvas.SKY: ("sky", "#2b86b8", "#7cc7ef"),
}

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --panel: #f6f8fa; %(light)s }
@media (prefers-color-scheme: dark) { :root { --paper: #15191e; --panel: #1d2329; %(dark)s } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
main { max-width: 58rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0 }
h2 { font-size: 1.2rem; margin: 2.6rem 0 0.6rem; padding-top: 0.8rem;
  border-top: 1px solid var(--line) }
p { margin: 0.5rem 0; max-width: 46rem; overflow-wrap: anywhere }
.soft { color: var(--soft) }
.verdict { background: var(--panel); border-left: 4px solid var(--soft); padding: 0.7rem 1rem;
  font-weight: 600 }
.verdict.yes { border-color: var(--green) } .verdict.no { border-color: var(--vermilion) }
.wide { overflow-x: auto; margin: 0.8rem 0 }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--soft); padding-bottom: 0.3rem }
th, td { padding: 0.3rem 1.1rem 0.3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); white-space: nowrap }
thead th { color: var(--soft); font-weight: 600 }
tbody th { font-weight: 400 }
.words td { white-space: normal; min-width: 7rem }
figure { margin: 1rem 0 }
figure svg { display: block; width: 100%%; height: auto; min-width: 35rem }
figure svg text { font-family: inherit !important }
pre { background: var(--panel); padding: 0.8rem 1rem; overflow-x: auto; font-size: 0.86rem;
  white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 4px }
nav a { color: var(--blue); margin-right: 0.9rem; white-space: nowrap }
@media print { .wide { overflow: visible } figure { break-inside: avoid } }
"""


Section = tuple[str, str, Sequence[str]]


def page(title: str, header: Iterable[str], sections: Sequence[Section]) -> str:
    """The whole page. sections: (anchor, heading, parts); header and parts are HTML made here."""
    links = "\n".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in sections)
    body = "\n".join(
        f'<section id="{anchor}">\n<h2>{escape(heading)}</h2>\n{_join(parts)}\n</section>'
        for anchor, heading, parts in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_style()}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{_join(header)}
<nav>{links}</nav>
{body}
</main>
</body>
</html>
"""


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; `kind` is a class of the style."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def preformatted(text: str) -> str:
    """Text with its line breaks, for commands and samples."""
    return f"<pre>{escape(text)}</pre>"


def table(
    columns: Sequence[str], rows: Iterable[Sequence], caption: str = "", *, kind: str = ""
) -> str:
    """A table; the first cell of a row is its heading. On a narrow screen it scrolls by itself.

    `kind` is a class of the style: "words" lets long cells wrap.
    """
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in columns)
    body = "\n".join(
        f'<tr><th scope="row">{escape(str(first))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide"><table{_class(kind)}>{told}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def picture(svg: str, name: str, description: str) -> str:
    """An SVG text of `canvas.svg_text` as part of the page, in the page's colours.

    `name` keeps its ids apart from those of other pictures; `description` is read to those who
    cannot see it.
    """
    start, stop = svg.index("<svg"), svg.rindex("</svg>") + len("</svg>")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[start:stop], flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = _own_ids(svg, name)
    for colour, (variable, *_) in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    said = escape(description, quote=True)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{said}"', 1)
    return f'<figure><div class="wide">{svg}</div></figure>'


def _own_ids(svg: str, name: str) -> str:
    """Ids with `name` before them, without repeated ones and those that nothing refers to."""
    wanted = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))

    def kept(match: re.Match) -> str:
        if match[1] not in wanted:
            return ""
        wanted.remove(match[1])
        return f' id="{name}-{match[1]}"'

    svg = re.sub(r'\sid="([^"]+)"', kept, svg)
    return re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)


def _style() -> str:
    light = " ".join(f"--{name}: {colour};" for name, colour, _ in COLOURS.values())
    dark = " ".join(f"--{name}: {colour};" for name, _, colour in COLOURS.values())
    return STYLE % {"light": light, "dark": dark}


def _class(kind: str) -> str:
    return f' class="{escape(kind, quote=True)}"' if kind else ""


def _join(parts: Iterable[str]) -> str:
    return "\n".join(part for part in parts if part)
