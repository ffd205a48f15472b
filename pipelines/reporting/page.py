"""One HTML file that needs nothing else: style, script and pictures are in it, and a policy in its head forbids any request."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from PIL import Image

from vcache.pipelines.reporting.markup import Content, Markup, join, tag

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_JPEG_QUALITY = 86


@dataclass(frozen=True)
class Section:
    """A part of a report, with a line in its table of contents."""

    anchor: str
    title: str
    content: Content


def page(title: str, header: Content, sections: Sequence[Section], footer: Content) -> str:
    """The whole file."""
    contents = [tag("li", tag("a", one.title, href=f"#{one.anchor}")) for one in sections]
    body = [
        tag("a", "To the results", href="#content", class_="skip"),
        tag("header", header),
        tag("nav", tag("h2", "Contents"), tag("ol", contents), aria_label="Contents"),
        tag("main", map(_section, sections), id="content"),
        tag("footer", footer),
        tag("script", Markup(_resource("page.js"))),
    ]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Markup(_resource("page.css"))),
    ]
    return f"<!DOCTYPE html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"


def note(*content: Content) -> Markup:
    """What a reader has to know of what is missing."""
    return tag("p", content, class_="note")


def caption(*content: Content) -> Markup:
    """Small words under or above a figure or table."""
    return tag("p", content, class_="caption")


def picture(image: Image.Image, alt: str, *, lossless: bool = False, class_: str | None = None) -> Markup:
    """An image with its bytes in it: JPEG for photographs, else PNG."""
    data = io.BytesIO()
    if lossless:
        image.save(data, "PNG", optimize=True)
    else:
        image.convert("RGB").save(data, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    kind = "png" if lossless else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    return tag("img", src=source, alt=alt, width=image.width, height=image.height, class_=class_)


def tiles(values: Sequence[tuple[str, str, Content]]) -> Markup:
    """(name, value, what stands below) of the few numbers that are read first."""
    return tag(
        "dl",
        (
            tag("div", tag("dt", name), tag("dd", tag("strong", value), tag("small", below) if below else None))
            for name, value, below in values
        ),
        class_="tiles",
    )


def facts(rows: Sequence[tuple[str, Content]]) -> Markup:
    """Names and their values, for reading rather than comparing."""
    return tag("dl", (join([tag("dt", name), tag("dd", value)]) for name, value in rows), class_="facts")


def _section(section: Section) -> Markup:
    return tag("section", tag("h2", section.title), section.content, id=section.anchor)


def _resource(name: str) -> str:
    return files("vcache.pipelines.reporting").joinpath(name).read_text(encoding="utf-8")
