"""python -m tests.devices --device cuda: see matrix.py."""

import sys

from tests.devices.matrix import main

sys.exit(main())
