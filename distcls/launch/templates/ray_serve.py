# Ray Serve: the application of distcls serve in replicas of a Ray cluster.
#   pip install "distcls[ray,serve]"
#   DISTCLS_MODEL=/shared/runs/photos serve run ray_serve:app
# Yours to change: the replicas, their cores and the path of the model, which every machine has to
# see. Ray's proxy has no limits of its own for slow clients: put nginx in front (distcls templates
# nginx). The limits of the application hold in each replica.
import os

from ray import serve

from distcls.serving.app import make_app

CORES = 2
"""Of each replica: so many threads decode and compute in it."""


@serve.deployment(
    num_replicas=2,
    ray_actor_options={"num_cpus": CORES},
    # the application refuses by itself what it cannot do in time, with 503 and Retry-After
    max_ongoing_requests=1000,
    graceful_shutdown_timeout_s=40,
)
@serve.ingress(
    lambda: make_app(
        os.environ["DISTCLS_MODEL"],
        token=os.environ.get("DISTCLS_TOKEN", ""),
        engine="threads",
        workers=CORES,
    )
)
class Distcls:
    """A replica."""


app = Distcls.bind()
