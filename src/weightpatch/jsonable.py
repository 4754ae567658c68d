"""Numbers as JSON takes them: it knows neither NaN nor infinity, so null stands for both."""

from __future__ import annotations

import math
from typing import Any


def finite(value: float) -> float | None:
    """A number; None where it is unknown (NaN) or unbounded."""
    return float(value) if math.isfinite(value) else None


def known(value: Any) -> Any:
    """A record with `finite` numbers all through, and texts for its keys."""
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, dict):
        return {str(key): known(item) for key, item in value.items()}
    return [known(item) for item in value] if isinstance(value, list | tuple) else value
