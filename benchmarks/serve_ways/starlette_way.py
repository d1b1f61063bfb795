"""`python starlette_way.py MODEL PORT WORKERS`: a plain route, the model in a pool of threads."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from classifier import Classifier
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


def main(model: str, port: str, workers: str) -> None:
    """Serve until SIGTERM."""
    classifier = Classifier(model)
    pool = ThreadPoolExecutor(int(workers))

    def classify(data: bytes) -> dict[str, Any]:
        return classifier.classify([classifier.decode(data)])[0]

    async def predict(request: Request) -> JSONResponse:
        data = await request.body()
        return JSONResponse(await asyncio.get_running_loop().run_in_executor(pool, classify, data))

    app = Starlette(routes=[Route("/predict", predict, methods=["POST"])])
    options: dict[str, Any] = {"loop": "uvloop", "http": "httptools", "access_log": False}
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
