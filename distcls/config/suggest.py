"""What a user may have meant by an unknown key or flag: its spelling, or another script's word."""

from __future__ import annotations

from collections.abc import Mapping

ELSEWHERE = {
    "input.size": {"image-size", "img-size", "imgsz", "resolution", "crop-size", "input-size"},
    "size": {"image-size", "img-size", "imgsz", "resolution", "crop-size", "input-size"},
    "lr": {"learning-rate", "lr0", "base-lr", "init-lr", "max-lr"},
    "model.name": {"arch", "architecture", "backbone", "network", "net", "a"},
    "model.pretrained": {"weights", "initial-checkpoint", "finetune", "no-pretrained"}
    | {"from-scratch"},
    "model.dropout": {"drop", "drop-rate"},
    "model.batch_norm_momentum": {"bn-momentum"},
    "model": {"weights", "checkpoint", "ckpt", "model-path", "m"},
    "ckpt": {"weights", "checkpoint", "model", "model-path", "run"},
    "loader.workers": {"num-workers", "nworkers", "dataloader-num-workers", "j"},
    "workers": {"num-workers", "nworkers", "dataloader-num-workers", "j"},
    "out": {"output", "output-dir", "output-path", "save-dir", "o", "project", "work-dir"}
    | {"save-path", "log-dir", "exp-name", "run-name", "experiment", "outdir"},
    "data": {"data-dir", "dataset", "data-path", "data-root", "root", "source", "input"}
    | {"train-data", "train-dir"},
    "source": {"data", "data-dir", "dataset", "data-path", "data-root", "input"},
    "input": {"data", "data-dir", "dataset", "images", "image", "img", "source"},
    "epochs": {"num-epochs", "n-epochs", "max-epochs", "num-train-epochs"},
    "batch_size": {"batch", "bs", "b", "train-batch-size", "per-device-train-batch-size"}
    | {"batch-size-per-gpu"},
    "precision": {"amp", "fp16", "bf16", "half", "mixed-precision", "dtype", "use-amp"}
    | {"int8", "quantize"},
    "monitor.metric": {"eval-metric", "metric-for-best-model"},
    "monitor.patience": {"early-stopping", "early-stop", "early-stopping-patience"},
    "checkpoint.every_steps": {"save-steps", "save-every", "save-freq", "save-interval"},
    "checkpoint.keep_last": {"save-total-limit", "checkpoint-hist"},
    "resume": {"resume-from", "resume-from-checkpoint", "load", "load-from", "ckpt"},
    "accumulate": {"grad-accum", "grad-accum-steps", "gradient-accumulation-steps"}
    | {"accumulate-grad-batches"},
    "optimizer.name": {"opt", "optim"},
    "optimizer.weight_decay": {"wd", "l2"},
    "optimizer.eps": {"opt-eps", "adam-epsilon"},
    "optimizer.beta1": {"opt-betas", "betas", "adam-beta1"},
    "optimizer.layer_decay": {"llrd", "discriminative-lr"},
    "optimizer.head_lr_scale": {"head-lr", "lr-head", "backbone-lr", "lr-backbone"},
    "optimizer.clip_norm": {"clip-grad", "clip-grad-norm", "grad-clip", "max-grad-norm"}
    | {"gradient-clip-val"},
    "schedule.name": {"scheduler", "lr-scheduler", "sched", "lr-schedule", "lr-scheduler-type"}
    | {"lr-sched", "cos-lr"},
    "schedule.warmup": {"warmup-epochs", "warmup-steps", "lr-warmup-epochs", "warmup-ratio"},
    "schedule.final": {"min-lr", "lrf", "final-lr", "eta-min"},
    "schedule.every": {"decay-epochs", "step-size", "lr-step-size"},
    "schedule.milestones": {"lr-steps", "decay-milestones"},
    "schedule.factor": {"gamma", "lr-gamma", "decay-rate"},
    "loss.name": {"criterion", "loss-fn", "focal-loss"},
    "loss.label_smoothing": {"smoothing", "label-smoothing-factor"},
    "distill.teacher": {"teacher-model", "kd", "distillation"},
    "freeze.backbone": {"freeze-layers", "freeze-backbone", "freeze-epochs", "unfreeze"},
    "ema.decay": {"model-ema", "model-ema-decay", "ema-decay"},
    "average.last_epochs": {"swa", "swa-epochs"},
    "augment.flip": {"hflip", "horizontal-flip", "fliplr", "no-flip"},
    "augment.resized_crop": {"scale", "crop", "random-crop", "crop-scale"},
    "augment.rotate": {"degrees", "rotation"},
    "augment.color_jitter": {"jitter"},
    "augment.policy": {"aa", "auto-augment", "augmentation", "rand-aug", "no-augment"}
    | {"randaugment", "trivialaugment"},
    "augment.erase": {"reprob", "random-erase", "random-erasing", "erasing"},
    "augment.mixup": {"mixup-alpha"},
    "augment.cutmix": {"cutmix-alpha"},
    "augment.mix_probability": {"mixup-prob"},
    "augment.cutmix_probability": {"cutmix-prob", "mixup-switch-prob"},
    "sync_batch_norm": {"sync-bn", "syncbn"},
    "memory_format": {"channels-last"},
    "compile": {"torchcompile", "torch-compile"},
    "seed": {"random-seed", "manual-seed", "random-state"},
    "limit": {"max-samples", "max-train-samples", "subset", "num-samples", "dry-run"}
    | {"fast-dev-run"},
    "log_every": {"print-freq", "log-interval", "logging-steps"},
    "tracker": {"wandb", "tensorboard", "mlflow", "report-to", "logger"},
    "overwrite": {"exist-ok", "force", "f", "overwrite-output-dir"},
    "quiet": {"silent"},
    "threshold": {"conf", "confidence", "min-confidence"},
    "top_k": {"topk", "k"},
    "probabilities": {"probs", "proba", "prob", "softmax"},
    "features": {"embeddings", "embedding"},
    "out_format": {"format"},
    "count": {"n", "num", "num-images", "images"},
    "pattern": {"filter", "list", "name", "all"},
    "split": {"val", "test"},
    "folds": {"kfold", "k-fold", "k-folds", "cross-validation", "n-folds"},
    "val_fraction": {"val-split", "val-ratio", "validation-split", "val-size", "valid-pct"},
    "test_fraction": {"test-split", "test-ratio", "test-size", "test"},
    "path_column": {"image-col", "image-column", "path-col"},
    "label_column": {"label-col", "target-column"},
    "provider": {"device", "gpu", "cuda"},
}
"""What other training scripts call a key. Several keys may have a word; the first that the command
has is meant."""

