"""Packages that other platforms deploy: a bundle, pinned requirements, and a thin entry point that proves it first."""
