"""What a user may have meant by an unknown key or flag: its spelling, or another script's word."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from distcls.errors import did_you_mean

ELSEWHERE = {
    "input.size": {"image-size", "img-size", "imgsz", "resolution", "crop-size", "input-size"},
    "size": {"image-size", "img-size", "imgsz", "resolution", "crop-size", "input-size"},
    "lr": {"learning-rate", "lr0", "base-lr", "init-lr"},
    "model.name": {"arch", "architecture", "backbone", "network", "a"},
    "model.pretrained": {"weights", "initial-checkpoint", "finetune"},
    "model": {"weights", "checkpoint", "ckpt", "model-path", "m"},
    "ckpt": {"weights", "checkpoint", "model", "model-path", "run"},
    "loader.workers": {"num-workers", "nworkers", "dataloader-num-workers", "j"},
    "workers": {"num-workers", "nworkers", "dataloader-num-workers", "j"},
    "out": {"output", "output-dir", "output-path", "save-dir", "o", "project", "work-dir"},
    "data": {"data-dir", "dataset", "data-path", "data-root", "root", "source", "input"},
    "source": {"data", "data-dir", "dataset", "data-path", "data-root", "input"},
    "input": {"data", "data-dir", "dataset", "images", "image", "source"},
    "epochs": {"num-epochs", "n-epochs", "max-epochs", "num-train-epochs"},
    "batch_size": {"batch", "bs", "b", "train-batch-size", "per-device-train-batch-size"},
    "precision": {"amp", "fp16", "bf16", "half", "mixed-precision", "dtype"},
    "monitor.patience": {"early-stopping", "early-stop"},
    "accumulate": {"grad-accum", "grad-accum-steps", "gradient-accumulation-steps"},
    "optimizer.name": {"opt", "optim"},
    "optimizer.weight_decay": {"wd", "l2"},
    "optimizer.clip_norm": {"clip-grad", "clip-grad-norm", "grad-clip", "max-grad-norm"},
    "schedule.name": {"scheduler", "lr-scheduler", "sched", "lr-schedule"},
    "schedule.warmup": {"warmup-epochs", "warmup-steps", "lr-warmup-epochs"},
    "loss.name": {"criterion", "loss-fn"},
    "loss.label_smoothing": {"smoothing"},
    "freeze.backbone": {"freeze-layers", "freeze-backbone"},
    "ema.decay": {"model-ema", "model-ema-decay", "ema-decay"},
    "augment.flip": {"hflip", "horizontal-flip", "fliplr"},
    "augment.policy": {"aa", "auto-augment", "augmentation"},
    "augment.erase": {"reprob", "random-erase", "random-erasing"},
    "augment.mixup": {"mixup-alpha"},
    "augment.cutmix": {"cutmix-alpha"},
    "sync_batch_norm": {"sync-bn", "syncbn"},
    "memory_format": {"channels-last"},
    "seed": {"random-seed", "manual-seed", "random-state"},
    "log_every": {"print-freq", "log-interval", "logging-steps"},
    "tracker": {"wandb", "tensorboard", "mlflow", "report-to", "logger"},
    "overwrite": {"exist-ok", "force", "f"},
    "threshold": {"conf", "confidence", "min-confidence"},
    "top_k": {"topk", "k"},
    "folds": {"kfold", "k-fold", "cross-validation", "n-folds"},
    "val_fraction": {"val-split", "val-ratio", "validation-split", "val-size"},
    "test_fraction": {"test-split", "test-ratio", "test-size"},
    "provider": {"device", "gpu", "cuda"},
}
"""What other training scripts call a key. Several keys may have a word; the first that the command
has is meant."""

_DEVICE = "the device is chosen by accelerate launch and CUDA_VISIBLE_DEVICES (empty: the CPU)"
_RANKS = "accelerate launch and torchrun tell each process its rank in the environment"
NO_FLAG = {
    **dict.fromkeys(("device", "devices", "gpu", "gpus", "gpu-id", "cuda", "no-cuda"), _DEVICE),
    **dict.fromkeys(("cpu", "accelerator"), _DEVICE),
    **dict.fromkeys(("local-rank", "rank", "world-size", "dist-url", "dist-backend"), _RANKS),
    **dict.fromkeys(
        ("num-classes", "nb-classes", "classes"), "the classes are those of the dataset"
    ),
    **dict.fromkeys(("verbose", "v"), "progress is always printed, unless --quiet"),
}
"""What other training scripts have a flag for and distcls has none, with what to do instead."""


def suggestion(name: str, known: Collection[str]) -> str:
    """A clause to follow an unknown key, or flag where the known ones are flags.

    It names the known one that is spelt like it, that is in another section, or that other training
    scripts call so; else the nearest few.
    """
    plain = _plain(name)
    last = plain.rpartition(".")[2]
    by_plain = {_plain(each): each for each in known}
    meant = _elsewhere(plain, by_plain)
    if meant is None and plain in NO_FLAG:
        return f"; {NO_FLAG[plain]}"
    near = difflib.get_close_matches(plain, by_plain, n=1, cutoff=0.9)
    meant = meant or (by_plain[near[0]] if near else None)
    if last != plain:  # of another section: `optimizer.lr`
        meant = meant or by_plain.get(last) or _elsewhere(last, by_plain)
    if meant:
        return f"; did you mean {meant!r}?"
    ends = {each: other.rpartition(".")[2] for other, each in by_plain.items()}
    near = difflib.get_close_matches(last, set(ends.values()), n=1, cutoff=0.85)
    found = [each for each, end in ends.items() if end in near]
    if len(found) == 1:
        return f"; did you mean {found[0]!r}?"
    return f" (choices: {', '.join(found)})" if found else did_you_mean(name, known, sort=True)


def _elsewhere(word: str, by_plain: dict[str, str]) -> str | None:
    keys = [_plain(key) for key, words in ELSEWHERE.items() if word in words]
    return next((by_plain[key] for key in keys if key in by_plain), None)


def _plain(name: str) -> str:
    """A key or flag without leading hyphens, in the spelling of flags."""
    return name.lstrip("-").replace("_", "-")