_DEVICE = "the device is chosen by accelerate launch and CUDA_VISIBLE_DEVICES (empty: the CPU)"
_RANKS = "accelerate launch and torchrun tell each process its rank in the environment"
_SPLITS = (
    "distcls prepare splits the images (--val-fraction, --test-fraction), by their folders train, "
    "val and test where there are such"
)
_METRICS = "distcls evaluate measures a trained model"
_REPLACE = "nothing is overwritten; choose another --out, or remove it first"
_SIZE = "the input size belongs to the model: distcls train --input.size"
NO_FLAG = {
    **dict.fromkeys(("device", "devices", "gpu", "gpus", "gpu-id", "cuda", "no-cuda"), _DEVICE),
    **dict.fromkeys(("cpu", "accelerator"), _DEVICE),
    **dict.fromkeys(("local-rank", "rank", "world-size", "dist-url", "dist-backend"), _RANKS),
    **dict.fromkeys(("ddp", "distributed", "multi-gpu"), "accelerate launch starts the processes"),
    **dict.fromkeys(
        ("num-classes", "nb-classes", "nc", "classes"), "the classes are those of the dataset"
    ),
    **dict.fromkeys(("verbose", "v"), "progress is always printed, unless --quiet"),
    **dict.fromkeys(("mean", "std"), "the normalisation is that of the pretrained weights"),
    **dict.fromkeys(("pin-memory", "pin-mem"), "memory is pinned wherever a GPU is used"),
    **dict.fromkeys(("val-split", "validation-split", "val-fraction", "test-split"), _SPLITS),
    **dict.fromkeys(("val-data", "val-dir", "test-data", "valid-pct"), _SPLITS),
    **dict.fromkeys(
        ("folds", "kfold", "k-fold", "k-folds"), "distcls prepare makes folds (--folds, --fold)"
    ),
    **dict.fromkeys(("eval", "evaluate", "eval-only", "do-eval", "test", "validate"), _METRICS),
    **dict.fromkeys(("force", "overwrite", "exist-ok", "overwrite-output-dir"), _REPLACE),
    **dict.fromkeys(("imgsz", "img-size", "image-size", "size", "resize"), _SIZE),
    **dict.fromkeys(
        ("half", "fp16", "int8"), "the precision is the exported file's: distcls export --precision"
    ),
    **dict.fromkeys(
        ("drop-path", "drop-path-rate", "stochastic-depth"),
        "stochastic depth is that of the network; there is no option for it",
    ),
    "recursive": "a folder is searched with all folders below it",
    "dynamic": "the batch axis of an exported graph is always dynamic",
    "deterministic": "on CPUs runs are bit-equal; GPU kernels may add in any order",
    "start-epoch": "--resume auto continues at the epoch where the run stopped",
    "train-split": "the training split is what --val-fraction and --test-fraction leave",
    "vflip": "there are no vertical flips; --augment.policy takes augmentation of your own",
}
"""What other training scripts have a flag for and a command of distcls may lack, with what to do
instead."""
MOST = 4
"""Most keys that a suggestion names."""


