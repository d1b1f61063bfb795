"""`python -m distcls`: the `distcls` command."""

from distcls.cli import main

if __name__ == "__main__":
    main()
