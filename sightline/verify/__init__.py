"""Leakage test of any module."""

from sightline.verify.leaks import LeakReport, leaks
from sightline.verify.probe import Untestable

__all__ = ["LeakReport", "Untestable", "leaks"]
