"""`python -m renyi`, so that `accelerate launch -m renyi sft …` works, too."""

import sys

from renyi.cli.main import main

sys.exit(main())
