"""The published speed benchmark: one exact sweep by a plain loop, by other tools and by our engines, side by side.

`bench` has the entry, `measure_speed`. A contestant that writes weights by itself (`plain_loop`, `with_nnsight`, ...)
is one file, a function of the type `contestants.Contestant`; `operations` says what the ideal is.
"""

from __future__ import annotations

from weightpatch.speed.bench import Row as Row
from weightpatch.speed.bench import Speed as Speed
from weightpatch.speed.bench import SpeedSettings as SpeedSettings
from weightpatch.speed.bench import measure_speed as measure_speed

__all__ = ["Row", "Speed", "SpeedSettings", "measure_speed"]
