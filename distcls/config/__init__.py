"""Typed configuration: frozen dataclasses filled from YAML files and dotted flags."""

from distcls.config.command_line import Command, bare, parse, positional, repeated
from distcls.config.load import build, dump_yaml, flatten, read_yaml
from distcls.config.schema import Leaf, leaves

__all__ = [
    "Command",
    "Leaf",
    "bare",
    "build",
    "dump_yaml",
    "flatten",
    "leaves",
    "parse",
    "positional",
    "read_yaml",
    "repeated",
]
