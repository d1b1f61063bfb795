"""`python litserve_way.py MODEL PORT WORKERS BATCH WAIT`: LitServe, images as base64 in JSON."""

from __future__ import annotations

import base64
import sys
from typing import Any

import litserve
from classifier import Classifier


class Api(litserve.LitAPI):
    """Decode, batch, predict, as LitServe wants them."""

    model = ""

    def setup(self, device: str) -> None:
        """Called in each worker."""
        self.classifier = Classifier(self.model)

    def decode_request(self, request: dict[str, str]) -> Any:
        """One image."""
        return self.classifier.decode(base64.b64decode(request["image"]))

    def batch(self, inputs: list[Any]) -> list[Any]:
        """They stay a list."""
        return inputs

    def predict(self, x: Any) -> Any:
        """The answers to a batch, or to one image without batching."""
        return (
            self.classifier.classify(x) if isinstance(x, list) else self.classifier.classify([x])[0]
        )

    def unbatch(self, output: list[Any]) -> list[Any]:
        """They are a list."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """It is JSON already."""
        return output


def main(model: str, port: str, workers: str, batch: str, wait: str) -> None:
    """Serve until SIGTERM."""
    api = Api(max_batch_size=int(batch), batch_timeout=float(wait))
    api.model = model
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=int(workers), timeout=False
    )
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
