"""Plan a run before training: layers, sizes, phases, and conflicts between phases."""
