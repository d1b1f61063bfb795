"""`python -m launch.ray_train`: training on a Ray cluster."""

from distcls.cli import run
from distcls.launch.ray_train import main

if __name__ == "__main__":
    run(main)
