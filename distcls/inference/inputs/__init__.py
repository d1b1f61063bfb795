"""What to predict, as one indexed source: files, shards, tables, lists, objects far away."""

from distcls.inference.inputs.files import state_of
from distcls.inference.inputs.find import TIMEOUT, open_input
from distcls.inference.inputs.source import LabelledSplit, Names, Source, from_split

__all__ = ["TIMEOUT", "LabelledSplit", "Names", "Source", "from_split", "open_input", "state_of"]
