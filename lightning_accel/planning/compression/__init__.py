"""Search for the cheapest recipe that fits budgets for accuracy, latency and size."""
