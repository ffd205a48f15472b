"""What is written into a page is what a parser of HTML reads out of it."""

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from vcache.pipelines.reporting.markup import Markup, join, tag

# What an HTML parser is to hand back as it was: no carriage returns (made line feeds), no null.
TEXT = st.text(st.characters(exclude_characters="\r\x00", exclude_categories=("Cs",)), max_size=30)


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.attributes, self.tags = "", [], []  # type: ignore[var-annotated]

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(name)
        self.attributes += attributes


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


@given(TEXT, TEXT)
def test_text_and_attributes_come_back_and_nothing_in_them_is_markup(text: str, value: str) -> None:
    reader = read(tag("p", text, tag("b", "x"), title=value))
    assert reader.text == f"{text}x"
    assert reader.attributes == [("title", value)]
    assert reader.tags == ["p", "b"]


def test_attributes_are_left_out_or_stand_alone() -> None:
    assert tag("th", "a", class_=None, scope="col", hidden=False) == '<th scope="col">a</th>'
    assert tag("table", data_sortable=True) == "<table data-sortable></table>"
    assert tag("img", src="data:,", alt="") == '<img src="data:," alt="">'


def test_contents_are_joined_however_deep_they_lie() -> None:
    assert join(["a<", [None, Markup("<br>")], (part for part in ("b", 3))]) == "a&lt;<br>b3"
