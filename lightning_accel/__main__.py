"""``python -m lightning_accel`` is the command ``lightning-accel``."""

import sys

from lightning_accel.commands import main

sys.exit(main())
