"""`accelerate launch -m distcls.evaluate`: the `evaluate` command on multiple processes."""

from distcls.cli import run
from distcls.commands.evaluate import main

if __name__ == "__main__":
    run(main)
