"""What a model file says of itself: the same card in `best.pth` and in `best.onnx`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from distcls import __version__
from distcls.errors import BadValue, UsageError, require
from distcls.imaging import Preprocess
from distcls.task import Targets

PREFIX = "distcls."
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard:
    """All that is needed to use a model, and what is known of how good it is."""

    architecture: dict[str, Any]
    """The model config that rebuilds the network: name, stem stride, dropout, ..."""
    classes: tuple[str, ...]
    """Class names; the index is the label."""
    preprocess: Preprocess
    """How an image becomes an input."""
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Where it comes from: epoch, step, scores, dataset."""
    certificate: dict[str, Any] | None = None
    """Parity with the checkpoint on real images; set by the export."""
    targets: Targets | None = None
    """Heads or labels, where it answers with more than one class an image; null otherwise."""

    def __post_init__(self) -> None:
        if self.targets is not None:
            same = self.targets.classes == self.classes
            require(same, "classes", self.classes, "those of targets")

    @property
    def resolved_targets(self) -> Targets:
        """What it answers, one class an image included."""
        return self.targets or Targets(classes=self.classes)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in a checkpoint; `targets` only where there are several."""
        several = {} if self.targets is None else {"targets": self.targets.to_json()}
        return {
            "format": FORMAT,
            "version": __version__,
            "architecture": self.architecture,
            "classes": list(self.classes),
            "preprocess": self.preprocess.to_json(),
            "training": self.training,
            "certificate": self.certificate,
            **several,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> ModelCard:
        """The inverse of `to_json`. Raises UsageError, naming `where`, if it is no such card."""
        try:
            if values["format"] != FORMAT:
                raise UsageError(
                    f"{where}: model format {values['format']!r} is not known to distcls "
                    f"{__version__} (it reads {FORMAT}); was it written by a newer version?"
                )
            return cls(
                architecture=dict(values["architecture"]),
                classes=tuple(values["classes"]),
                preprocess=Preprocess.from_json(values["preprocess"]),
                training=dict(values["training"]),
                certificate=values["certificate"],
                targets=Targets.from_json(values["targets"]) if "targets" in values else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError, BadValue) as error:
            raise UsageError(f"{where}: not a model written by distcls ({error})") from error

    def to_metadata(self) -> dict[str, str]:
        """The card as ONNX metadata: `distcls.*` keys with JSON values."""
        return {PREFIX + key: json.dumps(value) for key, value in self.to_json().items()}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], where: str) -> ModelCard:
        """The inverse of `to_metadata`; keys of others are passed over."""
        own = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}
        if not own:
            raise UsageError(
                f"{where}: carries no distcls metadata; export it with export.onnx, or tell "
                "distcls predict of it with --classes, --size, --mean and --std"
            )
        try:
            values = {key: json.loads(value) for key, value in own.items()}
        except json.JSONDecodeError as error:
            raise UsageError(f"{where}: its distcls metadata is damaged: {error}") from error
        return cls.from_json(values, where)
