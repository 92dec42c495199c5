"""Parallelism, applied to finished models in place."""

from sightline.parallel.context.plan import plan_context

__all__ = ["plan_context"]
