"""What all techniques share: the callback base class, structural changes, schedules, and exact resume."""
