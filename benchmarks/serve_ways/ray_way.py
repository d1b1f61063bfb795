"""`python ray_way.py MODEL PORT WORKERS BATCH WAIT`: Ray Serve, a replica for each core."""

from __future__ import annotations

import signal
import sys
from typing import Any

import ray
from classifier import Classifier
from ray import serve
from starlette.requests import Request


def application(model: str, workers: int, batch: int, wait: float) -> Any:
    """The deployment."""

    @serve.deployment(
        num_replicas=workers, max_ongoing_requests=8 * batch, ray_actor_options={"num_cpus": 1}
    )
    class Model:
        def __init__(self) -> None:
            self.classifier = Classifier(model)

        @serve.batch(max_batch_size=batch, batch_wait_timeout_s=wait)
        async def classify(self, images: list[bytes]) -> list[dict[str, Any]]:
            return self.classifier.classify([self.classifier.decode(image) for image in images])

        async def __call__(self, request: Request) -> dict[str, Any]:
            return await self.classify(await request.body())  # type: ignore[no-any-return]

    return Model.bind()


def main(model: str, port: str, workers: str, batch: str, wait: str) -> None:
    """Serve until SIGTERM."""
    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    app = application(model, int(workers), int(batch), float(wait))
    serve.run(app, route_prefix="/predict", logging_config={"enable_access_log": False})
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main(*sys.argv[1:])
