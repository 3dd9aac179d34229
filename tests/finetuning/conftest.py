import sys
from pathlib import Path

import pytest

# The tests of the strategies inherit from `strategy_checks`, which lies beside them.
sys.path.append(str(Path(__file__).parent))
pytest.register_assert_rewrite("strategy_checks")
