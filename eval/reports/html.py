"""HTML from Python: what is not markup already is escaped, and a page needs no other file."""

import base64
import html
import io
import re
from pathlib import Path

from PIL import Image

from meanflow.errors import AssetError

STYLE = Path(__file__).with_name("report.css")
NUMBER = re.compile(r"[−+-]?[\d,.]*\d *%?( *(±|\().*)?")
LONG = 40  # letters in a cell
NONE = "–"


class Html(str):
    """Text that is markup already. What is made from it by other means than `tag` and `join` is plain text again."""

    __slots__ = ()


def tag(name: str, *children: object, **attributes: object) -> Html:
    """`<name attributes>children</name>`; every child but Html is escaped, None is left out.

    Attributes are escaped too; `class_` is spelt so since Python keeps `class` for itself.
    """
    inside = "".join(
        child if isinstance(child, Html) else html.escape(str(child)) for child in children if child is not None
    )
    given = "".join(f' {key.strip("_")}="{html.escape(str(value))}"' for key, value in attributes.items() if value)
    return Html(f"<{name}{given}>{inside}</{name}>")


def join(*parts: Html | str | None) -> Html:
    """Several pieces, one after the other."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts if part))


def image(png: bytes, alt: str, class_: str = "") -> Html:
    """A PNG inside the page."""
    data = base64.b64encode(png).decode()
    chosen = f' class="{html.escape(class_)}"' if class_ else ""
    return Html(f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}"{chosen}>')


def png_of(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, format="PNG", optimize=True)
    return out.getvalue()


def read_picture(path: Path) -> bytes | None:
    """A picture file as a PNG; None if there is none. Raises AssetError if it is damaged."""
    if not path.exists():
        return None
    try:
        with Image.open(path) as picture:
            return png_of(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise AssetError(f"{path}: cannot be read as a picture ({error})") from error


def figure(content: Html, caption: object, class_: str = "") -> Html:
    return tag("figure", tag("div", content, class_="scroll"), tag("figcaption", caption), class_=class_)


def table(header: list[object], rows: list[list[object]], class_: str = "") -> Html:
    """Columns of numbers are right-aligned; the first cell of a row is its heading."""
    columns = list(zip(*rows, strict=True))
    kinds = [_kind(column) for column in columns] or [""] * len(header)
    head = tag("tr", *(tag("th", cell, scope="col", class_=kind) for cell, kind in zip(header, kinds, strict=True)))
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row", class_=kinds[0]),
            *(tag("td", cell, class_=kind) for cell, kind in zip(row[1:], kinds[1:], strict=True)),
        )
        for row in rows
    ]
    whole = tag("table", tag("thead", head), tag("tbody", *body), class_=class_)
    return tag("div", whole, class_="scroll")


def _kind(column: tuple[object, ...]) -> str:
    """Its class in the style sheet: "n" for numbers, "long" for texts that need room."""
    texts = [re.sub("<[^>]*>", "", str(cell)) for cell in column if cell not in ("", NONE, "null")]
    if texts and all(NUMBER.fullmatch(text) for text in texts):
        return "n"
    return "long" if any(len(text) > LONG for text in texts) else ""


def section(title: str, anchor: str, *content: Html | None) -> Html:
    return tag("section", tag("h2", title), *content, id=anchor)


def folded(summary: str, content: Html) -> Html:
    return tag("details", tag("summary", summary), content)


def page(title: str, *content: Html) -> str:
    """A whole document."""
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
    )
    style = STYLE.read_text(encoding="utf-8")
    return (
        f"{head}<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in content if part)
        + "\n</main>\n</body>\n</html>\n"
    )
