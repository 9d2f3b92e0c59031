"""Export a trained network as a verified bundle."""
