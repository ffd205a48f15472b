"""The arithmetic of `vcache plan`, against ARCHITECTURE's numbers, numbers worked out by hand, and counting epoch by epoch."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcache.extract.backbone import BackboneFacts
from vcache.pipelines.planning import (
    Choice,
    ExtractionPlan,
    PlannedStore,
    Rates,
    break_even_epochs,
    forecast,
    recommendation,
)
from vcache.pipelines.progress import STAGES
from vcache.pipelines.request import ExtractionConfig
from vcache.pipelines.setup import array_specs

VIT_B_16 = BackboneFacts(
    model="ViT-B-16-quickgelu",
    num_layers=12,
    width=768,
    num_heads=12,
    head_dim=64,
    patch_size=16,
    image_size=224,
    grid=(14, 14),
    num_tokens=197,
    embed_dim=512,
    layer_norm_eps=1e-5,
)
MB = 10**6


def make_choice(*, video_mb: float, num_videos: int = 1000, missing: int | None = None, **fields: object) -> Choice:
    missing = num_videos if missing is None else missing
    defaults: dict[str, object] = {
        "dtype": "float16",
        "cross_frame": "qk",
        "asked": True,
        "video_bytes": int(video_mb * MB),
        "view_bytes": int(video_mb * MB),
        "total_bytes": int(num_videos * video_mb * MB),
        "missing_bytes": int(missing * video_mb * MB),
        "missing_files": 12 * -(-missing // 64),
        "missing_videos": missing,
        "missing_clips": (missing,),
        "needed_bytes": int(missing * video_mb * MB),
    }
    return Choice(**{**defaults, **fields})  # type: ignore[arg-type]


def make_rates(**fields: object) -> Rates:
    defaults: dict[str, object] = {
        "decode_seconds": 0.02,
        "forward_seconds": (0.03,),
        "write_bytes_per_second": 100.0 * MB,
        "read_bytes_per_second": 400.0 * MB,
        "shared_cores": False,
    }
    defaults["view_decode_seconds"] = fields.get("decode_seconds", defaults["decode_seconds"])
    return Rates(**{**defaults, **fields})  # type: ignore[arg-type]


def make_plan(
    *choices: Choice, free: int = 10**15, rates: Rates | None = None, num_videos: int = 1000
) -> ExtractionPlan:
    return ExtractionPlan(
        dataset="k400",
        stores=(
            PlannedStore(
                path=Path("k400.zarr"),
                is_there=False,
                model="ViT-B-16-quickgelu",
                layers=(8, 9, 10, 11),
                batch_size=4,
                to_retry=0,
            ),
        ),
        num_frames=8,
        splits={"train": num_videos - 100, "val": 100},
        views={"train": 1, "val": 1},
        part=None,
        choices=choices,
        free_bytes=free,
        free_folder=Path("disk"),
        decoder="pyav",
        decode_workers=2,
        device="cpu",
        rates=rates,
    )


def feature_megabytes(**fields: object) -> float:
    """Of one 8-frame clip, without CLS, embedding and view, which are 0.06 MB."""
    specs = array_specs(VIT_B_16, (8, 9, 10, 11), ExtractionConfig(dataset="k400", **fields))  # type: ignore[arg-type]
    small = ("cls", "embed", "frame_index", "crop", "flip")
    assert sum(spec.row_bytes for spec in specs if spec.name.split("/")[0] in small) < 0.12 * MB
    return sum(spec.row_bytes for spec in specs if spec.name.split("/")[0] not in small) / MB


@pytest.mark.parametrize(
    ("fields", "megabytes"),
    [
        ({"cross_frame": "qk"}, 29.0),  # 12 arrays of 8 x 197 x 768 halves
        ({"cross_frame": "none"}, 9.7),
        ({"cross_frame": "maps"}, 14.0),  # 4 x 7 x 2 x 196 x 196 halves in place of the 8 of Q/K
        ({"cross_frame": "derive"}, 12.1),  # 5 arrays of tokens
        ({"cross_frame": "qk", "dtype": "float32"}, 58.1),
    ],
)
def test_bytes_of_a_clip_are_those_of_the_architecture(fields: dict[str, object], megabytes: float) -> None:
    assert feature_megabytes(**fields) == pytest.approx(megabytes, abs=0.06)


@pytest.mark.parametrize(("video_mb", "pays"), [(29.0, False), (27.0, True), (12.1, True), (6.0, True)])
def test_at_3_gb_a_second_and_16_cores_28_megabytes_are_the_limit(video_mb: float, pays: bool) -> None:
    """ARCHITECTURE "Where a cache pays": 0.15 s of decoding on one of 16 cores, 3 GB/s of disk."""
    rates = make_rates(decode_seconds=0.15 / 16, forward_seconds=(0.001,), read_bytes_per_second=3000.0 * MB)
    expected = forecast(make_choice(video_mb=video_mb), rates, 1000)
    assert (expected.break_even_epochs is not None) == pays
    assert expected.store_epoch_seconds / expected.video_epoch_seconds == pytest.approx(video_mb / 28.125)


def test_of_a_backbone_on_a_device_only_the_slowest_part_counts() -> None:
    """1000 videos of 4 MB: decode 20 s, forward 30 s, write 40 s, read 10 s; a faster disk writes in 4 s."""
    expected = forecast(make_choice(video_mb=4), make_rates(), 1000)
    assert expected.video_epoch_seconds == pytest.approx(30)
    assert expected.extraction_seconds == pytest.approx(40)
    assert expected.store_epoch_seconds == pytest.approx(10)
    assert expected.break_even_epochs == 3  # 40 + 2 x 10 = 2 x 30, 40 + 3 x 10 < 3 x 30
    assert expected.limit == "disk"
    faster = forecast(make_choice(video_mb=4), make_rates(write_bytes_per_second=1000.0 * MB), 1000)
    assert (faster.extraction_seconds, faster.limit) == (pytest.approx(30), "device")
    assert faster.video_seconds == pytest.approx({"decode": 0.02, "device": 0.03, "disk": 0.004})


def test_on_shared_cores_decoding_the_backbone_and_the_copies_of_the_writer_add_up() -> None:
    """The disk itself works beside them: 10 s of the 40 s of writing take the cores."""
    rates = make_rates(shared_cores=True, write_cores=0.25)
    expected = forecast(make_choice(video_mb=4), rates, 1000)
    assert expected.video_epoch_seconds == pytest.approx(20 + 30)
    assert expected.extraction_seconds == pytest.approx(20 + 30 + 10)
    assert expected.limit == "device"
    slow_disk = forecast(make_choice(video_mb=4), make_rates(shared_cores=True, write_bytes_per_second=50.0 * MB), 1000)
    assert (slow_disk.extraction_seconds, slow_disk.limit) == (pytest.approx(80), "disk")


def test_one_decode_process_leaves_the_other_cores_to_the_backbone() -> None:
    """A quarter of the cores: 5 of its 20 s; and never faster than it decodes."""
    rates = make_rates(shared_cores=True, decode_cores=0.25)
    assert forecast(make_choice(video_mb=1), rates, 1000).extraction_seconds == pytest.approx(5 + 30)
    rates = make_rates(shared_cores=True, decode_cores=0.25, decode_seconds=0.4)
    expected = forecast(make_choice(video_mb=1), rates, 1000)
    assert (expected.extraction_seconds, expected.limit) == (pytest.approx(400), "decode")


def test_a_view_costs_a_forward_pass_and_no_second_decode_and_an_epoch_reads_one() -> None:
    """1000 videos in 3 views of 1 MB, all decoded in 25 s, one of them in 20 s."""
    choice = make_choice(video_mb=3, view_bytes=MB, missing_clips=(3000,))
    expected = forecast(choice, make_rates(decode_seconds=0.025, view_decode_seconds=0.02), 1000)
    assert expected.video_seconds == pytest.approx({"decode": 0.025, "device": 3 * 0.03, "disk": 0.03})
    assert expected.extraction_seconds == pytest.approx(90)
    assert expected.video_epoch_seconds == pytest.approx(30)
    assert expected.store_epoch_seconds == pytest.approx(1000 * MB / (400 * MB))


def test_each_model_adds_its_forward_passes() -> None:
    rates = make_rates(forward_seconds=(0.03, 0.07))
    expected = forecast(make_choice(video_mb=1, missing_clips=(1000, 2000)), rates, 1000)
    assert expected.extraction_seconds == pytest.approx(30 + 140)
    assert expected.video_epoch_seconds == pytest.approx(30 + 70)


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"decode_seconds": 0.5}, "decode"),
        ({"forward_seconds": (0.5,)}, "device"),
        ({"write_bytes_per_second": 1.0 * MB}, "disk"),
    ],
)
@pytest.mark.parametrize("shared_cores", [False, True])
def test_the_slowest_part_is_what_limits(fields: dict[str, object], limit: str, shared_cores: bool) -> None:
    rates = make_rates(shared_cores=shared_cores, **fields)
    assert forecast(make_choice(video_mb=4), rates, 1000).limit == limit
    assert limit in STAGES


@given(
    decode=st.floats(1e-4, 10),
    forward=st.floats(1e-4, 10),
    write=st.floats(1e6, 1e10),
    decode_cores=st.floats(0, 1),
    write_cores=st.floats(0, 1),
)
def test_shared_cores_are_never_faster_than_a_device_and_nothing_beats_the_slowest_part(
    decode: float, forward: float, write: float, decode_cores: float, write_cores: float
) -> None:
    shared, device = (
        forecast(
            make_choice(video_mb=4),
            make_rates(
                decode_seconds=decode,
                forward_seconds=(forward,),
                write_bytes_per_second=write,
                shared_cores=shared,
                decode_cores=decode_cores,
                write_cores=write_cores,
            ),
            1000,
        )
        for shared in (True, False)
    )
    slowest = 1000 * max(device.video_seconds.values())
    assert device.extraction_seconds == pytest.approx(slowest)
    total = 1000 * sum(device.video_seconds.values())
    assert slowest <= shared.extraction_seconds * (1 + 1e-9) and shared.extraction_seconds <= total * (1 + 1e-9)


def test_only_missing_videos_are_extracted_and_every_video_is_read() -> None:
    whole, rest = (forecast(make_choice(video_mb=4, missing=missing), make_rates(), 1000) for missing in (1000, 250))
    assert rest.extraction_seconds == pytest.approx(whole.extraction_seconds / 4)
    assert rest.store_epoch_seconds == whole.store_epoch_seconds
    nothing = forecast(make_choice(video_mb=4, missing=0), make_rates(), 1000)
    assert (nothing.extraction_seconds, nothing.break_even_epochs) == (0, 1)


@given(extraction=st.integers(0, 500), from_videos=st.integers(1, 60), from_store=st.integers(0, 60))
def test_break_even_is_the_first_epoch_that_is_ahead(extraction: int, from_videos: int, from_store: int) -> None:
    counted = next((n for n in range(1, 502) if extraction + n * from_store < n * from_videos), None)
    assert break_even_epochs(float(extraction), float(from_videos), float(from_store)) == counted


def test_what_pays_is_recommended_and_what_reads_much_less_is_named() -> None:
    asked, maps = make_choice(video_mb=4), make_choice(video_mb=2, cross_frame="maps", asked=False)
    text = recommendation(make_plan(asked, maps, rates=make_rates()))
    assert text == (
        "It pays from epoch 3 on: an epoch takes 10 s from the store, 30 s from videos. "
        "--dtype float16 --cross-frame maps reads 2.0 times less."
    )


def test_where_it_does_not_pay_a_choice_for_the_same_heads_is_named() -> None:
    """One without attention between frames is smaller still, and serves other heads."""
    choices = (
        make_choice(video_mb=29),
        make_choice(video_mb=6, cross_frame="maps", asked=False),
        make_choice(video_mb=2, cross_frame="none", asked=False),
    )
    text = recommendation(make_plan(*choices, rates=make_rates()))
    assert text.startswith("It does not pay: an epoch takes 72 s from the store, 30 s from videos.")
    assert "--cross-frame maps pays" in text
    only = recommendation(make_plan(choices[0], choices[2], rates=make_rates()))
    assert "No choice here does" in only


def test_what_does_not_fit_is_said_first_with_one_that_does() -> None:
    asked, small = make_choice(video_mb=29), make_choice(video_mb=6, cross_frame="maps", asked=False)
    text = recommendation(make_plan(asked, small, free=7000 * MB, rates=make_rates()))
    assert text.startswith(
        "It does not fit: 29.0 GB are needed and 7.0 GB are free. --dtype float16 --cross-frame maps"
    )
    assert "No choice here fits" in recommendation(make_plan(asked, small, free=MB))


def test_without_rates_only_room_is_judged() -> None:
    assert recommendation(make_plan(make_choice(video_mb=29))) == "It fits."
    assert "nothing to extract" in recommendation(make_plan(make_choice(video_mb=29, missing=0)))
