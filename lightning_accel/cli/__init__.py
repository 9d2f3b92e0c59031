"""The command ``lightning-accel``."""
