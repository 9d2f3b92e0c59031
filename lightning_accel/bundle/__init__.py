"""The bundle: the folder that ships, and its provenance."""
