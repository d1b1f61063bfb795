"""`python -m launch.search`: hyper-parameter search."""

from distcls.cli import run
from distcls.launch.search import main

if __name__ == "__main__":
    run(main)
