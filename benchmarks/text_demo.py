"""Text heads on the demo's world of colours and shapes: zero-shot on names the CLIP never saw, and does text win with few videos?

    python benchmarks/text_demo.py [--parts zero-shot,few-shot] [--seeds 3] [--store FOLDER]

64 classes of 8 colours and 8 shapes, 10 videos of each to train on and as many to validate, from a store of embeddings alone.
16 of the combinations were never shown to the CLIP while it was trained. Everything is run as a user would, by `vcache`.

zero-shot   the 16 unseen names among themselves and all 64, and halves of the classes, by each set of templates
few-shot    Table 1 of Text4Vis: classifiers of text, random, orthogonal, discriminants, and learned, at 1, 3, 5 and all videos
            of a class; on a linear layer after the mean (`tap`, `adapter`), and on the transformer (`t_trans`); and ActionCLIP.
            All start with the CLIP's own logit scale. Mean and sample standard deviation over seeds, each with its own videos.

Accuracies do not depend on the machine but for last bits; the seconds are those of a `few-shot` with all its runs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vcache.pipelines.demo.render import TINY_CLIP, render_world
from vcache.pipelines.demo.stills import HELD_OUT, appearance

VCACHE = Path(sys.executable).with_name("vcache")
SCALE = "initial_logit_scale=2.94"
"""The tiny CLIP's."""
FEW_SHOT: dict[str, list[str]] = {
    "tap with an adapter": ["text4vis", "--epochs", "100", "--set", "temporal=tap", "--set", "adapter=true"],
    "t_trans": ["text4vis", "--epochs", "30", "--set", "temporal=t_trans"],
    "actionclip": ["actionclip", "--epochs", "30"],
}
CLASSIFIERS = "classifier=text,random,orthogonal,lda,learned"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="zero-shot,few-shot")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", help="Of few-shot, with commas between them; default: all.")
    parser.add_argument(
        "--store", type=Path, help="Keep the world and its store in this folder, and use what is there."
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = args.store or Path(name)
        store = folder / "world.zarr"
        if not store.exists():
            csv = render_world(folder / "world", train=640, val=640, labels="appearance")
            extract = ["extract", str(csv), "--tsn", "--layers", "none", "--model", f"local-dir:{TINY_CLIP}"]
            vcache(*extract, "--store", str(store))
        if "zero-shot" in args.parts:
            zero_shot(store, Path(name))
        if "few-shot" in args.parts:
            for label in args.rows.split(",") if args.rows else FEW_SHOT:
                few_shot(label, store, Path(name) / label.replace(" ", "-"), args.seeds)


def vcache(*words: str) -> str:
    done = subprocess.run([str(VCACHE), *words], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def zero_shot(store: Path, folder: Path) -> None:
    unseen = folder / "unseen.txt"
    unseen.write_text("\n".join(sorted(map(appearance, HELD_OUT))))
    for title, words in {
        "the 16 unseen among themselves": ["--classes", str(unseen)],
        "all 64, and halves of them": ["--half-classes"],
    }.items():
        print(f"\nzero-shot, {title}\n{vcache('zero-shot', str(store), *words)}", flush=True)


def few_shot(label: str, store: Path, out: Path, seeds: int) -> None:
    head, *words = FEW_SHOT[label]
    words += ["--grid", CLASSIFIERS, "--set", SCALE] if head == "text4vis" else []
    words += [
        "--set",
        "lr=1e-3",
        "--set",
        "batch_size=64",
        "--seeds",
        str(seeds),
        "--skip-invalid",
        "--out",
        str(out),
    ]
    began = time.perf_counter()
    vcache("few-shot", head, str(store), *words)
    print(f"\nfew-shot, {label}: {time.perf_counter() - began:.0f} s, load {os.getloadavg()[0]:.1f}")
    print((out / "few-shot.md").read_text(), flush=True)


if __name__ == "__main__":
    main()
