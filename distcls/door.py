"""How every command ends: errors for the user as one line and a code, bugs with their traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from distcls import log
from distcls.errors import DistclsError

Main = Callable[[Sequence[str]], None]

INTERRUPTED = 130
"""What shells expect of a program that Ctrl-C ended."""


def run(main: Main, arguments: Sequence[str] | None = None) -> NoReturn:
    """Call `main` with the command line and leave with the code that its outcome asks for."""
    try:
        main(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except DistclsError as error:
        log.fail(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        log.fail("interrupted")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # the reader of our output left (`| head`); keep the interpreter from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)
