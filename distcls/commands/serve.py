"""`distcls serve`: a model, or a folder of models, over HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from distcls import log
from distcls.cli import run
from distcls.config import Command
from distcls.serving.options import ServeOptions

COMMAND = Command(
    options=ServeOptions,
    prog="distcls serve",
    about="Serve a model over HTTP: POST images to /predict, or the Open Inference Protocol v2.",
    examples=(
        "distcls serve --model runs/photos",
        "curl --data-binary @photo.jpg http://127.0.0.1:8000/predict",
        "distcls serve --models repository --host 0.0.0.0 --port 8000 --token-file token",
    ),
    groups={
        "essential options": ("model", "models", "name", "host", "port", "grpc_port", "check"),
        "computing": ("provider", "engine", "workers", "batch_size"),
        "access": ("token_file", "tls_cert", "tls_key", "cors", "base_path", "control", "explain"),
        "limits": (
            *("max_body", "max_images", "max_wait", "timeout", "header_timeout", "body_timeout"),
            *("write_timeout", "max_connections"),
        ),
        "operation": ("reload", "drain_delay", "drain_timeout", "access_log"),
    },
    config=True,
)


def main(arguments: Sequence[str]) -> None:
    """Parse, serve, or check and print."""
    options = COMMAND.parse(arguments)
    log.set_quiet(options.quiet)
    from distcls.serving.server import check, print_plan, serve

    if not options.check:
        serve(options)
        return
    plan = check(options)
    if options.json:
        log.print_json(plan)
    else:
        print_plan(plan)


if __name__ == "__main__":
    run(main)
