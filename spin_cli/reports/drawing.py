"""Figures as SVG that follows the page's light or dark colours, and as files.

matplotlib draws each figure once. In the page's copy its colours are replaced by CSS variables and
its inline styles by attributes, so that a page without any inline style or script can show it.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from spin_cli.errors import ModelError

INSTALL = "pip install 'spin-cli[report]'"
WIDTH = 5.0
"""Inches: 360 units at 72 to the inch, so that letters keep their size on a phone."""
COLOURS = {
    "ink": "#1b1b1a",
    "muted": "#66655f",
    "line": "#d8d7d1",
    "paper": "#ffffff",
    "one": "#0072b2",
    "two": "#c65500",
    "three": "#007a5a",
    "four": "#a8488c",
}
"""Light colours by the names of their CSS variables; blue and vermilion differ for everybody (Okabe
and Ito 2008), and nothing is told by colour alone."""
SERIES = ("one", "two", "three", "four")
SVG = "http://www.w3.org/2000/svg"
LINK = "{http://www.w3.org/1999/xlink}href"
KEPT_STYLES = re.compile(
    r"(fill|stroke)(-opacity)?|opacity|stroke-(width|dasharray|dashoffset|linecap|linejoin)"
    r"|font-(size|weight|style)|text-anchor"
)
"""Inline styles that are kept, as attributes."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
STYLE: dict[str, Any] = {
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 10.0,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "text.parse_math": False,  # a class may be called "$1 to $2"
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["line"],
    "axes.facecolor": "none",
    "axes.titlelocation": "left",
    "axes.titlecolor": COLOURS["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Table:
    """Numbers behind a figure."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Figure:
    """One figure, drawn."""

    name: str
    """As its files are called."""
    title: str
    caption: str
    alt: str
    """What it shows, for who cannot see it."""
    table: Table
    svg: str
    """For the page: no inline style, colours as CSS variables."""
    files: dict[str, bytes] = field(default_factory=dict, repr=False)
    """By suffix, where files were asked for: a light picture on white."""
    data: Table | None = None
    """For the file of numbers, where the page shows but a part of them."""


def plain(text: object, limit: int | None = None) -> str:
    """Text without control characters, cut to *limit* characters."""
    found = CONTROL.sub("\ufffd", str(text))
    return found if limit is None or len(found) <= limit else found[: limit - 1].rstrip() + "…"


def check_installed() -> None:
    """Raise `ModelError`, with the command that mends it, where a library is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ModelError(f"a report needs {error.name}, which is not installed", INSTALL) from error


@contextmanager
def _styled() -> Iterator[None]:
    import matplotlib

    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter that the drawing's font lacks
        yield


def draw(
    name: str,
    paint: Callable[[Any], None],
    *,
    title: str,
    caption: str,
    alt: str,
    table: Table,
    data: Table | None = None,
    height: float = 3.0,
    files: bool = False,
) -> Figure:
    """Draw a figure.

    Parameters
    ----------
    paint : takes a `matplotlib.figure.Figure` and fills it
    height : inches; the width is `WIDTH`
    files : make PNG and SVG files as well
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with _styled():
        canvas = Canvas(figsize=(WIDTH, height))
        FigureCanvasAgg(canvas)
        paint(canvas)
        canvas.draw_without_rendering()
        canvas.set_layout_engine("none")  # settled; else it is sought anew for each file
        vector = io.BytesIO()
        canvas.savefig(vector, format="svg", metadata={"Date": None})
        made: dict[str, bytes] = {}
        if files:
            picture = io.BytesIO()
            canvas.savefig(picture, format="png", dpi=200, facecolor=COLOURS["paper"])
            made["png"] = picture.getvalue()
    root = ElementTree.fromstring(vector.getvalue())
    _clean(root, name)
    _describe(root, name, title, alt)
    if files:
        made["svg"] = _standalone(root)
    _follow_page(root)
    return Figure(name, title, caption, alt, table, _text(root), made, data)


def _clean(root: ElementTree.Element, name: str) -> None:
    """Drop what the page does not need; make ids unique; turn styles into attributes."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", _text(root)))
    for element in root.iter():
        _styles_to_attributes(element)
        identity = element.attrib.pop("id", None)
        if identity in used:
            element.set("id", f"{name}-{identity}")
        for key, value in element.attrib.items():
            if "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
        if LINK in element.attrib:
            element.set(LINK, "#" + name + "-" + element.attrib[LINK].removeprefix("#"))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)


def _styles_to_attributes(element: ElementTree.Element) -> None:
    for declaration in element.attrib.pop("style", "").split(";"):
        key, _, value = declaration.partition(":")
        if KEPT_STYLES.fullmatch(key.strip()):
            element.set(key.strip(), value.strip().removesuffix("px"))


def _describe(root: ElementTree.Element, name: str, title: str, alt: str) -> None:
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for place, (tag, text) in enumerate((("title", title), ("desc", alt))):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{name}-{tag}"})
        element.text = plain(text)
        root.insert(place, element)


def _follow_page(root: ElementTree.Element) -> None:
    root.set("class", "figure")
    names = {value: f"var(--{name})" for name, value in COLOURS.items()}
    for element in root.iter():
        for key in ("fill", "stroke"):
            if element.get(key) in names:
                element.set(key, names[element.attrib[key]])


def _standalone(root: ElementTree.Element) -> bytes:
    root.set("font-family", "Helvetica, Arial, sans-serif")
    root.set("style", f"background: {COLOURS['paper']}")
    text = '<?xml version="1.0" encoding="UTF-8"?>\n' + _text(root)
    del root.attrib["style"], root.attrib["font-family"]
    return text.encode()


def _text(root: ElementTree.Element) -> str:
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return ElementTree.tostring(root, encoding="unicode")
