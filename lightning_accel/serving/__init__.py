"""Bundles in the form that inference servers load."""
