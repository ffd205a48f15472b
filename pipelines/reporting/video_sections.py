"""Videos that a head is most sure of, with frames and with what it looks at."""

from collections.abc import Callable, Sequence
from pathlib import Path

from vcache.pipelines.console import count
from vcache.pipelines.evaluation.predictions import Predictions
from vcache.pipelines.pictures import percent
from vcache.pipelines.reporting.examples import Example
from vcache.pipelines.reporting.frames import FrameSource, strip
from vcache.pipelines.reporting.markup import Content, Markup, tag
from vcache.pipelines.reporting.overlays import Overlay
from vcache.pipelines.reporting.page import Section, caption, note, picture
from vcache.pipelines.reporting.tables import scroll
from vcache.store.reader import FeatureStore


def videos_section(
    predictions: Predictions,
    examples: tuple[Sequence[Example], Sequence[Example]],
    store: FeatureStore | None,
    root: Path | None,
    anchor: str,
    on_video: Callable[[int], None] = lambda done: None,
) -> Section:
    """Right ones and wrong ones, the surest first."""
    source = FrameSource(store, root) if store is not None else None
    done, content = 0, list[Content]()
    for words, which, chosen in (
        ("Surest of what is right", "One of each class at most", examples[0]),
        ("Surest of what is wrong", "One of each pair of classes at most", examples[1]),
    ):
        cards = []
        for example in chosen:
            cards.append(_card(example, source, predictions.split))
            on_video(done := done + 1)
        content += [tag("h3", words), caption(which, "; frames spread evenly over the clip." if source else ".")]
        content.append(tag("ul", cards, class_="videos") if cards else tag("p", "There is none."))
    if source is None:
        content.insert(0, note("Without the store there are no frames to show."))
    elif source.troubles:
        more = f" ({source.troubles[0]})"
        content.insert(
            0,
            note(
                f"{count(len(source.troubles), 'video')} could not be shown{more}. Say where the videos lie with --root."
            ),
        )
    return Section(anchor, "Videos", content)


def _card(example: Example, source: FrameSource | None, split: str) -> Markup:
    frames = source.frames(split, example.video_id) if source is not None else None
    shown = picture(strip(list(frames)), f"Frames of {example.video_id}") if frames is not None else None
    label = " + ".join(example.labels)
    if example.right:
        words: Content = [tag("span", example.predicted, class_="good"), f" {percent(example.probability)}"]
    else:
        words = [
            tag("span", example.predicted, class_="bad"),
            f" {percent(example.probability)}, but it is ",
            tag("strong", label),
            f" ({percent(example.of_label)})",
        ]
    return tag("li", shown, tag("p", words), tag("small", example.video_id))


def overlays_section(overlays: Sequence[Overlay], anchor: str) -> Section:
    """Heat maps of some of these videos."""
    explained = caption(
        "Bright is where the weights are large. A row has one scale over all frames of its video. All layers, and the patches "
        "across frames, are drawn by ",
        tag("code", "vcache explain"),
        ".",
    )
    return Section(anchor, "What the head looks at", [explained, map(_overlay, overlays)])


def _overlay(one: Overlay) -> Markup:
    predicted = ", ".join(f"{name} {percent(p)}" for name, p in one.predictions)
    right = bool(one.predictions) and one.predictions[0][0] in one.labels
    rows = (
        tag("tr", tag("th", words, scope="row"), tag("td", picture(image, f"{one.video_id}: {words}")))
        for words, image in one.rows
    )
    return tag(
        "div",
        tag("h3", " + ".join(one.labels) or one.video_id),
        caption(one.video_id, ": predicted ", tag("span", predicted, class_="good" if right else "bad")),
        scroll(tag("table", tag("tbody", rows)), f"Heat maps of {one.video_id}"),
        map(note, one.notes),
        class_="overlay",
    )
