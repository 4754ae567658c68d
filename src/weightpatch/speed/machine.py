"""What the machine can do, and what else it was doing."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from math import prod

import torch

from weightpatch.architecture import Architecture

SQUARE = 2048
SECONDS = 0.15
"""How long each product is repeated."""


def matrix_product_rate(architecture: Architecture, n_tokens: int, device: torch.device) -> float:
    """The best rate of float32 matrix products that this process reaches now, in operations per second.

    Tried are the products of a layer's own matrices with `n_tokens` tokens, and one of two square matrices. An
    operation is one multiplication or one addition.
    """
    prefix = architecture.layer_prefix(0)
    shapes = {shape for name, shape in architecture.parameters.items() if name.startswith(prefix) and len(shape) == 2}
    products = [(n_tokens, *shape) for shape in sorted(shapes)] + [(SQUARE, SQUARE, SQUARE)]
    return max(_rate(product, device) for product in products)


def _rate(product: tuple[int, ...], device: torch.device) -> float:
    """Best rate of one product of shapes (n, k) and (k, m)."""
    n, k, m = product
    left, right = torch.randn(n, k, device=device), torch.randn(k, m, device=device)
    out = torch.empty(n, m, device=device)
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < SECONDS or best == float("inf"):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * prod(product) / best


def synchronize(device: torch.device) -> None:
    """Wait for what was queued on an accelerator, so that a clock sees it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def load_average() -> float | None:
    """Load of the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python, of this package and of some others, as far as they are installed."""
    found = {"python": platform.python_version(), "weightpatch": version("weightpatch")}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
