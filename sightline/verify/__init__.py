"""Leakage test of any module."""

from sightline.verify.leaks import LeakReport, leaks

__all__ = ["LeakReport", "leaks"]
