"""`accelerate launch -m distcls.train --config C`: the `train` command."""

from distcls.cli import run
from distcls.commands.train import main

if __name__ == "__main__":
    run(main)