def suggestion(name: str, known: Mapping[str, str]) -> str:
    """A clause to follow an unknown key or flag; `known` has each key and how it is to be shown.

    It names the key that other training scripts call so, that is spelt like it, or that is in
    another section; of a section, or of several keys as near, the first few. Empty if none is near.
    """
    word = _plain(name)
    section, _, last = word.rpartition(".")
    keys = {_plain(key): shown for key, shown in known.items()}
    meant = _elsewhere(word, keys)
    if meant is None and word in NO_FLAG and not any(key.endswith(f".{word}") for key in keys):
        return f"; {NO_FLAG[word]}"
    if section:
        meant = meant or keys.get(last) or _elsewhere(last, keys)
    inside = {key: shown for key, shown in keys.items() if key.startswith(section + ".")}
    if meant:
        near = [meant]
    elif section and inside:
        near = _near(last, inside) or _near(last, keys) or list(inside.values())
    else:
        near = _near(word, keys)
    if len(near) == 1:
        return f"; did you mean {near[0]!r}?"
    if not near:
        return ""
    return f" (choices: {', '.join(near[:MOST])}{', ...' * (len(near) > MOST)})"


def _near(word: str, keys: Mapping[str, str]) -> list[str]:
    """What is spelt most like a word, as it is shown: keys, sections, the last parts of keys; else
    what begins with the word."""
    names: dict[str, list[str]] = {key: [shown] for key, shown in keys.items()}
    parts: dict[str, list[str]] = {}
    for key, shown in keys.items():
        section, _, last = key.rpartition(".")
        if section and f"{section}.name" in keys:
            names[section] = [keys[f"{section}.name"]]
        elif section:
            names.setdefault(section, []).append(shown)
        parts.setdefault(last, []).append(shown)
    most = 0 if len(word) < 3 else 1 + (len(word) > 5) + (len(word) > 9)
    ranks = [
        (_edits(word, other), level, shown)
        for level, table in enumerate((names, parts))
        for other, shown in table.items()
        if abs(len(other) - len(word)) <= most
    ]
    edits, _, near = min(ranks, default=(most + 1, 0, []))
    if edits <= most:
        return near
    begun = [shown for last, each in parts.items() for shown in each if last.startswith(word)]
    return begun if len(word) > 2 else []


def _edits(one: str, other: str) -> int:
    """Letters to insert, remove, replace or swap with their neighbour (optimal string
    alignment)."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        before, last, row = row, before, [i]
        for j, wanted in enumerate(other, start=1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


def _elsewhere(word: str, keys: Mapping[str, str]) -> str | None:
    joined = word.replace("-", "")
    meant = (
        _plain(key)
        for key, words in ELSEWHERE.items()
        if joined in {each.replace("-", "") for each in words}
    )
    return next((keys[key] for key in meant if key in keys), None)


def _plain(name: str) -> str:
    """A key or flag without leading hyphens, in the spelling of flags."""
    return name.lstrip("-").replace("_", "-").lower()
