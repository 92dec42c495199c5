"""Leakage test of any module."""
