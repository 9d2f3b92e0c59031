"""Verification: files and engines compared with the trained network."""
