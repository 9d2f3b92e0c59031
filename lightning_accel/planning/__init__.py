"""What a run will do, computed before it trains: the plan, and conflicts between its phases."""
