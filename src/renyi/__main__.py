"""Makes `python -m renyi` work, and with it `accelerate launch -m renyi sft …`. Read next: `cli/main.py`."""

import sys

from renyi.cli.main import main

sys.exit(main())
