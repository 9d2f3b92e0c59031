"""Channel pruning: coupled channels are removed, so that tensors become smaller."""
