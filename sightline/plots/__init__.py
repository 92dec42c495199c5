"""Plots: masks as text, PNG and HTML, the loss of a run, context-parallel plans. Import the module that you need."""
