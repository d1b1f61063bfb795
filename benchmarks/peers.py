"""`python -m benchmarks.peers FOLDERS.json`: fastai and Ultralytics on the folders of `folders`.

Each trains from scratch on the same share of the same images for the minutes that distcls took
(`benchmarks.folders --keep DIR` prints them), with the settings of its own documentation, at the
size of image that distcls chose, and is asked for the held-out pictures. fastai gets distcls' own
network, MobileNetV3-Small; Ultralytics its smallest one. Both have to be installed beside torch;
Ultralytics is under the AGPL and is called by its command.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import finish

SIZES = {"10 x 200 small grey": 32, "transparent icons": 64}
"""Sides of images where they are not 224."""


def split(source: Path, out: Path, seed: int) -> None:
    """Links to 70 % of each class below `train` and to 10 % below `val`, at least one."""
    rng = random.Random(seed)
    for folder in sorted(source.iterdir()):
        files = sorted(folder.iterdir())
        rng.shuffle(files)
        valid = max(1, len(files) // 10)
        for part, members in (
            ("val", files[:valid]),
            ("train", files[valid : valid + max(1, len(files) * 7 // 10)]),
        ):
            (out / part / folder.name).mkdir(parents=True)
            for file in members:
                (out / part / folder.name / file.name).symlink_to(file)


def fastai(data: Path, held_out: Path, size: int, minutes: float, seed: int) -> tuple[int, float]:
    """Epochs and held-out top-1 of `vision_learner` and `fit_one_cycle`."""
    from fastai.vision import all as fv  # type: ignore[import-not-found]

    fv.set_seed(seed, reproducible=True)
    dls = fv.ImageDataLoaders.from_folder(
        data,
        valid="val",
        item_tfms=fv.RandomResizedCrop(size, min_scale=0.35),
        batch_tfms=fv.aug_transforms(),
        num_workers=0,
    )

    def learner() -> Any:
        net = "mobilenetv3_small_100"
        return fv.vision_learner(
            dls, net, pretrained=False, metrics=fv.accuracy, path=data, model_dir=data / "models"
        )

    first = learner()
    with first.no_bar(), first.no_logging():
        began = time.perf_counter()
        first.fit_one_cycle(1)
        epochs = max(1, round(60 * minutes / (time.perf_counter() - began)))
    one = learner()
    with one.no_bar(), one.no_logging():
        save = fv.SaveModelCallback(monitor="accuracy", fname="best")
        one.fit_one_cycle(epochs, lr_max=3e-3, cbs=save)
        files = fv.get_image_files(held_out)
        scores, _ = one.get_preds(dl=dls.test_dl(files, num_workers=0))
    predicted = [dls.vocab[int(at)] for at in scores.argmax(1)]
    right = [name == file.parent.name for name, file in zip(predicted, files, strict=True)]
    return epochs, statistics.mean(right)


def ultralytics(
    data: Path, held_out: Path, size: int, minutes: float, seed: int
) -> tuple[int, float]:
    """Epochs and held-out top-1 of `yolo classify train`."""
    (data / "test").symlink_to(held_out)
    common = [f"data={data}", f"imgsz={size}", "device=cpu", "workers=0", f"project={data}/runs"]
    train = ["model=yolo26n-cls.yaml", f"time={minutes / 60}", f"seed={seed}", "name=train"]
    yolo = Path(sys.executable).parent / "yolo"
    for task, options in (
        ("train", train),
        ("val", [f"model={data}/runs/train/weights/best.pt", "split=test", "name=test"]),
    ):
        command = [str(yolo), "classify", task, *options, *common]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
    epochs = len((data / "runs/train/results.csv").read_text().splitlines()) - 1
    table = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    found = re.search(r"^ +all +([\d.]+)", table, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"no accuracy in {table!r}")
    return epochs, float(found[1])


PEERS: dict[str, Callable[[Path, Path, int, float, int], tuple[int, float]]] = {
    "fastai": fastai,
    "ultralytics": ultralytics,
}


def main() -> None:
    """Train both on each folder and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folders", type=Path, help="the JSON line of benchmarks.folders")
    parser.add_argument("--keep", type=Path, required=True, help="where it made the folders")
    parser.add_argument("--seeds", default="0", help="seeds of the runs")
    parser.add_argument("--only", action="append", help="a folder's name, or the start of it")
    parser.add_argument("--out", type=Path, help="write the JSON line into this file")
    options = parser.parse_args()
    ours = json.loads(options.folders.read_text())["rows"]
    names = list(dict.fromkeys(row["folder"] for row in ours))
    rows = []
    for name in names:
        if options.only and not name.startswith(tuple(options.only)):
            continue
        minutes = statistics.mean(row["minutes"] for row in ours if row["folder"] == name)
        for seed in map(int, options.seeds.split(",")):
            for peer, run in PEERS.items():
                with tempfile.TemporaryDirectory() as scratch:
                    split(options.keep / "folders" / name, Path(scratch), seed)
                    began = time.perf_counter()
                    held_out = options.keep / "held out" / name
                    size = SIZES.get(name, 224)
                    epochs, accuracy = run(Path(scratch), held_out, size, minutes, seed)
                    took = round((time.perf_counter() - began) / 60, 2)
                figures = {"folder": name, "peer": peer, "seed": seed, "epochs": epochs}
                rows.append(figures | {"held_out_top1": round(accuracy, 4), "minutes": took})
                print(rows[-1], file=sys.stderr, flush=True)
    finish("peers", out=options.out, rows=rows)


if __name__ == "__main__":
    main()
