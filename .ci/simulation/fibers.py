"""greenlet, which has no type stubs, under names that have types."""

from __future__ import annotations

import importlib
from typing import Any

_module: Any = importlib.import_module("greenlet")

Greenlet: Any = _module.greenlet
GreenletExit: type[BaseException] = _module.GreenletExit
get_current: Any = _module.getcurrent
