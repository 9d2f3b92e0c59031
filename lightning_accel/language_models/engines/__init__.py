"""Runtimes that generate text from the files of a bundle, behind one interface."""
