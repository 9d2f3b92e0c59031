"""Channel pruning: remove coupled channels, so that tensors become smaller."""
