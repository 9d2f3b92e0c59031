"""One module for each command that needs neither torch nor lightning to start."""
