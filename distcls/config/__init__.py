"""Typed configuration: frozen dataclasses filled from YAML files and dotted flags."""

from distcls.config.command_line import Command, bare, parse, positional, repeated
from distcls.config.load import (
    build,
    config_file,
    dump_yaml,
    flatten,
    options_layer,
    read_yaml,
    take_plain_values,
    told,
)
from distcls.config.schema import Leaf, leaves

__all__ = [
    "Command",
    "Leaf",
    "bare",
    "build",
    "config_file",
    "dump_yaml",
    "flatten",
    "leaves",
    "options_layer",
    "parse",
    "positional",
    "read_yaml",
    "repeated",
    "take_plain_values",
    "told",
]
