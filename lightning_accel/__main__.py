"""``python -m lightning_accel`` is the command ``lightning-accel``."""

import sys

from lightning_accel.cli.main import main

sys.exit(main())
