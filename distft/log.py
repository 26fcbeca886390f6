"""Logging: one logger for the package, and one place that quietens other libraries' chatter."""

from __future__ import annotations

import logging

logger = logging.getLogger("distft")
