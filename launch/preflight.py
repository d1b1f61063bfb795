"""`python -m launch.preflight`: checks before an expensive job."""

from distcls.cli import run
from distcls.launch.preflight import main

if __name__ == "__main__":
    run(main)
