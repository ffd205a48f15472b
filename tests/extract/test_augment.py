"""What an augmentation refuses, and that its definition survives."""

import json

import pytest

from vcache.extract.augment import Augmentation, augmentation_from_dict
from vcache.extract.randaugment import ColourJitter, RandAugment


def test_a_definition_survives_json() -> None:
    augmentation = Augmentation(
        resize_short=40,
        interpolation="bilinear",
        crop="multiscale",
        scales=(1.0, 0.5),
        randaugment=RandAugment(num_ops=3, fill=(1, 2, 3)),
        jitter=ColourJitter(hue=0.2),
        grey=0.25,
        erasing=0.5,
    )
    assert augmentation_from_dict(json.loads(json.dumps(augmentation.to_dict()))) == augmentation
    assert augmentation_from_dict(Augmentation().to_dict()) == Augmentation()


@pytest.mark.parametrize(
    "fields, operations",
    [
        ({}, 0),
        ({"grey": 0.1}, 1),
        ({"randaugment": RandAugment(num_ops=3), "jitter": ColourJitter(), "grey": 0.1, "erasing": 0.1}, 3 + 4 + 1 + 1),
    ],
)
def test_operations_are_counted_whether_drawn_or_not(fields: dict[str, object], operations: int) -> None:
    assert Augmentation(**fields).num_operations == operations  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"crop": "random"}, "crop 'random' is not supported; choose from: rrc, multiscale, centre"),
        ({"flip": 1.5}, r"flip \(1.5\) must be a probability, from 0 to 1"),
        ({"interpolation": "nearest"}, "interpolation 'nearest' is not supported; choose from: bicubic, bilinear"),
    ],
)
def test_bad_values_are_refused_by_name(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**fields)  # type: ignore[arg-type]


def test_a_field_of_a_later_version_is_refused() -> None:
    later = Augmentation(randaugment=RandAugment()).to_dict()
    later["randaugment"]["depth"] = 3
    with pytest.raises(ValueError, match="an augmentation that this version does not know"):
        augmentation_from_dict(later)
