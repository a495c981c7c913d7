"""What tells the task of an image: fitted on unlabelled images of each task, without a gradient.

A router reads what no edit reaches, so that routing and encoding are one forward pass.
"""

from .fitting import fit_router, read_router
from .passes import check_reading, encode_routed, route
from .routers import ROUTERS, Router
from .settings import RouterSettings

__all__ = [
    "ROUTERS",
    "Router",
    "RouterSettings",
    "check_reading",
    "encode_routed",
    "fit_router",
    "read_router",
    "route",
]
