"""Parallelism, applied to models from outside."""

from sightline.parallel.context.plan import plan_context

__all__ = ["plan_context"]
